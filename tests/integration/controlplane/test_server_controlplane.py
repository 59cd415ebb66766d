"""The control plane as a program: `dev` and `serve` from the first start to a clean stop, and after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from controlplane.config import LISTENERS
from tests.support.mqtt import Mqtt
from tests.support.processes import Child, accepts, assert_gone, nothing_left_behind, wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt]

PROGRAM = Path(sys.executable).parent / "controlplane"


class ControlPlane:
    """A running `controlplane`, called over HTTP."""

    def __init__(self, child: Child, folder: Path) -> None:
        self.child = child
        self.folder = folder
        wait_until(lambda: self._is_up() or child.process.poll() is not None, "the control plane is up", 60)
        assert child.process.poll() is None, child.output
        self.facts: dict[str, Any] = json.loads((folder / "runtime.json").read_text())

    def _is_up(self) -> bool:
        path = self.folder / "runtime.json"
        return path.exists() and json.loads(path.read_text())["pid"] == self.child.pid

    @property
    def token(self) -> str:
        return (self.folder / "admin.token").read_text().strip()

    def call(self, path: str, body: Any = None, token: str | None = None, **more: str) -> tuple[int, Any]:
        """Status and answer; JSON where it is JSON. ``more``: request headers, - as _."""
        data = None if body is None else json.dumps(body).encode()
        headers = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        if token:
            headers["authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"http://{self.facts['http']}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.child.pid), *self.child.descendants()]


@contextmanager
def running(
    folder: Path, *arguments: str, command: str = "dev", env: dict[str, str] | None = None
) -> Iterator[ControlPlane]:
    with Child([PROGRAM, command, "--data-dir", folder, *arguments], env=env) as child:
        yield ControlPlane(child, folder)


def with_own_ports(folder: Path) -> Path:
    """A data folder whose last run had ports that nobody else here looks for, nor gets by chance (those are higher)."""
    folder.mkdir(mode=0o700)
    ports: dict[str, int] = {}
    for name in LISTENERS:
        while name not in ports:
            port = random.randrange(20_000, 32_000)
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                ports[name] = port
    (folder / "ports.json").write_text(json.dumps(ports))
    return folder


def ended(folder: Path, *arguments: str, command: str = "dev", env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a start that is expected to fail."""
    with Child([PROGRAM, command, "--data-dir", folder, *arguments], env=env) as child:
        return child.wait_for_exit(60), child.output


def test_dev_from_the_first_start_to_the_second(folder: Path) -> None:
    folder = with_own_ports(folder / "data")
    with nothing_left_behind(), running(folder) as first:
        assert first.child.wait_for_line("MQTT broker knows passwords and no certificates")
        assert first.facts["children"] == [process.pid for process in psutil.Process(first.child.pid).children()]
        assert (folder / "admin.token").stat().st_mode & 0o777 == 0o600
        status, page = first.call("/docs")
        assert (status, "swagger" in page.lower()) == (200, True)
        assert first.call("/readyz")[0] == 200
        assert first.call("/api/v1/nodes")[0] == 401
        assert first.call("/v1/models")[0] == 401
        assert first.call("/v1/models", token=first.token)[0] == 200
        status, info = first.call("/api/v1/info", token=first.token)
        assert (status, info["beatSeconds"], info["ttlSeconds"]) == (200, 1.0, 3.0)
        status, made = first.call("/api/v1/enrollment-tokens", {"ttlSeconds": 60, "uses": 1}, first.token)
        assert (status, made["token"].split(".")[0]) == (201, "slmfleet1")
        assert "slmfleet_ingest_connected 1" in first.call("/metrics")[1]
        # Through a proxy on this machine anybody may come.
        status, why = first.call("/metrics", x_forwarded_for="192.0.2.7")
        assert (status, "needs an API key" in why) == (401, True)
        assert first.call("/metrics", token=first.token, x_forwarded_for="192.0.2.7")[0] == 200
        family = first.family()
        for name in ("http", "enrollment", "node_api", "artifacts", "mqtt"):
            host, port = first.facts[name].rsplit(":", 1)
            assert accepts(host, int(port)), name
        assert first.child.stop() == 0
        assert_gone(family)
        assert not (folder / "runtime.json").exists()
        for name in ("http", "enrollment", "node_api", "artifacts", "mqtt"):
            host, port = first.facts[name].rsplit(":", 1)
            assert not accepts(host, int(port)), name
        token = first.token
    with running(folder) as second:
        assert second.call("/api/v1/info", token=token)[1]["timeline"] == info["timeline"]
        addresses = ("http", "enrollment", "node_api", "artifacts", "mqtt")
        assert {name: second.facts[name] for name in addresses} == {name: first.facts[name] for name in addresses}
        assert second.child.stop(signal.SIGINT) == 0


def test_dev_after_kill_9(folder: Path) -> None:
    folder = with_own_ports(folder / "data")
    with running(folder) as first:
        family = first.family()
        token, facts = first.token, first.facts
        os.kill(first.child.pid, signal.SIGKILL)
        first.child.wait_for_exit()
        assert_gone(family, 20)
        assert (folder / "runtime.json").exists()
    with running(folder) as second:
        assert second.call("/api/v1/info", token=token)[0] == 200
        assert second.facts["node_api"] == facts["node_api"]
        assert second.child.stop() == 0


def test_two_that_start_at_once_share_no_port(folder: Path) -> None:
    folders = [with_own_ports(folder / "one"), folder / "two"]
    folders[1].mkdir(mode=0o700)
    shutil.copy(folders[0] / "ports.json", folders[1])
    with (
        Child([PROGRAM, "dev", "--data-dir", folders[0]]) as one,
        Child([PROGRAM, "dev", "--data-dir", folders[1]]) as two,
    ):
        planes = [ControlPlane(child, data) for child, data in zip((one, two), folders, strict=True)]
        for plane in planes:
            assert plane.call("/api/v1/info", token=plane.token)[0] == 200
        addresses = [
            plane.facts[name] for plane in planes for name in ("http", "enrollment", "node_api", "artifacts", "mqtt")
        ]
        assert len(set(addresses)) == 10
        assert [plane.child.stop() for plane in planes] == [0, 0]


def test_one_control_plane_a_folder(folder: Path) -> None:
    folder = folder / "data"
    with running(folder) as first:
        status, output = ended(folder)
        assert (status, output.count("\n")) == (1, 0)
        assert f"another controlplane (pid {first.child.pid}) runs on {folder}" in output
        assert first.call("/readyz")[0] == 200
        assert first.child.stop() == 0


def test_a_port_that_was_given_and_is_taken_is_an_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with nothing_left_behind():
            status, output = ended(folder / "data", "--node-listen", address)
    assert (status, output.count("\n")) == (1, 0)
    assert f"cannot listen on {address}" in output
    assert "node_listen" in output


def test_a_folder_of_a_newer_schema_is_refused(folder: Path) -> None:
    folder = folder / "data"

    async def pretend() -> None:
        connection = await asyncpg.connect(f"postgresql://postgres@/postgres?host={folder}/postgres")
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
        await connection.close()

    with running(folder) as first:
        asyncio.run(pretend())
        assert first.child.stop() == 0
    with nothing_left_behind():
        status, output = ended(folder)
    assert status == 2
    assert "schema 9999" in output
    assert "newer version" in output
    assert "Traceback" not in output


def test_a_database_that_dies_ends_the_control_plane_in_one_sentence(folder: Path) -> None:
    with running(folder / "data") as plane:
        family = plane.family()
        os.kill(plane.facts["children"][0], signal.SIGKILL)
        assert plane.child.wait_for_exit() == 1
        assert "the embedded PostgreSQL ended by itself" in plane.child.output, plane.child.output
        assert "Traceback" not in plane.child.output
        assert_gone(family)


def test_serve_with_servers_of_one_s_own(
    migrated_postgres_url: str, postgres_url: str, mqtt: Mqtt, folder: Path
) -> None:
    free = ["--http-listen", "127.0.0.1:0", "--enrollment-listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0"]
    free += ["--artifacts-listen", "127.0.0.1:0"]
    # Never as flags: those are in the process list, and these may hold passwords.
    urls = {"CONTROLPLANE_MQTT_URL": mqtt.url, "CONTROLPLANE_POSTGRES_URL": migrated_postgres_url}
    status, output = ended(
        folder / "empty", *free, command="serve", env={**urls, "CONTROLPLANE_POSTGRES_URL": postgres_url}
    )
    assert status == 1
    assert "run `controlplane migrate`" in output
    manager = folder / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(manager))
        systemd.settimeout(30)
        env = {**urls, "NOTIFY_SOCKET": str(manager), "WATCHDOG_USEC": "300000"}
        with running(folder / "data", *free, command="serve", env=env) as plane:
            assert plane.facts["children"] == []
            heard: set[bytes] = set()
            while not {b"READY=1", b"WATCHDOG=1"} <= heard:
                heard.add(systemd.recv(1000))
            assert plane.call("/api/v1/info", token=plane.token)[1]["beatSeconds"] == 5.0
            assert plane.child.stop() == 0
            while b"STOPPING=1" not in heard:
                heard.add(systemd.recv(1000))


def test_keys_are_made_on_the_command_line(folder: Path) -> None:
    folder = folder / "data"
    with running(folder) as plane:
        with Child([PROGRAM, "key", "app", "--role", "gateway", "--data-dir", folder]) as child:
            key = child.wait_for_line(r"^(slmfleet_gateway_\S+)$")[1]
            assert child.wait_for_exit() == 0
        assert plane.call("/v1/models", token=key)[0] == 200
        assert plane.call("/api/v1/nodes", token=key)[0] == 403
        assert plane.child.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "needs a PostgreSQL server"),
        (["dev", "--beat", "soon"], "beat"),
        (["dev", "--bleat", "1s"], "--bleat"),
        (["migrate"], "postgres_url"),
        (["dance"], "dance"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    with Child([PROGRAM, *arguments], env={"HOME": str(tmp_path), "CONTROLPLANE_DATA_DIR": str(tmp_path)}) as child:
        assert child.wait_for_exit() == 2
        assert len(child.lines) == 1
        assert words in child.output


def test_an_unknown_key_in_the_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("bead = 1\n")
    with Child([PROGRAM, "dev", "--config", file]) as child:
        assert child.wait_for_exit() == 2
    assert child.lines == [f"controlplane: unknown key 'bead' in {file} (did you mean 'beat'?)"]


def test_the_version() -> None:
    with Child([PROGRAM, "--version"]) as child:
        child.wait_for_line("^controlplane ")
        assert child.wait_for_exit() == 0
