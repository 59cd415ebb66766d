"""systemd's notification protocol (sd_notify(3)) in plain sockets: a datagram of lines to ``$NOTIFY_SOCKET``."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells systemd how the service fares. Without ``NOTIFY_SOCKET`` every call does nothing."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        address = variables.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of Linux's abstract socket names.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # Seconds within which systemd wants a sign of life; None when it wants none of this process.
        self.watchdog_s = _watchdog_s(variables)

    def ready(self) -> None:
        """The service serves."""
        self._send("READY=1")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service began to stop."""
        self._send("STOPPING=1")

    def status(self, sentence: str, *, extend_s: float | None = None) -> None:
        """What ``systemctl status`` shows; ``extend_s`` asks for that much more time to start."""
        extend = "" if extend_s is None else f"\nEXTEND_TIMEOUT_USEC={int(extend_s * 1e6)}"
        self._send(f"STATUS={sentence}{extend}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.connect(self._address)
                channel.send(message.encode())
        except OSError:
            # The manager is gone or its socket is full: no reason for the service to fail.
            return


def _watchdog_s(variables: Mapping[str, str]) -> float | None:
    if variables.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    try:
        return int(variables["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
