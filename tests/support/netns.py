"""Network namespaces that hang on a bridge of this machine, and can be cut off without a word. Root only.

Each member is a namespace with one veth pair whose outer end is a port of the bridge. ``cut`` takes the port off the
bridge: the carrier stays up on both sides and nothing is answered, as when a radio link fades; no packet and no error
tells anybody. Neighbours are entered for good, or the node's own kernel would soon know that nobody is there (ARP,
RFC 826) and refuse connections at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
Value = TypeVar("Value")


class Member:
    """One namespace on the bridge."""

    def __init__(self, network: Network, name: str, port: str, address: str) -> None:
        self.name = name
        self.address = address
        self.is_cut = False
        self._network = network
        self._port = port

    def argv(self, *command: str | Path) -> list[str]:
        """The command line that runs ``command`` in here; its process id is that of the command."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *(str(part) for part in command)]

    def cut(self) -> None:
        """From now on every packet in either direction is lost."""
        _ip("link", "set", "dev", self._port, "nomaster")
        self.is_cut = True

    def mend(self) -> None:
        """Packets travel again."""
        _ip("link", "set", "dev", self._port, "master", self._network.bridge)
        self.is_cut = False

    def call(self, function: Callable[[], Value]) -> Value:
        """Call ``function`` in here: sockets that it opens belong to this namespace. In a thread of its own, because
        a thread that has entered a namespace stays there."""
        outcome: list[Value] = []
        failure: list[BaseException] = []

        def enter() -> None:
            try:
                with open(f"/run/netns/{self.name}", "rb") as handle:
                    if _libc.setns(handle.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.name}")
                outcome.append(function())
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                failure.append(error)

        thread = threading.Thread(target=enter, name=f"in {self.name}", daemon=True)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]


class Network:
    """The bridge and its members. ``address`` is this machine's own on it."""

    def __init__(self, bridge: str, prefix: str) -> None:
        self.bridge = bridge
        self.address = f"{prefix}.1"
        self._prefix = prefix
        self._members: list[Member] = []

    def join(self) -> Member:
        """A new namespace, connected."""
        number = len(self._members) + 2
        name, port = f"{self.bridge}n{number}", f"{self.bridge}p{number}"
        member = Member(self, name, port, f"{self._prefix}.{number}")
        _ip("netns", "add", name)
        self._members.append(member)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", name, "addr", "add", f"{member.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", "dev", device, "up")
        _ip("link", "set", "dev", port, "master", self.bridge, "up")
        self._introduce(member)
        return member

    def _introduce(self, member: Member) -> None:
        inside = _ip("-n", member.name, "-br", "link", "show", "dev", "eth0").split()[2]
        here = _ip("-br", "link", "show", "dev", self.bridge).split()[2]
        _ip("neigh", "replace", member.address, "lladdr", inside, "dev", self.bridge, "nud", "permanent")
        _ip("-n", member.name, "neigh", "replace", self.address, "lladdr", here, "dev", "eth0", "nud", "permanent")

    def remove(self) -> None:
        """Take everything down; what is gone already is no error."""
        for member in self._members:
            with contextlib.suppress(AssertionError):
                _ip("netns", "del", member.name)
        with contextlib.suppress(AssertionError):
            _ip("link", "del", self.bridge)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A bridge with a free 10.x.y.0/24 of its own, gone with the block. ``why_not()`` must be ""."""
    token = secrets.token_hex(2)
    made = Network(f"sfb{token}", f"10.{200 + int(token[:2], 16) % 50}.{int(token[2:], 16)}")
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        # A fixed address: that of a bridge otherwise changes with its ports.
        _ip("link", "set", "dev", made.bridge, "address", f"02:5f:00:00:{token[:2]}:{token[2:]}", "up")
        _ip("addr", "add", f"{made.address}/24", "dev", made.bridge)
        yield made
    finally:
        made.remove()


@cache
def why_not() -> str:
    """Why namespaces can't be used here, as a sentence; "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("nsenter"):
        return "network namespaces need the programs ip (iproute2) and nsenter (util-linux)"
    try:
        with network() as probe:
            probe.join()
    except AssertionError as error:
        return f"no network namespaces here: {error}"
    return ""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
