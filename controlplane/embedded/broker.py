"""A real MQTT broker (rumqttd, MQTT 5) out of the `iotcore` wheel, for `controlplane dev`.

It listens on loopback alone: rumqttd as built there knows neither client certificates nor rights per topic. What it
knows is a fixed list of users, read when it starts, so a node that enrols later could not get a password without a
restart that cuts everybody off. Hence the list is made before the nodes are: ``SLOTS`` user names, each with a password
that is an HMAC of the name under a secret of this installation, and a node's id says which name is its own. Every node
knows its own password only; two nodes share one when their ids fall on the same slot (three nodes: once in 1,400
fleets).

Nothing is kept across a restart: presence is published anew by each node when it connects, and what a node reports
stays in its outbox until it is committed in Postgres.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from controlplane.embedded.children import spawn, stop
from controlplane.listening import Address, first_of
from slmfleet.errors import UserError

HOST = "127.0.0.1"
SLOTS = 4096
SERVER_NAME = "controlplane"
# Ports to try where any will do.
ATTEMPTS = 3
START_DEADLINE_S = 30.0
# A node's batches are far smaller; what is larger is cut off by the broker.
MAX_PAYLOAD_BYTES = 1 << 20
# rumqttd keeps the last messages of a subscription in memory: segments of this many bytes, ten of them.
SEGMENT_BYTES = 4 << 20


def user_name(node_id: str) -> str:
    """The broker's user of a node: one of ``SLOTS`` names, by a hash of its id."""
    slot = int.from_bytes(hashlib.sha256(node_id.encode()).digest()[:4], "big") % SLOTS
    return f"node-{slot:04d}"


def password(secret: bytes, name: str) -> str:
    """The password of a user: hex HMAC-SHA-256 of the name, 128 bits of it."""
    return hmac.new(secret, name.encode(), hashlib.sha256).hexdigest()[:32]


def users(secret: bytes) -> dict[str, str]:
    """Every user that the broker accepts, with the password."""
    names = [SERVER_NAME, *(f"node-{slot:04d}" for slot in range(SLOTS))]
    return {name: password(secret, name) for name in names}


def settings(port: int, accepted: Mapping[str, str]) -> str:
    """rumqttd's configuration (TOML): one MQTT 5 listener on loopback."""
    lines = [
        "id = 0",
        "[router]",
        "id = 0",
        "max_connections = 10010",
        "max_outgoing_packet_count = 200",
        f"max_segment_size = {SEGMENT_BYTES}",
        "max_segment_count = 10",
        "[v5.1]",
        'name = "v5"',
        f'listen = "{HOST}:{port}"',
        "next_connection_delay_ms = 1",
        "[v5.1.connections]",
        "connection_timeout_ms = 10000",
        f"max_payload_size = {MAX_PAYLOAD_BYTES}",
        "max_inflight_count = 100",
        "dynamic_filters = true",
        "[v5.1.connections.auth]",
        *(f'{name} = "{word}"' for name, word in accepted.items()),
    ]
    return "\n".join(lines) + "\n"


class EmbeddedBroker:
    """The broker as a child process, its secret in ``folder``. ``start`` and ``stop`` block; use the main thread."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._secret = b""

    @property
    def pid(self) -> int:
        """Process id of the broker."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def port(self) -> int:
        """TCP port on ``HOST``."""
        assert self._port, "start() comes first"
        return self._port

    def credentials_of_node(self, node_id: str) -> tuple[str, str]:
        """User name and password of a node."""
        name = user_name(node_id)
        return name, password(self._secret, name)

    def credentials_of_server(self) -> tuple[str, str]:
        """User name and password of the control plane itself."""
        return SERVER_NAME, password(self._secret, SERVER_NAME)

    def start(self) -> None:
        """Start on the given port, or any free one, and wait until connections are accepted.

        Raises UserError when the wheel is missing, the port is taken or the broker does not come up.
        """
        if importlib.util.find_spec("iotcore") is None:
            raise UserError("no embedded MQTT broker here: install it with pip install 'slmfleet[embedded]'")
        self._secret = _secret(self._folder)
        # The child binds for itself: what was free may be taken by then.
        ports = [self._port] if self._port else [_free_port() for _ in range(ATTEMPTS)]
        self._port = first_of([(HOST, port) for port in ports], self._start)

    def _start(self, address: Address) -> int:
        port = address[1]
        # -P: a folder named like a package in the working directory must not shadow it.
        argv = [sys.executable, "-P", "-m", "controlplane.embedded.broker"]
        with (self._folder / "broker.log").open("wb") as broker_log:
            self._process = spawn(argv, stdin=subprocess.PIPE, log=broker_log)
        assert self._process.stdin is not None
        # By pipe: no password in the process list, none in a file. The pipe's end tells the child to end.
        self._process.stdin.write(json.dumps({"port": port, "secret": self._secret.hex()}).encode() + b"\n")
        self._process.stdin.flush()
        try:
            self._wait_until_ready(port)
        except BaseException:
            self.stop()
            raise
        return port

    def alive(self) -> bool:
        """Whether the broker runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it; safe to call twice. It keeps nothing, so there is nothing to flush."""
        if self._process is None:
            return
        stop(self._process, [(signal.SIGTERM, 5.0)])
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process = None

    def _wait_until_ready(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_DEADLINE_S
        while not _listens(self._process.pid, port):
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            said = (self._folder / "broker.log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"the embedded MQTT broker did not start: {said[-1] if said else 'it said nothing'}")


def _secret(folder: Path) -> bytes:
    """The installation's secret for broker passwords, made at first use, mode 0600."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "secret"
    if not path.exists():
        fresh = path.with_name("secret.new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        fresh.rename(path)
    return bytes.fromhex(path.read_text())


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _listens(pid: int, port: int) -> bool:
    """Whether that very process does: on a port that somebody else has taken, somebody else accepts."""
    with contextlib.suppress(psutil.Error):
        return any(
            link.status == psutil.CONN_LISTEN and link.laddr.port == port
            for link in psutil.Process(pid).net_connections("tcp4")
        )
    return False


def _end_with_parent() -> None:
    """The other end of standard input closes when the parent ends, however it ends."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """The child: reads port and secret from standard input, serves until that closes or SIGTERM comes."""
    from iotcore import IotCoreBroker

    # rumqttd writes a line for every packet, through Python's logging and so through its lock.
    logging.disable(logging.CRITICAL)
    given = json.loads(sys.stdin.buffer.readline())
    with tempfile.NamedTemporaryFile("w", prefix="slmfleet-mqtt-", suffix=".toml") as file:
        file.write(settings(given["port"], users(bytes.fromhex(given["secret"]))))
        file.flush()
        broker = IotCoreBroker(config_path=file.name)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    broker.run_forever()


if __name__ == "__main__":
    main()
