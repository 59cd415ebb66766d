"""A whole small fleet whose parts can be killed one by one: PostgreSQL, broker, control plane and nodes, all processes.

Everything is real: `controlplane serve` on an embedded PostgreSQL that keeps what it commits and on the embedded
broker, `agentd run` with worker processes of the stub backend. Ports stay the same over all restarts. Use it from the
main thread: the kernel ties the lives of the children to the thread that starts them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.models import deployment, stub_environment, stub_model
from controlplane.db import migrate
from controlplane.embedded.broker import HOST, EmbeddedBroker
from controlplane.embedded.postgres import EmbeddedPostgres
from fleetctl.client import Client
from slmfleet.errors import UserError
from tests.reliability.asking import Asker
from tests.reliability.counting import Numbered, Stored, stored
from tests.support.netns import Member
from tests.support.processes import Child, free_port, wait_until
from tests.support.tcp_proxy import TcpProxy

BIN = Path(sys.executable).parent
MODEL = "stub"
UP_S = 60.0


class Node:
    """One agentd in its own state folder, perhaps in its own network namespace."""

    def __init__(self, site: Site, name: str, member: Member | None, flags: tuple[str, ...]) -> None:
        self.name = name
        self.state = site.folder / name
        self.member = member
        self.child: Child | None = None
        self.numbered = Numbered(self.state / "store.db")
        # Where the control plane's enrolment is, in place of what the server says of itself.
        self._api_port = free_port()
        self._flags = flags

    @property
    def id(self) -> str:
        """Its id in the fleet."""
        return str(json.loads((self.state / "identity" / "node.json").read_text())["node_id"])

    @property
    def api(self) -> tuple[str, int]:
        """Where its local API listens, in its own namespace."""
        return "127.0.0.1", self._api_port

    def start(self, wait: bool = True) -> None:
        """`agentd run`; with ``wait``, until it serves."""
        flags = ["--state-dir", self.state, "--api-listen", f"127.0.0.1:{self._api_port}", "--keep-alive", "-1"]
        self.child = self.program("agentd", "run", *flags, "--telemetry-interval", "100ms", *self._flags)
        if wait:
            self.child.wait_for_line(r" ready api=")

    def program(self, command: str, *arguments: str | Path) -> Child:
        """A child process where this node lives."""
        argv = [str(BIN / command), *(str(part) for part in arguments)]
        return Child(self.member.argv(*argv) if self.member else argv, env=stub_environment())

    def kill(self) -> None:
        """SIGKILL to the daemon alone; its workers notice by themselves. What it had numbered is noted."""
        assert self.child is not None
        self.child.process.kill()
        self.child.wait_for_exit()
        self.child.kill()
        self.numbered.look()

    def stop(self) -> None:
        """SIGTERM and wait."""
        if self.child is not None and self.child.process.poll() is None:
            self.child.stop()
            self.numbered.look()

    def status(self) -> dict[str, Any]:
        """What `agentd status` shows."""
        return self.asker().status()

    def asker(self) -> Asker:
        """Somebody on the device who calls its local API."""
        return Asker(self.api, self.member)


class Site:
    """See the module. ``host`` is this machine's address as the nodes see it."""

    def __init__(self, folder: Path, host: str, beat: str, stack: contextlib.ExitStack, flags: tuple[str, ...]) -> None:
        self.folder = folder
        self.host = host
        self.beat = beat
        self.ports = {name: free_port() for name in ("http", "enrollment", "node", "artifacts")}
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.broker = EmbeddedBroker(folder / "mqtt")
        self.nodes: dict[str, Node] = {}
        self.server: Child | None = None
        self._flags = flags
        self._stack = stack
        stack.callback(self._end)
        self.postgres.start()
        migrate.upgrade(self.postgres.url())
        self.broker.start()
        # The embedded broker listens on loopback alone; this is its way to other addresses, and a bad line at will.
        self.mqtt_line = stack.enter_context(TcpProxy(HOST, self.broker.port, host))
        self.start_server()
        token = (folder / "server" / "admin.token").read_text().strip()
        self.client = stack.enter_context(Client(f"http://127.0.0.1:{self.ports['http']}", token, timeout_s=10.0))

    @property
    def postgres_url(self) -> str:
        """For direct looks at the tables."""
        return self.postgres.url()

    def start_server(self, wait: bool = True) -> None:
        """`controlplane serve`; with ``wait``, until it answers."""
        user, password = self.broker.credentials_of_server()
        listen = {f"{name}-listen": f"{self.host}:{self.ports[name]}" for name in ("enrollment", "node", "artifacts")}
        options = {
            "data-dir": self.folder / "server",
            "postgres-url": self.postgres_url,
            "mqtt-url": f"mqtt://{user}:{password}@{HOST}:{self.broker.port}",
            "mqtt-node-url": f"mqtt://{user}:{password}@{self.host}:{self.mqtt_line.port}",
            "http-listen": f"127.0.0.1:{self.ports['http']}",
            "advertise": self.host,
            "beat": self.beat,
            **listen,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        # Its PYTHONPATH: the programs of this checkout, wherever the tests were started.
        self.server = Child([BIN / "controlplane", "serve", *flags, *self._flags], env=stub_environment())
        if wait:
            runtime = self.folder / "server" / "runtime.json"
            wait_until(lambda: self._runs(runtime), "the control plane is up", UP_S)

    def _runs(self, runtime: Path) -> bool:
        assert self.server is not None
        assert self.server.process.poll() is None, self.server.output
        facts = quietly(lambda: json.loads(runtime.read_text()))
        return bool(facts) and facts["pid"] == self.server.pid

    def supervise(self) -> int:
        """Start again what ended by itself, as systemd does by the units in `deploy/`; how many that were. A control
        plane that starts while its database is away says so and ends."""
        ended = [node for node in self.nodes.values() if node.child is not None and _has_ended(node.child)]
        for node in ended:
            node.numbered.look()
            node.start(wait=False)
        if self.server is None or not _has_ended(self.server):
            return len(ended)
        self.start_server(wait=False)
        return len(ended) + 1

    def kill_server(self) -> None:
        """SIGKILL to the control plane."""
        assert self.server is not None
        self.server.process.kill()
        self.server.wait_for_exit()
        self.server.kill()

    def kill_broker(self) -> None:
        """SIGKILL to the broker: it forgets all sessions and messages."""
        self.broker._process.kill()  # type: ignore[union-attr]
        self.broker.stop()

    def kill_postgres(self) -> None:
        """SIGKILL to the postmaster. Its sessions end by themselves, and the next start ends what is left."""
        self.postgres._process.kill()  # type: ignore[union-attr]
        self.postgres.stop()

    def add_node(self, name: str, member: Member | None = None, *flags: str) -> Node:
        """Enrol a node and start it."""
        node = self.nodes[name] = Node(self, name, member, flags)
        node.state.mkdir(exist_ok=True)
        token = self.client.call("POST", "/enrollment-tokens", body={"ttlSeconds": 300, "uses": 1})["token"]
        file = node.state / "token"
        file.touch(mode=0o600)
        file.write_text(token)
        server = f"{self.host}:{self.ports['enrollment']}"
        arguments = ["--state-dir", node.state, "--name", name, "--server", server, "--token-file", file]
        with node.program("agentd", "enroll", *arguments) as child:
            assert child.wait_for_exit() == 0, child.output
        node.start()
        return node

    def serve_model(self, *names: str) -> None:
        """A stub model on every node, under its own name, ready and loaded."""
        self.apply(stub_model(MODEL, self.folder))
        self.deploy(MODEL)
        wait_until(lambda: len(self.warm(MODEL)) >= len(self.nodes), "the model is loaded on every node", UP_S)

    def deploy(self, name: str) -> None:
        """The model on every node, under another name."""
        document = deployment(MODEL, mode="every_node", onDisconnect="keep")
        document["metadata"] = {"name": name}
        self.apply(document)

    def apply(self, *documents: dict[str, Any]) -> None:
        """Apply manifests."""
        self.client.apply([{"apiVersion": "slmfleet/v1", **document} for document in documents])

    def warm(self, name: str) -> set[str]:
        """Nodes that have loaded a deployment's model."""
        found = quietly(lambda: list(self.client.items(f"/deployments/{name}/replicas"))) or []
        return {str(item["node"]) for item in found if item.get("ready") and item.get("warm")}

    def agrees(self, node: Node) -> bool:
        """Whether the node is online and has applied the newest desired state there is."""
        found = quietly(lambda: self.client.get(f"/nodes/{node.name}")) or {"status": {}}
        status = found["status"]
        generation = status.get("desiredGeneration") or 0
        return (
            status.get("state") == "online"
            and bool(generation)
            and generation == status.get("appliedGeneration")
            and generation == (quietly(node.status) or {}).get("generation")
        )

    def await_agreement(self, deadline_s: float = 90.0) -> float:
        """Until every node is online with the newest desired state; how long that took, in seconds."""
        began = time.monotonic()
        for node in self.nodes.values():
            wait_until(
                lambda node=node: not self.supervise() and self.agrees(node),  # type: ignore[misc]
                f"{node.name} agrees with the control plane",
                deadline_s,
            )
        return time.monotonic() - began

    def await_rows(self, node: Node, deadline_s: float = 120.0) -> Stored:
        """Until all that the node has numbered so far is in Postgres; what is there then."""
        numbered = node.numbered.look()
        found: list[Stored] = []

        def complete() -> bool:
            found[:] = [stored(self.postgres_url, node.id, node.name, numbered)]
            return not found[0].missing

        try:
            wait_until(complete, "every row is in Postgres", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; missing: {found[0].missing}\n{self.story(node)}") from None
        return found[0]

    def story(self, node: Node) -> str:
        """What the programs said last, for somebody who wonders why a test failed."""
        said = [f"--- {node.name}: {quietly(node.status)}"]
        for name, child in ((node.name, node.child), ("control plane", self.server)):
            said.append(f"--- {name}\n{child.output[-4000:] if child else 'not started'}")
        return "\n".join(said)

    def _end(self) -> None:
        for node in self.nodes.values():
            if node.child is not None:
                node.child.kill(node.child.descendants())
        if self.server is not None:
            self.server.kill(self.server.descendants())
        self.broker.stop()
        self.postgres.stop()


@contextlib.contextmanager
def site(host: str = "127.0.0.1", *flags: str, beat: str = "500ms") -> Iterator[Site]:
    """A fleet without nodes; everything ends with the block. ``flags`` go to `controlplane serve`."""
    # Not pytest's folder: the user that PostgreSQL runs as must be able to cross all parents.
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="slmfleet-site-", ignore_cleanup_errors=True)
        yield Site(Path(stack.enter_context(folder)), host, beat, stack, flags)


def _has_ended(child: Child) -> bool:
    return child.process.poll() is not None


def quietly(call: Callable[[], Any]) -> Any:
    """What ``call`` answers; None while it can't."""
    with contextlib.suppress(OSError, ValueError, UserError):
        return call()
    return None
