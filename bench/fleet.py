"""A private fleet to measure: a control plane with its own database and broker, and nodes, in a folder of their own."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from fleetctl.client import Client
from slmfleet.errors import UserError
from tests.support.processes import Child, wait_until

BIN = Path(sys.executable).parent
READY_S = 60.0


class Fleet:
    """Programs of this checkout. Nodes are enrolled when they are first started."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = dict(environment)
        self._children: dict[str, Child] = {}
        self._runtime: dict[str, Any] = {}
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None, "start_controlplane makes it"
        return self._client

    def start_controlplane(self, *flags: str) -> None:
        """`controlplane dev` on free ports."""
        data = self.folder / "server"
        child = self._start("controlplane", "dev", "--data-dir", str(data), *flags)
        self._runtime = _runtime(child, data)
        token = (data / "admin.token").read_text().strip()
        self._client = Client(url(self._runtime["http"]), token)
        wait_until(lambda: _quietly(lambda: self.client.get("/info")), "the control plane answers", READY_S)

    def state_dir(self, node: str) -> Path:
        """A node's folder."""
        return self.folder / node

    def start_node(self, name: str, labels: str = "tier=bench", wait: bool = True) -> Child:
        """`agentd run`, after `agentd enroll` where it is new; with ``wait``, until it is online."""
        if not (self.state_dir(name) / "identity" / "node.json").exists():
            self._enroll(name, labels)
        child = self._start("agentd", "run", *self.run_flags(name), key=name)
        if wait:
            _runtime(child, self.state_dir(name))
            self.await_online(name)
        return child

    def run_flags(self, name: str) -> list[str]:
        """Flags of `agentd run` for a node."""
        return ["--state-dir", str(self.state_dir(name)), "--api-listen", "127.0.0.1:0"]

    def await_online(self, name: str) -> None:
        """Until the control plane calls the node online."""
        wait_until(lambda: self.is_online(name), f"{name} is online", READY_S)

    def is_online(self, name: str) -> bool:
        """What the control plane says of a node now."""
        return self._state(name) == "online"

    def _state(self, name: str) -> str:
        node = self.client.find(f"/nodes/{name}") or {}
        return str(node.get("status", {}).get("state", ""))

    def local_api(self, name: str) -> str:
        """URL of a node's own API."""
        return url(str(json.loads((self.state_dir(name) / "runtime.json").read_text())["api"]))

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """Apply manifests."""
        self.client.apply([{"apiVersion": "slmfleet/v1", **document} for document in documents])

    def await_ready(self, deployment: str, count: int, warm: bool = False) -> set[str]:
        """Names of the nodes whose replicas of a deployment are ready, once there are ``count``."""

        def ready() -> set[str]:
            items = self.client.items(f"/deployments/{deployment}/replicas")
            found = {str(item["node"]) for item in items if item.get("ready") and (item.get("warm") or not warm)}
            return found if len(found) >= count else set()

        return wait_until(ready, f"{deployment} is ready on {count} nodes", 300.0)

    def stop(self, name: str) -> None:
        """SIGTERM, and wait until it is gone."""
        self._children.pop(name).stop()

    def kill(self, name: str) -> None:
        """SIGKILL to the daemon alone, as when it crashes; returns at once. ``bury`` it later."""
        self._children[name].process.kill()

    def bury(self, name: str) -> None:
        """Wait until a killed daemon is gone."""
        self._children.pop(name).kill()

    def close(self) -> None:
        """Stop everything, nodes first."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
        for name in sorted(self._children, key=lambda name: name == "controlplane"):
            self._children[name].stop()

    def _enroll(self, name: str, labels: str) -> None:
        token = self.client.call("POST", "/enrollment-tokens", body={"ttlSeconds": 300, "uses": 1})["token"]
        file = self.folder / f"{name}.token"
        file.touch(mode=0o600)
        file.write_text(token)
        arguments = ["agentd", "enroll", "--state-dir", str(self.state_dir(name)), "--name", name, "--labels", labels]
        arguments += ["--server", str(self._runtime["enrollment"]), "--token-file", str(file)]
        with self._program(*arguments) as child:
            assert child.wait_for_exit() == 0, child.output

    def _start(self, *arguments: str, key: str = "") -> Child:
        child = self._program(*arguments)
        self._children[key or arguments[0]] = child
        return child

    def _program(self, command: str, *arguments: str) -> Child:
        return Child([BIN / command, *arguments], env=self._environment)


@contextlib.contextmanager
def fleet(environment: Mapping[str, str] | None = None) -> Iterator[Fleet]:
    """A fleet in a temporary folder; everything ends with the block."""
    with tempfile.TemporaryDirectory(prefix="slmfleet-bench-") as folder:
        made = Fleet(Path(folder), environment or {})
        try:
            yield made
        finally:
            made.close()


def url(address: str) -> str:
    """``http://host:port`` of an address with or without scheme."""
    return (address if "://" in address else f"http://{address}").rstrip("/")


def pss_bytes(pid: int) -> int:
    """Summed PSS of a process, its children, their children and so on (proc(5), smaps_rollup)."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(_pss(process.pid) for process in family)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # ended between the two looks
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _runtime(child: Child, folder: Path) -> dict[str, Any]:
    def read() -> dict[str, Any] | None:
        assert child.process.poll() is None, f"{child.argv[0]} ended:\n{child.output}"
        found = _quietly(lambda: json.loads((folder / "runtime.json").read_text()))
        return found if found and found["pid"] == child.pid else None

    found = wait_until(read, f"{child.argv[0]} is up", READY_S)
    assert found is not None
    return found


def _quietly(call: Callable[[], Any]) -> Any:
    with contextlib.suppress(OSError, ValueError, UserError):
        return call()
    return None
