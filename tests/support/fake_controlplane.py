"""The control plane as a node sees it, scripted: real gRPC over real mutual TLS, a real HTTPS file server with Range.

Nothing is placed or stored; tests say what a node is told and read what it said.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import secrets
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agentd.identity.enroll import enroll
from agentd.identity.files import Identity
from agentd.identity.pinning import parse_token
from controlplane.node_api.pki import Pki
from slmfleet.v1 import (
    enrollment_pb2,
    enrollment_pb2_grpc,
    relay_pb2,
    relay_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    state_pb2,
)

WAIT_S = 15.0
WINDOW = 64 * 1024


def desired_state(
    document: state_pb2.NodeDocument, generation: int, timeline: str = "t1", features: tuple[str, ...] = ()
) -> state_pb2.DesiredState:
    """The document, wrapped and hashed."""
    data = document.SerializeToString(deterministic=True)
    return state_pb2.DesiredState(
        timeline=timeline,
        generation=generation,
        sha256=hashlib.sha256(data).digest(),
        document=data,
        required_features=features,
    )


class Log:
    """Things that happened, in order; ``wait`` for one that fits."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._news = asyncio.Condition()

    async def add(self, item: Any) -> None:
        async with self._news:
            self.items.append(item)
            self._news.notify_all()

    async def wait(self, fits: Callable[[Any], bool], after: int = 0, timeout_s: float = WAIT_S) -> Any:
        """The first item from ``after`` on that fits, past or future."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                while True:
                    for item in self.items[after:]:
                        if fits(item):
                            return item
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"nothing fitted within {timeout_s} s; there was: {self.items[after:]}") from None


@dataclass
class Connection:
    """One session of one node."""

    node_id: str
    epoch: int
    hello: session_pb2.Hello
    down: asyncio.Queue[session_pb2.Down | None]
    up: Log = field(default_factory=Log)

    def send(self, **message: Any) -> None:
        self.down.put_nowait(session_pb2.Down(**message))

    def close(self) -> None:
        self.down.put_nowait(None)

    async def applied(self, generation: int) -> session_pb2.Applied:
        found = await self.up.wait(lambda up: up.WhichOneof("message") == "applied" and
                                   up.applied.generation == generation)  # fmt: skip
        return found.applied

    async def condition(self, assignment: str, kind: str, timeout_s: float = WAIT_S, **wanted: Any) -> Any:
        """Wait until an assignment reports a condition with these fields; its status."""

        def fits(up: session_pb2.Up) -> bool:
            return up.WhichOneof("message") == "statuses" and _find(up.statuses.statuses, assignment, kind, wanted)

        up = await self.up.wait(fits, timeout_s=timeout_s)
        return next(status for status in up.statuses.statuses if status.id == assignment)


def _find(statuses: Any, assignment: str, kind: str, wanted: dict[str, Any]) -> bool:
    return any(
        condition.type == kind and all(getattr(condition, name) == value for name, value in wanted.items())
        for status in statuses
        if status.id == assignment
        for condition in status.conditions
    )


class RelayLink:
    """The gateway's end of a node's relay stream."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.down: asyncio.Queue[relay_pb2.Frame | None] = asyncio.Queue()
        self.frames: dict[int, asyncio.Queue[relay_pb2.Frame]] = {}
        self._next = 0

    def open(self, method: str, path: str, headers: dict[str, str] | None = None, timeout_s: float = 30.0) -> int:
        self._next += 1
        self.frames[self._next] = asyncio.Queue()
        opened = relay_pb2.Open(
            method=method,
            path=path,
            headers=[relay_pb2.Header(name=name, value=value) for name, value in (headers or {}).items()],
            timeout_s=timeout_s,
        )
        self.send(self._next, open=opened)
        return self._next

    def send(self, request_id: int, **frame: Any) -> None:
        self.down.put_nowait(relay_pb2.Frame(request_id=request_id, **frame))

    async def next(self, request_id: int) -> relay_pb2.Frame:
        async with asyncio.timeout(WAIT_S):
            return await self.frames[request_id].get()

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """A whole exchange: (status, body). Grants the window as it reads."""
        request_id = self.open(method, path, {name.replace("_", "-"): value for name, value in headers.items()})
        if body:
            self.send(request_id, data=relay_pb2.Data(body=body))
        self.send(request_id, end=relay_pb2.End())
        status, answer = 0, b""
        while True:
            frame = await self.next(request_id)
            match frame.WhichOneof("frame"):
                case "head":
                    status = frame.head.status
                case "data":
                    answer += frame.data.body
                    self.send(request_id, window=relay_pb2.WindowUpdate(bytes=len(frame.data.body)))
                case "end":
                    return status, answer
                case "reset":
                    raise AssertionError(f"reset: {frame.reset.code} {frame.reset.message}")


class FakeControlPlane:
    """``async with FakeControlPlane(folder) as plane``."""

    def __init__(self, folder: Path, *, beat_s: float = 0.2, ttl_s: float = 1.5) -> None:
        self.pki = Pki.open(folder / "pki")
        self.beat_s, self.ttl_s = beat_s, ttl_s
        self.tokens: dict[str, int] = {}
        self.enrolled: list[enrollment_pb2.EnrollRequest] = []
        self.certificate_days = 30.0
        self.connections = Log()
        self.relays = Log()
        self.mqtt: session_pb2.MqttEndpoint | None = None
        # Answers Hello in place of Welcome, while set.
        self.instead_of_welcome: session_pb2.Down | None = None
        # Sent right after each Welcome.
        self.desired: state_pb2.DesiredState | None = None
        self.answer_pings = True
        self.blobs: dict[str, bytes] = {}
        self.files = FileServer(self.pki, self.blobs)
        self._epoch = 0
        self._nonces: set[bytes] = set()
        self._servers: list[grpc.aio.Server] = []
        self.ports: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self.files.start()
        await self.start_servers()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_servers()
        self.files.stop()

    async def start_servers(self) -> None:
        """Listen; on the same ports as before, when there was a before."""
        pair = [(self.pki.server_key_pem, self.pki.server_chain_pem)]
        for name, credentials in (
            ("enrollment", grpc.ssl_server_credentials(pair)),
            ("node_api", grpc.ssl_server_credentials(pair, self.pki.ca_pem, require_client_auth=True)),
        ):
            server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
            if name == "enrollment":
                enrollment_pb2_grpc.add_EnrollmentServicer_to_server(_Enrollment(self), server)
            else:
                session_pb2_grpc.add_NodeSessionServicer_to_server(_Sessions(self), server)
                relay_pb2_grpc.add_RelayServicer_to_server(_Relays(self), server)
            self.ports[name] = server.add_secure_port(f"127.0.0.1:{self.ports.get(name, 0)}", credentials)
            await server.start()
            self._servers.append(server)

    async def stop_servers(self) -> None:
        await asyncio.gather(*(server.stop(0) for server in self._servers))
        self._servers.clear()

    @property
    def endpoints(self) -> enrollment_pb2.Endpoints:
        return enrollment_pb2.Endpoints(
            node_api=f"127.0.0.1:{self.ports['node_api']}",
            enrollment=f"127.0.0.1:{self.ports['enrollment']}",
            artifacts=f"https://127.0.0.1:{self.files.port}",
        )

    def new_token(self, uses: int = 1) -> str:
        token = f"slmfleet1.{secrets.token_hex(4)}.{secrets.token_urlsafe(24)}.{self.pki.ca_fingerprint}"
        self.tokens[token] = uses
        return token

    async def enrol(self, state: Path, name: str = "n1") -> Identity:
        """Enrol a node as `agentd enroll` does."""
        token = parse_token(self.new_token())
        facts = state_pb2.Inventory(hostname="h", formats=["gguf"])
        return await asyncio.to_thread(enroll, state, self.endpoints.enrollment, token, name, {"site": "lyon"}, facts)

    def add_blob(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return sha256

    async def connection(self, number: int = 1) -> Connection:
        """The ``number``-th session (from 1 on)."""
        await self.connections.wait(lambda _: len(self.connections.items) >= number)
        return self.connections.items[number - 1]

    async def relay(self, number: int = 1) -> RelayLink:
        await self.relays.wait(lambda _: len(self.relays.items) >= number)
        return self.relays.items[number - 1]

    def certificate(self, csr: bytes, node_id: str) -> enrollment_pb2.EnrollResponse:
        signed = self.pki.sign_node_csr(csr, node_id, days=self.certificate_days)
        answer = enrollment_pb2.EnrollResponse(
            node_id=node_id,
            name=node_id.removeprefix("id-"),
            certificate_chain=signed.chain_pem,
            trusted_ca=self.pki.ca_pem.decode(),
            endpoints=self.endpoints,
        )
        answer.not_after.FromDatetime(signed.not_after)
        return answer

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def new_nonce(self) -> bytes:
        nonce = secrets.token_bytes(32)
        self._nonces.add(nonce)
        return nonce

    def take_nonce(self, nonce: bytes) -> bool:
        try:
            self._nonces.remove(nonce)
        except KeyError:
            return False
        return True


class _Enrollment(enrollment_pb2_grpc.EnrollmentServicer):
    def __init__(self, plane: FakeControlPlane) -> None:
        self._plane = plane

    async def Enroll(self, request: Any, context: Any) -> Any:
        if self._plane.tokens.get(request.token, 0) < 1:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "token has been used: make a new one")
        self._plane.tokens[request.token] -= 1
        self._plane.enrolled.append(request)
        return self._plane.certificate(request.csr, f"id-{request.name}")

    async def Challenge(self, request: Any, context: Any) -> Any:
        return enrollment_pb2.ChallengeResponse(nonce=self._plane.new_nonce())

    async def Renew(self, request: Any, context: Any) -> Any:
        certificate = x509.load_pem_x509_certificate(request.certificate.encode())
        if not self._plane.take_nonce(request.nonce):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown nonce")
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(request.signature, request.nonce + request.csr, ec.ECDSA(hashes.SHA256()))
        return self._plane.certificate(request.csr, request.node_id)


class _Sessions(session_pb2_grpc.NodeSessionServicer):
    def __init__(self, plane: FakeControlPlane) -> None:
        self._plane = plane

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        plane = self._plane
        node_id = context.auth_context()["x509_common_name"][0].decode()
        hello = (await context.read()).hello
        if plane.instead_of_welcome is not None:
            answer, plane.instead_of_welcome = plane.instead_of_welcome, None
            await context.write(answer)
            return
        connection = Connection(node_id, plane.next_epoch(), hello, asyncio.Queue())
        welcome = session_pb2.Welcome(
            session_epoch=connection.epoch, beat_s=plane.beat_s, ttl_s=plane.ttl_s, endpoints=plane.endpoints,
            mqtt=plane.mqtt,
        )  # fmt: skip
        connection.send(welcome=welcome)
        if plane.desired is not None:
            connection.send(desired_state=plane.desired)
        await plane.connections.add(connection)
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(connection, context))
            try:
                while (message := await connection.down.get()) is not None:
                    await context.write(message)
            finally:
                reader.cancel()

    async def _read(self, connection: Connection, context: Any) -> None:
        while (up := await context.read()) is not grpc.aio.EOF:
            await connection.up.add(up)
            if up.WhichOneof("message") == "ping" and self._plane.answer_pings:
                connection.send(pong=session_pb2.Pong(sequence=up.ping.sequence))
        connection.close()


class _Relays(relay_pb2_grpc.RelayServicer):
    def __init__(self, plane: FakeControlPlane) -> None:
        self._plane = plane

    async def Serve(self, request_iterator: Any, context: Any) -> None:
        link = RelayLink(context.auth_context()["x509_common_name"][0].decode())
        await self._plane.relays.add(link)
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(link, context))
            try:
                while (frame := await link.down.get()) is not None:
                    await context.write(frame)
            finally:
                reader.cancel()

    async def _read(self, link: RelayLink, context: Any) -> None:
        while (frame := await context.read()) is not grpc.aio.EOF:
            link.frames[frame.request_id].put_nowait(frame)
        link.down.put_nowait(None)


class FileServer:
    """``GET /artifacts/{sha256}`` over mutual TLS. Faults are set by the test."""

    def __init__(self, pki: Pki, blobs: dict[str, bytes]) -> None:
        self.requests: list[tuple[str, str | None]] = []
        # Close the connection after so many bytes of the next answers, one entry each.
        self.cut_after: list[int] = []
        # Digest -> what is sent in place of the right bytes.
        self.forged: dict[str, bytes] = {}
        self.ignore_range = False
        # Held while clear: answers stop in their middle.
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self, blobs)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.folder / "server.pem", pki.folder / "server.key")
        context.load_verify_locations(cadata=pki.ca_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.may_go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler, blobs: dict[str, bytes]) -> None:
        digest = request.path.removeprefix("/artifacts/")
        wanted = request.headers.get("Range")
        self.requests.append((digest, wanted))
        content = self.forged.get(digest, blobs.get(digest))
        if content is None:
            request.send_error(404)
            return
        start = 0 if self.ignore_range or wanted is None else int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(content) and start:
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        body = content[start:]
        cut = self.cut_after.pop(0) if self.cut_after else None
        half = len(body) // 2
        with contextlib.suppress(OSError):
            request.wfile.write(body[: half if cut is None else cut])
            request.wfile.flush()
            self.may_go_on.wait(WAIT_S)
            if cut is None:
                request.wfile.write(body[half:])
            else:
                request.connection.shutdown(2)
        request.close_connection = cut is not None


@contextlib.asynccontextmanager
async def running(work: Any, name: str) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine in the background of a test; an error in it fails the test."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(work, name=name)
        try:
            yield task
        finally:
            task.cancel()
