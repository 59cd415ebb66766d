"""The model host when workers die, hang, lie or are late; real processes, and where it can be a real model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentd.models.host import Host
from agentd.models.process import resident_bytes, start_time
from agentd.models.settings import BackoffSettings, HostSettings
from agentd.models.types import GenerationFailed, LoadableModel, ModelState, Refused
from tests.support import stub_backend
from tests.support.hosts import answer, reached, request, running, status_of
from tests.support.models import loadable, make_tiny_gguf

pytestmark = pytest.mark.model
QUICK = BackoffSettings(base_s=0.2, cap_s=0.8)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def gguf(gguf_file: Path) -> LoadableModel:
    return loadable(gguf_file, "gguf")


def stub(folder: Path, name: str = "stub", **options: Any) -> LoadableModel:
    return loadable(stub_backend.write_stub(folder / f"{name}.json", **options), "stub", name)


def settings(**more: Any) -> HostSettings:
    return HostSettings(**{**stub_backend.host_options(), "backoff": QUICK, **more})


def test_killed_worker_fails_its_request_alone_and_comes_back(gguf: LoadableModel, tmp_path: Path):
    other = stub(tmp_path)

    async def scenario():
        async with running(Host(settings()), [gguf, other]) as host:
            await answer(host, request(other.key))
            bystander = status_of(host, other.key).pid
            stream = host.generate(request(gguf.key, "hi", 450))
            await anext(stream)
            os.kill(status_of(host, gguf.key).pid, signal.SIGKILL)
            with pytest.raises(GenerationFailed, match="was killed by SIGKILL"):
                async for _ in stream:
                    pass
            status = status_of(host, gguf.key)
            assert (status.state, status.crashes) == (ModelState.BACKING_OFF, 1)
            with pytest.raises(Refused, match="SIGKILL") as caught:
                await answer(host, request(gguf.key))
            assert (caught.value.status, caught.value.code) == (503, "model_backing_off")
            await reached(host, gguf.key, ModelState.UNLOADED)
            await answer(host, request(gguf.key))
            assert status_of(host, gguf.key).crashes == 0
            assert status_of(host, other.key).pid == bystander
            assert host.granted_bytes() > 0

    asyncio.run(scenario())


def test_stopped_worker_is_seen_to_hang_and_is_named(gguf: LoadableModel):
    async def scenario():
        async with running(Host(settings(hang_floor_s=1.0, prefill_chunk=4)), [gguf]) as host:
            await host.load(gguf.key)
            pid = status_of(host, gguf.key).pid
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(GenerationFailed, match="it hung: no progress for 1 s"):
                await answer(host, request(gguf.key))
            assert resident_bytes(pid) == 0
            assert "hung" in status_of(host, gguf.key).reason

    asyncio.run(scenario())


def test_backend_that_hangs_in_the_middle(tmp_path: Path):
    model = stub(tmp_path, fail="hung", after_tokens=2)

    async def scenario():
        async with running(Host(settings(hang_floor_s=1.0, prefill_chunk=4)), [model]) as host:
            started = time.monotonic()
            with pytest.raises(GenerationFailed, match="hung"):
                await answer(host, request(model.key))
            assert time.monotonic() - started < 8

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"<html>404</html>", "is no GGUF model"),
        (lambda data: data[:2000], "is a damaged GGUF file"),
        (lambda data: data[:100_000], "is cut off: tensor .* and the file has 100000 bytes"),
    ],
    ids=["html", "half a header", "half the weights"],
)
def test_file_that_is_no_model(gguf_file: Path, tmp_path: Path, damage, words):
    path = tmp_path / "poison.gguf"
    path.write_bytes(damage(gguf_file.read_bytes()))
    model = loadable(path, "gguf")

    async def scenario():
        async with running(Host(settings(backoff=BackoffSettings())), [model]) as host:
            with pytest.raises(Refused, match=words) as caught:
                await answer(host, request(model.key))
            assert caught.value.status == 503
            assert 8 < caught.value.retry_after_s <= 10
            assert status_of(host, model.key).pid is None
            assert host.granted_bytes() == 0

    asyncio.run(scenario())


def test_folder_that_is_no_onnx_model(tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(b"x")
    model = loadable(tmp_path, "onnx-genai")

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            with pytest.raises(Refused, match=r"has no genai_config\.json"):
                await answer(host, request(model.key))

    asyncio.run(scenario())


def test_unknown_format_is_one_sentence(tmp_path: Path):
    path = tmp_path / "m.bin"
    path.write_bytes(b"x")
    model = loadable(path, "safetensors")

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            with pytest.raises(Refused, match="no backend serves the format 'safetensors'"):
                await answer(host, request(model.key))

    asyncio.run(scenario())


def test_failed_loads_back_off_longer_and_longer(tmp_path: Path):
    model = stub(tmp_path, fail="load")

    async def scenario():
        async with running(Host(settings(backoff=BackoffSettings(0.1, 10.0, degraded_after=2))), [model]) as host:
            waits = []
            for _ in range(3):
                with pytest.raises(Refused, match="this stub was told to fail"):
                    await answer(host, request(model.key))
                started = asyncio.get_running_loop().time()
                await reached(host, model.key, ModelState.UNLOADED)
                waits.append(asyncio.get_running_loop().time() - started)
            assert waits[0] < waits[1] < waits[2]
            assert status_of(host, model.key).reason.endswith("(3 times in a row)")

    asyncio.run(scenario())


def test_load_that_never_ends_is_ended(tmp_path: Path):
    model = stub(tmp_path, fail="late")

    async def scenario():
        async with running(Host(settings(load_timeout_s=1.0)), [model]) as host:
            with pytest.raises(Refused, match="it was not loaded after 1 s"):
                await answer(host, request(model.key))

    asyncio.run(scenario())


def test_full_queue_is_refused_with_a_measured_wait(tmp_path: Path):
    model = stub(tmp_path, tokens_per_s=20)

    async def scenario():
        async with running(Host(settings(max_queued=2)), [model]) as host:
            await answer(host, request(model.key, max_tokens=20))
            tasks = [asyncio.create_task(answer(host, request(model.key, max_tokens=20))) for _ in range(3)]
            await host.probe()
            with pytest.raises(Refused, match="2 requests already wait") as caught:
                await answer(host, request(model.key))
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            # Three requests of one second each or, on a busy machine, of what the first one took.
            service_s = host._owners[model.key].ledger.service_s
            assert service_s >= 1
            assert caught.value.retry_after_s == pytest.approx(3 * service_s)
            await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_wait_and_whole_answer_are_bounded(tmp_path: Path):
    model = stub(tmp_path, tokens_per_s=20)

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            await host.load(model.key)
            long = asyncio.create_task(answer(host, request(model.key, max_tokens=1000, timeout_s=1.0)))
            await host.probe()
            with pytest.raises(Refused, match="without its turn") as caught:
                await answer(host, request(model.key, queue_timeout_s=0.3))
            assert caught.value.status == 429
            with pytest.raises(GenerationFailed, match="not complete after 1 s"):
                await long
            # The slot is free again at once.
            _, done = await answer(host, request(model.key, max_tokens=2))
            assert done.timings.queue_s < 1

    asyncio.run(scenario())


def test_waiting_request_of_higher_priority_goes_first(tmp_path: Path):
    model = stub(tmp_path, tokens_per_s=50)

    async def scenario():
        order = []

        async def ask(name: str, priority: int) -> None:
            await answer(host, request(model.key, max_tokens=10, priority=priority))
            order.append(name)

        async with running(Host(settings()), [model]) as host:
            await host.load(model.key)
            async with asyncio.TaskGroup() as group:
                for name, priority in (("first", 50), ("low", 10), ("high", 90)):
                    group.create_task(ask(name, priority))
                    await host.probe()
            assert order == ["first", "high", "low"]

    asyncio.run(scenario())


def test_slots_of_a_backend_serve_side_by_side(tmp_path: Path):
    model = stub(tmp_path, tokens_per_s=20, slots=4)

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            await host.load(model.key)
            started = time.monotonic()
            await asyncio.gather(*(answer(host, request(model.key, max_tokens=20)) for _ in range(4)))
            assert time.monotonic() - started < 2.5

    asyncio.run(scenario())


def test_embeddings(tmp_path: Path):
    model = stub(tmp_path)

    async def scenario():
        async with running(Host(settings()), [model]) as host:
            vectors = await host.embed(request(model.key), ["abc", "de f"])
            assert vectors.values == [[3.0, 1.0], [4.0, 1.0]]
            assert vectors.prompt_tokens == 3

    asyncio.run(scenario())


def test_end_of_the_host_ends_what_runs(tmp_path: Path):
    model = stub(tmp_path, tokens_per_s=20)

    async def scenario():
        host = Host(settings())
        async with running(host, [model]):
            await host.load(model.key)
            asked = asyncio.create_task(answer(host, request(model.key, max_tokens=1000)))
            waits = asyncio.create_task(answer(host, request(model.key)))
            await host.probe()
            pid = status_of(host, model.key).pid
        assert resident_bytes(pid) == 0
        with pytest.raises(GenerationFailed, match="shutting down"):
            await asked
        with pytest.raises(Refused, match="shutting down"):
            await waits
        with pytest.raises(Refused, match="not running"):
            await answer(host, request(model.key))

    asyncio.run(scenario())


PARENT = """
import asyncio, sys
from pathlib import Path
from agentd.models.host import Host
from agentd.models.settings import HostSettings
from tests.support import stub_backend
from tests.support.hosts import running, status_of
from tests.support.models import loadable

async def main():
    host = Host(HostSettings(run_dir=Path(sys.argv[2]), **stub_backend.host_options()))
    model = loadable(Path(sys.argv[1]), "stub")
    async with running(host, [model]):
        await host.load(model.key)
        print(status_of(host, model.key).pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_workers_of_a_killed_agentd_are_gone_and_its_leftovers_reaped(tmp_path: Path):
    stub(tmp_path)
    run_dir = tmp_path / "run"
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", PARENT, str(tmp_path / "stub.json"), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        pidfd = os.pidfd_open(worker)
        parent.kill()
    with os.fdopen(pidfd, closefd=True):
        deadline = time.monotonic() + 5
        while start_time(worker) and time.monotonic() < deadline:
            signal.sigtimedwait([], 0.02)
    assert not start_time(worker)
    assert list(run_dir.glob("worker-*"))

    async def next_life():
        async with running(Host(settings(run_dir=run_dir)), []):
            assert not list(run_dir.glob("worker-*"))

    asyncio.run(next_life())


def test_leftover_worker_of_an_earlier_life_is_killed(tmp_path: Path):
    leftover = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = tmp_path / "worker-1-1"
    folder.mkdir()
    (folder / "pid").write_text(f"{leftover.pid} {start_time(leftover.pid)}\n")
    stranger = tmp_path / "worker-1-2"
    stranger.mkdir()
    (stranger / "pid").write_text(f"{os.getpid()} 1\n")

    async def scenario():
        async with running(Host(settings(run_dir=tmp_path)), []):
            assert leftover.wait(5) == -signal.SIGKILL

    asyncio.run(scenario())
    assert not list(tmp_path.glob("worker-*"))
