"""One HTTP exchange with a server that is not trusted: bounded in time, in bytes and in where it may lead.

HTTP/1.1 by h11, over a plain socket: every wait is cut into short slices, between which the caller is asked whether
anybody still wants the answer. No redirects, no proxies, no cookies, no compression, one connection per exchange.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11

from agentd.models.backends.base import BackendFailure

# How often a waiting exchange looks around.
_SLICE_S = 0.2
_READ_BYTES = 65536
_MAX_HEADER_BYTES = 65536


class UpstreamError(BackendFailure):
    """The server did not do what an OpenAI-compatible server does; the message says what it did instead."""


class Unreachable(UpstreamError):
    """No connection, or none that lasted until the request was taken: nothing has run there."""


class Cancelled(Exception):
    """The caller wants the answer no more."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to connect. ``here``: only an address of this device will do, whatever the name resolves to."""

    host: str
    port: int
    tls: bool
    here: bool
    connect_s: float
    # Longest silence.
    stall_s: float

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Exchange:
    """A request and its answer. Use as a context manager; leaving it closes the connection, which cancels the work."""

    def __init__(self, server: Server, max_bytes: int, tick: Callable[[], bool] = lambda: False) -> None:
        self._server = server
        self._max_bytes = max_bytes
        # Called about five times a second while waiting; True cancels.
        self._tick = tick
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
        self._socket: socket.socket | None = None
        self.status = 0
        self.headers: Mapping[str, str] = {}

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        """Connect, send the request and read the status and headers. Raises Unreachable, UpstreamError, Cancelled."""
        self._socket = self._connect()
        fields = {"host": str(self._server), "connection": "close", "accept-encoding": "identity", **headers}
        fields["content-length"] = str(len(body))
        request = h11.Request(method=method, target=path, headers=list(fields.items()))
        data = self._http.send(request) or b""
        if body:
            data += self._http.send(h11.Data(body)) or b""
        self._http.send(h11.EndOfMessage())
        self._send_all(data)
        while True:
            event = self._next()
            if isinstance(event, h11.Response):
                break
            if not isinstance(event, h11.InformationalResponse):
                raise Unreachable(f"{self._server} closed the connection without an answer")
        self.status = event.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}

    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def parts(self, quiet: Callable[[], float] | None = None) -> Iterator[bytes]:
        """The body as it comes. Raises UpstreamError if it is cut, too large, or silent for too long.

        ``quiet``: seconds since the caller last found something useful in it; bytes alone are no sign of life then.
        """
        size = 0
        while True:
            event = self._next()
            if isinstance(event, h11.EndOfMessage):
                return
            if not isinstance(event, h11.Data):
                raise UpstreamError(f"{self._server} broke its answer off")
            size += len(event.data)
            if size > self._max_bytes:
                raise UpstreamError(f"{self._server} sent more than {self._max_bytes} bytes")
            yield bytes(event.data)
            if quiet is not None and quiet() > self._server.stall_s:
                raise UpstreamError(f"{self._server} sent nothing of use for {self._server.stall_s:g} s")
            if self._tick():
                raise Cancelled

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.parts())

    def _connect(self) -> socket.socket:
        server = self._server
        try:
            sock = socket.create_connection((server.host, server.port), server.connect_s)
        except OSError as error:
            raise Unreachable(f"cannot connect to {server}: {error.strerror or error}") from None
        try:
            if server.here and not ipaddress.ip_address(sock.getpeername()[0]).is_loopback:
                raise Unreachable(f"{server} is not on this device, though its name says so")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if server.tls:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=server.host)
        except OSError as error:
            sock.close()
            raise Unreachable(f"cannot make a secure connection to {server}: {error.strerror or error}") from None
        except Unreachable:
            sock.close()
            raise
        sock.settimeout(_SLICE_S)
        return sock

    def _send_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._patiently(partial(self._sock.send, rest)) :]

    def _next(self) -> Any:
        """The next h11 event that is not NEED_DATA."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise UpstreamError(f"{self._server} broke off, or does not speak HTTP: {error}") from None
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(self._patiently(partial(self._sock.recv, _READ_BYTES)))

    @property
    def _sock(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def _patiently(self, operation: Callable[[], Any]) -> Any:
        """Repeat an operation of the socket, slice by slice, until it is done, cancelled or silent for too long."""
        deadline = time.monotonic() + self._server.stall_s
        while True:
            try:
                return operation()
            except TimeoutError:
                if self._tick():
                    raise Cancelled from None
                if time.monotonic() >= deadline:
                    raise UpstreamError(f"{self._server} was silent for {self._server.stall_s:g} s") from None
            except OSError as error:
                raise UpstreamError(f"the connection to {self._server} broke: {error.strerror or error}") from None
