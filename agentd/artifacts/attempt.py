"""One attempt at a file: how it ends, and how it is stopped from another thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fetched:
    """The partial file is complete, checked and on disk."""

    resumed_from: int


class FetchFailed(Exception):
    """``reason`` is CamelCase for programs; the text is a sentence. The partial file stays when it can be resumed."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Cancelled(Exception):
    """The caller set the stop event."""


class Stop:
    """Ends a download from another thread, also one that waits for the network."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._socket: socket.socket | None = None

    def set(self) -> None:
        """Stop now."""
        self._event.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # The plain method: that of SSLSocket would take the TLS object away under the reading thread.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def is_set(self) -> bool:
        """Whether the download must end."""
        return self._event.is_set()

    def watch(self, connection: socket.socket) -> None:
        """``connection`` is what the download waits for from now on."""
        self._socket = connection
