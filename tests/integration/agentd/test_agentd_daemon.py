"""The whole daemon as a process, with a host that has no models (tests/support/fake_host.py) behind the real API."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from slmfleet.v1 import state_pb2 as pb
from tests.support.fake_controlplane import Connection, FakeControlPlane, desired_state
from tests.support.processes import Child, free_port

CONTENT = os.urandom(50_000)


def document(
    plane: FakeControlPlane, *, warm: bool = True, content: bytes = CONTENT, fmt: str = "gguf"
) -> pb.NodeDocument:
    sha256 = plane.add_blob(content)
    file = pb.FileRef(sha256=sha256, size_bytes=len(content), name="model.gguf")
    model = pb.ModelManifest(
        name="m", version="1", digest="ab" * 32, variants=[pb.Variant(name="q4", format=fmt, files=[file])]
    )
    agent = pb.AgentManifest(name="greeter", instructions="Be nice.", expose=[1, 2])
    assignment = pb.Assignment(
        id="a1", deployment="shop", revision=1, model=model, agent=agent, phase=pb.ASSIGNMENT_PHASE_ACTIVE, warm=warm
    )
    return pb.NodeDocument(assignments=[assignment])


class Node:
    """A running agentd."""

    def __init__(self, state: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.state = state
        self.child = Child(
            [sys.executable, "-m", "tests.support.fake_host", "run", "--state-dir", state, "--api-listen",
             "127.0.0.1:0", "--telemetry-interval", "1s", *flags],
            env=env,
        )  # fmt: skip

    @property
    def api(self) -> str:
        return str(json.loads((self.state / "runtime.json").read_text())["api"])

    def ready(self) -> Node:
        self.child.wait_for_line(r" ready api=")
        return self

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.api}{path}", timeout=10) as answer:
            body = answer.read()
        return json.loads(body) if body.startswith(b"{") else body.decode()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://{self.api}/v1", api_key="none", max_retries=0, timeout=20)


@contextmanager
def started(state: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Node]:
    node = Node(state, *flags, env=env)
    try:
        yield node.ready()
    finally:
        if node.child.process.poll() is None:
            node.child.process.kill()
        node.child.wait_for_exit()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(bounded())


async def converged(plane: FakeControlPlane, number: int = 1) -> Connection:
    link = await plane.connection(number)
    await link.condition("a1", "Warm", reason="Loaded")
    return link


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a node that once converged; its control plane is gone."""
    folder = tmp_path_factory.mktemp("served")

    async def prepare() -> None:
        async with FakeControlPlane(folder) as plane:
            await plane.enrol(folder / "state")
            plane.desired = desired_state(document(plane), 3)
            node = await asyncio.to_thread(Node, folder / "state")
            await converged(plane)
            node.child.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(node.child.wait_for_exit) == 0, node.child.output

    asyncio.run(prepare())
    return folder / "state"


@pytest.fixture
def offline(served: Path) -> Iterator[Node]:
    """That node started again, with no network."""
    with started(served) as node:
        yield node


def test_a_node_converges_reports_and_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane), 3)
            with started(tmp_path / "state") as node:
                link = await converged(plane)
                assert (await link.applied(3)).refused == ""
                reported = await link.condition("a1", "Ready", status=pb.CONDITION_STATUS_TRUE)
                assert (reported.observed_generation, reported.variant) == (3, "q4")
                assert reported.bytes_done == reported.bytes_total == len(CONTENT)
                relay = await plane.relay()
                body = {"model": "agent/greeter", "messages": [{"role": "user", "content": "hi"}]}
                status, answer = await relay.request("POST", "/v1/chat/completions", json.dumps(body).encode())
                assert status == 200
                assert json.loads(answer)["choices"][0]["message"]["content"] == "Hello, I am a fake."
                facts = await asyncio.to_thread(node.get, "/status")
                assert (facts["connected"], facts["generation"], facts["name"]) == (True, 3, "n1")
                # An assignment that is gone: its view goes, its bytes stay as a cache.
                link.send(desired_state=desired_state(pb.NodeDocument(), 4))
                await link.applied(4)
                await link.up.wait(lambda up: up.statuses.complete and not up.statuses.statuses,
                                   after=len(link.up.items) - 1)  # fmt: skip
                assert (await relay.request("POST", "/v1/chat/completions", json.dumps(body).encode()))[0] == 404
                assert len(list((tmp_path / "state/artifacts/blobs").iterdir())) == 1

    run(test)


def test_a_wrong_digest_is_a_condition_and_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane), 1)
            (sha256,) = plane.blobs
            plane.files.forged[sha256] = CONTENT[:-1] + b"?"
            with started(tmp_path / "state"):
                link = await plane.connection()
                await link.condition("a1", "Staged", reason="DigestMismatch")
                folder = tmp_path / "state/artifacts"
                assert [*(folder / "blobs").iterdir(), *(folder / "views").iterdir()] == []
                plane.files.forged.clear()
                await link.condition("a1", "Warm", reason="Loaded", timeout_s=30)

    run(test)


def test_a_download_goes_on_after_kill_minus_9(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane, content=os.urandom(4_000_000)), 1)
            (sha256,) = plane.blobs
            plane.files.may_go_on.clear()
            partial = tmp_path / "state/artifacts/partial" / sha256
            with started(tmp_path / "state") as node:
                link = await plane.connection()
                await link.condition("a1", "Staged", reason="Downloading")
                while not partial.exists() or partial.stat().st_size == 0:  # noqa: ASYNC110  # a file tells nobody
                    await asyncio.sleep(0.01)
                node.child.process.kill()
            have = partial.stat().st_size
            plane.files.may_go_on.set()
            with started(tmp_path / "state"):
                await converged(plane, 2)
            assert plane.files.requests[-1] == (sha256, f"bytes={have}-")

    run(test)


def test_a_file_that_was_damaged_on_disk_is_found_told_and_fetched_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane), 1)
            (sha256,) = plane.blobs
            blob = tmp_path / "state/artifacts/blobs" / sha256
            with started(tmp_path / "state") as node:
                await converged(plane)
                node.child.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(node.child.wait_for_exit) == 0
            blob.chmod(0o600)
            blob.write_bytes(b"?" + CONTENT[1:])
            with started(tmp_path / "state") as node:
                await asyncio.to_thread(node.child.wait_for_line, "a damaged file was deleted")
                await converged(plane, 2)
                assert blob.read_bytes() == CONTENT
                assert [digest for digest, _ in plane.files.requests] == [sha256, sha256]

    run(test)


def test_a_full_disk_does_not_end_the_daemon(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane), 1)
            with started(tmp_path / "state", "--disk-reserve", "900TB") as node:
                link = await plane.connection()
                found = await link.condition("a1", "Staged", reason="DiskFull")
                assert any("free some space" in condition.message for condition in found.conditions)
                assert await asyncio.to_thread(node.get, "/healthz") == {"status": "ok"}
                assert list((tmp_path / "state/artifacts/partial").iterdir()) == []

    run(test)


def test_no_backend_is_reported(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane, fmt="exotic"), 1)
            with started(tmp_path / "state"):
                found = await (await plane.connection()).condition("a1", "Ready", reason="NoBackend")
                assert any("exotic" in condition.message for condition in found.conditions)

    run(test)


def test_run_enrols_first_and_waits_for_the_server(tmp_path: Path) -> None:
    async def test() -> None:
        plane = FakeControlPlane(tmp_path)
        await plane.start_servers()
        address = plane.endpoints.enrollment
        await plane.stop_servers()
        (tmp_path / "token").write_text(plane.new_token())
        flags = ("--server", address, "--token-file", str(tmp_path / "token"), "--name", "n7", "--labels", "a=b")
        node = Node(tmp_path / "state", *flags)
        try:
            await asyncio.to_thread(node.child.wait_for_line, "cannot enrol yet")
            async with plane:
                await asyncio.to_thread(node.ready)
                link = await plane.connection()
                assert link.node_id == "id-n7"
                assert dict(plane.enrolled[0].labels) == {"a": "b"}
                node.child.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(node.child.wait_for_exit) == 0
        finally:
            node.child.process.kill()

    run(test)


def test_without_any_network_it_serves_what_is_on_disk(offline: Node) -> None:
    assert offline.get("/readyz") == {"ready": True, "connected": False}
    answer = offline.client().chat.completions.create(model="shop", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "Hello, I am a fake."
    facts = offline.get("/status")
    assert (facts["generation"], facts["connected"]) == (3, False)
    assert facts["problem"]


def test_the_openai_package_is_served(offline: Node) -> None:
    client = offline.client()
    assert [model.id for model in client.models.list()] == ["agent/greeter", "m", "shop"]
    messages: Any = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(
        model="agent/greeter", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, I am a fake."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["slmfleet"]["model"] == "m@1/q4"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=messages, temperature=7)
    assert bad.value.param == "temperature"


def test_metrics_count_requests(offline: Node) -> None:
    offline.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    page = offline.get("/metrics")
    line = 'agentd_requests_total{model="m",version="1",variant="q4",outcome="ok"} 1'
    assert line in page.splitlines()
    assert 'agentd_assignments{condition="Ready"} 1' in page


def test_one_agentd_per_state_folder(offline: Node) -> None:
    second = Node(offline.state)
    assert second.child.wait_for_exit() == 1
    assert f"another agentd (pid {offline.child.pid}) uses the state folder" in second.child.output
    assert second.child.output.count("\n") == 0


def test_a_taken_port_is_one_sentence(served: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = Node(served, "--api-listen", f"127.0.0.1:{port}")
        assert node.child.wait_for_exit() == 1
    assert node.child.output.startswith(f"agentd: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert not (served / "runtime.json").exists()


def test_a_newer_database_is_one_sentence(served: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    import shutil

    shutil.copytree(served, state)
    with sqlite3.connect(state / "store.db") as connection:
        connection.execute("PRAGMA user_version=99")
    node = Node(state)
    assert node.child.wait_for_exit() == 1
    assert "made by a newer agentd" in node.child.output
    assert node.child.output.count("\n") == 0


def test_sigterm_lets_a_running_answer_end_and_leaves_nothing(served: Path) -> None:
    with started(served, env={"FAKE_HOST_WORD_S": "0.1"}) as node:
        words: list[str] = []
        begun = threading.Event()

        def ask() -> None:
            for chunk in node.client().chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            ):
                words.append(chunk.choices[0].delta.content or "")
                begun.set()

        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(10)
        node.child.process.send_signal(signal.SIGTERM)
        node.child.wait_for_line("stopping in_flight=1")
        assert node.child.wait_for_exit() == 0
        asking.join(10)
        assert "".join(words) == "Hello, I am a fake."
        assert not (served / "runtime.json").exists()


def test_a_second_signal_hurries(served: Path) -> None:
    with started(served, env={"FAKE_HOST_WORD_S": "30"}) as node:
        connection = http.client.HTTPConnection(node.api, timeout=30)
        body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read(1)
        node.child.process.send_signal(signal.SIGTERM)
        node.child.wait_for_line("stopping in_flight=1")
        began = time.monotonic()
        node.child.process.send_signal(signal.SIGINT)
        assert node.child.wait_for_exit() == 0
        assert time.monotonic() - began < 5


def test_a_client_that_leaves_ends_its_generation(served: Path) -> None:
    with started(served, env={"FAKE_HOST_WORD_S": "30"}) as node:
        connection = http.client.HTTPConnection(node.api, timeout=30)
        body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read(1)
        assert node.get("/status")["in_flight"] == 1
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        node.child.wait_for_line("generation cancelled")
        assert node.get("/status")["in_flight"] == 0


def test_after_kill_minus_9_it_starts_again_with_a_new_epoch(served: Path) -> None:
    def epoch() -> str:
        with sqlite3.connect(served / "store.db") as connection:
            return str(connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])

    with started(served) as node:
        before = epoch()
        node.child.process.kill()
    with started(served) as node:
        assert epoch() != before
        assert node.get("/status")["generation"] == 3


def test_systemd_is_told(served: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        with started(served, env=env) as node:
            told = [manager.recv(4096).decode()]
            while told[-1] != "WATCHDOG=1":
                told.append(manager.recv(4096).decode())
            assert "READY=1" in told
            node.child.process.send_signal(signal.SIGTERM)
            while told[-1] != "STOPPING=1":
                told.append(manager.recv(4096).decode())
            assert node.child.wait_for_exit() == 0


def test_status_and_doctor_as_programs(served: Path, offline: Node) -> None:
    status = Child([sys.executable, "-m", "agentd", "status", "--state-dir", served])
    assert status.wait_for_exit() == 0
    assert "node        n1 (id-n1)" in status.output
    assert "assignment  a1: Staged, Ready, Warm" in status.output
    doctor = Child([sys.executable, "-m", "agentd", "doctor", "--state-dir", served])
    assert doctor.wait_for_exit() == 0  # unreachable is a warning: a node works offline
    grades = {line.split()[1]: line.split()[0] for line in doctor.output.splitlines()}
    assert grades["identity"] == grades["certificate"] == grades["api"] == "ok"
    assert grades["session"] == grades["artifacts"] == "warn"


def test_doctor_fails_where_something_must_be_mended(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        doctor = Child(
            [sys.executable, "-m", "agentd", "doctor", "--state-dir", tmp_path / "s", "--api-listen", address]
        )
        assert doctor.wait_for_exit() == 1
    failed = [line for line in doctor.output.splitlines() if line.startswith("fail")]
    assert [line.split()[1] for line in failed] == ["identity", "api"]
    assert all(":" in line for line in failed)


def test_the_daemon_stays_light(offline: Node) -> None:
    """What must not be resident: cryptography (renewal is a child's work), any inference runtime, web frameworks."""
    mapped = Path(f"/proc/{offline.child.pid}/maps").read_text()
    for heavy in ("cryptography", "pydantic", "xllamacpp", "onnxruntime", "numpy"):
        assert heavy not in mapped


def test_the_port_is_free_again_after_a_stop(served: Path) -> None:
    port = free_port()
    for _ in range(2):
        node = Node(served, "--api-listen", f"127.0.0.1:{port}").ready()
        assert node.api == f"127.0.0.1:{port}"
        node.child.process.send_signal(signal.SIGTERM)
        assert node.child.wait_for_exit() == 0
