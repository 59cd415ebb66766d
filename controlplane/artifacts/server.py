"""Hands the artifact store's files to nodes: HTTPS with mutual TLS, ``GET`` and ``HEAD /artifacts/{sha256}``.

One range a request is honoured (RFC 9110, section 14), so that a download goes on where it broke off. Who asks is known
from the certificate of the connection alone: its common name is the node's id, and only nodes that are enrolled and
not revoked are served.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvicorn
from sqlalchemy.ext.asyncio import AsyncEngine
from uvicorn.protocols.http.h11_impl import H11Protocol

from controlplane.artifacts.ranges import Range, Unsatisfiable, parse_range
from controlplane.artifacts.store import CHUNK_BYTES, BlobStore
from controlplane.listening import Address, bind
from slmfleet import logs

log = logs.get(__name__)

_PATH = re.compile(r"/artifacts/([0-9a-f]{64})")
# How long a node that was revoked may go on fetching.
_TRUST_S = 5.0
_TRUST_ENTRIES = 20_000
_STOP_S = 2
Headers = dict[str, str]


class _PeerProtocol(H11Protocol):
    """Puts the peer's common name into the ASGI scope's ``state["peer"]``; "" when there is none."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "peer": _common_name(transport.get_extra_info("peercert") or {})}


def _common_name(certificate: Mapping[str, Any]) -> str:
    for names in certificate.get("subject", ()):
        for key, value in names:
            if key == "commonName":
                return str(value)
    return ""


class _Server(uvicorn.Server):
    """Signals belong to the program, not to one of its servers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ArtifactServer:
    """``port`` is known after ``bind``. ``cert``: PEM with the leaf first; ``ca``: the fleet's authority, PEM."""

    def __init__(
        self, store: BlobStore, engine: AsyncEngine, host: str, port: int, cert: Path, key: Path, ca: Path
    ) -> None:
        self._store = store
        self._engine = engine
        self._host = host
        self._port = port
        self._cert, self._key, self._ca = cert, key, ca
        self._socket: socket.socket | None = None
        self._trusted: dict[str, tuple[float, bool]] = {}

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

    def bind(self, address: Address | None = None) -> int:
        """Take the port, that of ``address`` if one is given; connections wait until ``run``. Raises UserError when it
        is taken."""
        self._socket = bind(address or (self._host, self._port), "artifacts_listen")
        self._host, self._port = self._socket.getsockname()[:2]
        return self._port

    async def run(self) -> None:
        """Serve until cancelled; transfers that run then get a moment to end."""
        if self._socket is None:
            self.bind()
        assert self._socket is not None
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            proxy_headers=False,
            http=_PeerProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=str(self._cert),
            ssl_keyfile=str(self._key),
            ssl_ca_certs=str(self._ca),
            ssl_cert_reqs=ssl.CERT_REQUIRED,
            timeout_graceful_shutdown=_STOP_S,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._socket]), name="artifact-server")
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            server.should_exit = True
            await serving
            raise

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        if not await self._trusts(scope["state"]["peer"]):
            return await _problem(send, 403, "this certificate belongs to no node of the fleet")
        if scope["method"] not in ("GET", "HEAD"):
            return await _problem(send, 405, "artifacts can be read, with GET or HEAD", {"allow": "GET, HEAD"})
        match = _PATH.fullmatch(scope["path"])
        if match is None:
            return await _problem(send, 404, "artifacts are at /artifacts/<sha256 in lower-case hex>")
        try:
            file = await asyncio.to_thread(self._store.path(match[1]).open, "rb")
        except FileNotFoundError:
            return await _problem(send, 404, f"there is no artifact {match[1]}")
        with file:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            await _send_file(file.fileno(), match[1], scope["method"], headers, receive, send)
        return None

    async def _trusts(self, node_id: str) -> bool:
        """Whether the node may fetch; remembered for a few seconds."""
        if not node_id:
            return False
        now = time.monotonic()
        until, trusted = self._trusted.get(node_id, (0.0, False))
        if until > now:
            return trusted
        async with self._engine.connect() as connection:
            found = await connection.scalar(
                sa.text("SELECT 1 FROM nodes WHERE id = :id AND revoked_at IS NULL"), {"id": node_id}
            )
        if len(self._trusted) >= _TRUST_ENTRIES:
            self._trusted.clear()
        self._trusted[node_id] = (now + _TRUST_S, found is not None)
        return found is not None


async def _send_file(
    descriptor: int, sha256: str, method: str, headers: Mapping[str, str], receive: Any, send: Any
) -> None:
    size = os.fstat(descriptor).st_size
    etag = f'"{sha256}"'
    common = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, immutable, max-age=31536000"}
    if headers.get("if-none-match") == etag:
        return await _start(send, 304, common)
    # A range counts only for the content that the client has begun to fetch; ours never changes.
    wanted = parse_range(headers.get("range"), size) if headers.get("if-range", etag) == etag else None
    if isinstance(wanted, Unsatisfiable):
        return await _problem(send, 416, f"the artifact has {size} bytes", {"content-range": f"bytes */{size}"})
    span = wanted or Range(0, size)
    common |= {"content-type": "application/octet-stream", "content-length": str(span.end - span.start)}
    if wanted:
        common["content-range"] = f"bytes {span.start}-{span.end - 1}/{size}"
    await _start(send, 206 if wanted else 200, common, more=method == "GET")
    if method == "GET":
        await _send_span(descriptor, span, receive, send)
    return None


async def _send_span(descriptor: int, span: Range, receive: Any, send: Any) -> None:
    """Read in threads, a piece at a time; ``send`` waits while the node is slower. Ends early when the node left."""
    async with asyncio.TaskGroup() as group:
        gone = group.create_task(_disconnected(receive), name="artifact-disconnect")
        position = span.start
        while position < span.end and not gone.done():
            count = min(CHUNK_BYTES, span.end - position)
            piece = await asyncio.to_thread(os.pread, descriptor, count, position)
            if not piece:
                break
            position += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if position == span.end:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        gone.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Any, status: int, headers: Headers, *, more: bool = False) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    if not more:
        await send({"type": "http.response.body", "body": b""})


async def _problem(send: Any, status: int, detail: str, headers: Headers | None = None) -> None:
    """RFC 9457."""
    body = json.dumps({"type": "about:blank", "status": status, "detail": detail}).encode()
    known = {"content-type": "application/problem+json", "content-length": str(len(body)), **(headers or {})}
    await _start(send, status, known, more=True)
    await send({"type": "http.response.body", "body": body})
