"""A small node that speaks the real protocol over real mutual TLS, and a control plane's node services to speak with.

``NodeApiRig`` runs ``NodeApi`` on free ports against a migrated database. ``FakeNode`` enrols, opens sessions and
relays; what it answers to relayed requests is a handler that the test gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import tables
from controlplane.db.engine import Hints, make_engine
from controlplane.node_api import tokens
from controlplane.node_api.pki import Pki
from controlplane.node_api.server import Addresses, BoundPorts, NodeApi
from controlplane.node_api.session import SessionPolicy
from slmfleet.v1 import enrollment_pb2, enrollment_pb2_grpc, relay_pb2, relay_pb2_grpc, session_pb2, session_pb2_grpc

TIMELINE = "t1"
WAIT_S = 10.0
WINDOW = 64 * 1024


def make_csr(key: ec.EllipticCurvePrivateKey, name: str = "whatever") -> bytes:
    """PKCS#10, DER."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.DER)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that sends no event of its own: what a server does after its last byte."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class NodeApiRig:
    """The node services of a control plane, running."""

    def __init__(self, engine: AsyncEngine, pki: Pki, hints: Hints, policy: SessionPolicy) -> None:
        self.engine = engine
        self.pki = pki
        self.hints = hints
        self.policy = policy
        self.api = self.new_api("replica-1")

    def new_api(self, replica_id: str) -> NodeApi:
        """Another replica on the same database and authority."""
        return NodeApi(
            self.engine,
            self.hints,
            self.pki,
            replica_id,
            addresses=Addresses([("127.0.0.1", 0)], [("127.0.0.1", 0)]),
            endpoints=_endpoints,
            mqtt=lambda node_id, password: session_pb2.MqttEndpoint(
                host="127.0.0.1", port=1883, username=node_id, password=password
            ),
            policy=self.policy,
        )

    @property
    def ports(self) -> BoundPorts:
        """Where it listens."""
        assert self.api.ports is not None
        return self.api.ports

    async def token(self, *, uses: int = 1, ttl_s: float = 3600, labels: Mapping[str, str] | None = None) -> str:
        """A new enrolment token, as REST makes it."""
        token = tokens.new(self.pki.ca_fingerprint)
        async with self.engine.begin() as connection:
            await connection.execute(
                sa.insert(tables.enrollment_tokens).values(
                    id=token.id,
                    secret_sha256=tokens.hash_secret(token.secret),
                    labels=dict(labels or {}),
                    uses_left=uses,
                    expires_at=datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ttl_s),
                )
            )
        return str(token)

    async def enrolled(self, name: str) -> FakeNode:
        """A node that has just enrolled."""
        node = FakeNode(name, self.pki.ca_pem, self.ports)
        await node.enrol(await self.token())
        return node

    async def rows(self, query: str, **arguments: Any) -> list[sa.Row[Any]]:
        """What a query answers now."""
        async with self.engine.connect() as connection:
            return list(await connection.execute(sa.text(query), arguments))

    async def until(self, query: str, expected: list[tuple[Any, ...]], **arguments: Any) -> None:
        """Wait until the query answers ``expected``, asking again on each hint and a few times a second."""
        changed = asyncio.Event()
        self.hints.subscribe(lambda _topic: changed.set())
        found: list[Any] = []
        try:
            async with asyncio.timeout(WAIT_S):
                while (found := [tuple(row) for row in await self.rows(query, **arguments)]) != expected:
                    changed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), 0.2)
        except TimeoutError:
            raise AssertionError(f"{query}: {found} is not {expected}") from None

    async def execute(self, statement: str, **arguments: Any) -> None:
        """Run a statement in a transaction of its own."""
        async with self.engine.begin() as connection:
            await connection.execute(sa.text(statement), arguments)

    async def set_desired(self, node_id: str, generation: int, document: bytes, timeline: str = TIMELINE) -> None:
        """Write a desired state and send the hint, as the controllers do."""
        await self.execute(
            """INSERT INTO desired_states (node_id, timeline, generation, sha256, document)
               VALUES (:id, :timeline, :generation, :sha, :document)
               ON CONFLICT (node_id) DO UPDATE SET timeline = excluded.timeline, generation = excluded.generation,
                 sha256 = excluded.sha256, document = excluded.document""",
            id=node_id,
            timeline=timeline,
            generation=generation,
            sha=hashlib.sha256(document).digest(),
            document=document,
        )
        await self.execute("SELECT pg_notify('slmfleet', :topic)", topic=f"node:{node_id}")


def _endpoints(ports: BoundPorts) -> enrollment_pb2.Endpoints:
    return enrollment_pb2.Endpoints(
        node_api=f"127.0.0.1:{ports.node_api}",
        enrollment=f"127.0.0.1:{ports.enrollment}",
        artifacts="https://127.0.0.1:1",
    )


@contextlib.asynccontextmanager
async def node_api(url: str, folder: Path, policy: SessionPolicy | None = None) -> AsyncIterator[NodeApiRig]:
    """A running rig on the database ``url``, its certificates in ``folder``."""
    engine = make_engine(url)
    try:
        hints = Hints(engine)
        rig = NodeApiRig(engine, Pki.open(folder / "pki"), hints, policy or SessionPolicy())
        await rig.api.start()
        listening = asyncio.Event()
        hints.subscribe(lambda _topic: listening.set())
        tasks = [
            asyncio.create_task(hints.run(), name="hints"),
            asyncio.create_task(rig.api.run(), name="node-api"),
        ]
        try:
            await asyncio.wait_for(listening.wait(), WAIT_S)
            yield rig
        finally:
            for task in reversed(tasks):
                task.cancel()
                await asyncio.wait([task])
    finally:
        await engine.dispose()


class FakeNode:
    """A node with an identity of its own."""

    def __init__(self, name: str, ca_pem: bytes, ports: BoundPorts) -> None:
        self.name = name
        self.ca_pem = ca_pem
        self.ports = ports
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.id = ""
        self.chain = b""

    def enrollment_channel(self) -> grpc.aio.Channel:
        """To the enrolment port, trusting the authority alone."""
        tls = grpc.ssl_channel_credentials(self.ca_pem)
        return grpc.aio.secure_channel(f"127.0.0.1:{self.ports.enrollment}", tls)

    async def enrol(self, token: str, **fields: Any) -> enrollment_pb2.EnrollResponse:
        """Trade the token for a certificate, and keep that."""
        request = enrollment_pb2.EnrollRequest(
            **{"token": token, "csr": make_csr(self.key), "name": self.name, **fields},
        )
        async with self.enrollment_channel() as channel:
            response = await enrollment_pb2_grpc.EnrollmentStub(channel).Enroll(request, timeout=WAIT_S)
        self.id, self.chain = response.node_id, response.certificate_chain.encode()
        return response

    async def renew(self, **changes: Any) -> enrollment_pb2.EnrollResponse:
        """Renew with a new key; ``changes`` replace fields of the request, after it was signed."""
        new_key = ec.generate_private_key(ec.SECP256R1())
        csr = make_csr(new_key)
        async with self.enrollment_channel() as channel:
            stub = enrollment_pb2_grpc.EnrollmentStub(channel)
            challenge = await stub.Challenge(enrollment_pb2.ChallengeRequest(node_id=self.id), timeout=WAIT_S)
            request = enrollment_pb2.RenewRequest(
                node_id=self.id,
                certificate=self.chain.decode(),
                csr=csr,
                nonce=challenge.nonce,
                signature=self.key.sign(challenge.nonce + csr, ec.ECDSA(hashes.SHA256())),
            )
            for name, value in changes.items():
                setattr(request, name, value)
            response = await stub.Renew(request, timeout=WAIT_S)
        self.key, self.chain = new_key, response.certificate_chain.encode()
        return response

    def channel(self) -> grpc.aio.Channel:
        """To the node port, with the node's certificate (or none, before it enrolled)."""
        mine = (key_pem(self.key), self.chain) if self.chain else (None, None)
        tls = grpc.ssl_channel_credentials(self.ca_pem, *mine)
        # A connection of its own, as each node has: channels to one address share one otherwise.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.ports.node_api}", tls, options=options)

    @contextlib.asynccontextmanager
    async def session(self, **hello: Any) -> AsyncIterator[FakeSession]:
        """An open session: Hello sent, Welcome received."""
        async with self.channel() as channel:
            session = FakeSession(session_pb2_grpc.NodeSessionStub(channel).Connect())
            await session.send(hello=session_pb2.Hello(boot_id="boot-1", agentd_version="0.1.0", **hello))
            session.welcome = await session.expect("welcome")
            try:
                yield session
            finally:
                session.call.cancel()

    @contextlib.asynccontextmanager
    async def relay(self, handler: Handler) -> AsyncIterator[FakeRelay]:
        """An open relay that answers with ``handler``. ``kill`` on it drops the connection at once."""
        channel = self.channel()
        relay = FakeRelay(relay_pb2_grpc.RelayStub(channel).Serve(), channel, handler)
        await asyncio.wait_for(relay.call.initial_metadata(), WAIT_S)
        if relay.call.done():
            await channel.close(None)
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(await relay.call.code(), empty, empty, await relay.call.details())
        async with asyncio.TaskGroup() as group:
            task = group.create_task(relay.run(group), name=f"{self.name}-relay")
            try:
                yield relay
            finally:
                task.cancel()
                for exchange in list(relay.exchanges.values()):
                    exchange.stop()
                await channel.close(None)


class FakeSession:
    """The node's end of a session."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome = session_pb2.Welcome()

    async def send(self, **message: Any) -> None:
        """One Up."""
        await self.call.write(session_pb2.Up(**message))

    async def read(self) -> session_pb2.Down | None:
        """The next Down; None at the end of the stream."""
        try:
            message = await asyncio.wait_for(self.call.read(), WAIT_S)
        except grpc.aio.AioRpcError:
            return None
        return None if message is grpc.aio.EOF else message

    async def expect(self, kind: str) -> Any:
        """The next Down, which must be of this kind."""
        message = await self.read()
        assert message is not None, f"the stream ended instead of {kind}: {await self.status()}"
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ended."""
        code = await asyncio.wait_for(self.call.code(), WAIT_S)
        return code, await self.call.details()

    async def apply(self, state: Any) -> None:
        """Say that a desired state was stored."""
        applied = session_pb2.Applied(timeline=state.timeline, generation=state.generation, sha256=state.sha256)
        await self.send(applied=applied)


Handler = Callable[["NodeExchange"], Awaitable[None]]


class FakeRelay:
    """The node's end of a relay stream."""

    def __init__(self, call: Any, channel: grpc.aio.Channel, handler: Handler) -> None:
        self.call = call
        self.exchanges: dict[int, NodeExchange] = {}
        # One item for each Reset that came.
        self.resets: asyncio.Queue[str] = asyncio.Queue()
        self.served = 0
        self._arrival = asyncio.Event()
        self._channel = channel
        self._handler = handler
        self._writing = asyncio.Lock()

    async def send(self, **frame: Any) -> None:
        """One frame."""
        async with self._writing:
            await self.call.write(relay_pb2.Frame(**frame))

    async def has_served(self, count: int) -> None:
        """Wait until ``count`` requests have arrived."""
        async with asyncio.timeout(WAIT_S):
            while self.served < count:
                self._arrival.clear()
                await self._arrival.wait()

    async def kill(self) -> None:
        """Drop the connection without a word, as a process that dies does."""
        self.call.cancel()
        await self._channel.close(None)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Read frames until the stream ends."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (frame := await self.call.read()) is not grpc.aio.EOF:
                self._take(frame, group)

    def _take(self, frame: relay_pb2.Frame, group: asyncio.TaskGroup) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "open":
            self.served += 1
            self._arrival.set()
            exchange = self.exchanges[frame.request_id] = NodeExchange(self, frame.request_id, frame.open)
            exchange.task = group.create_task(self._serve(exchange))
        elif exchange := self.exchanges.get(frame.request_id):
            if kind == "data":
                exchange.body.put_nowait(frame.data.body)
            elif kind == "end":
                exchange.body.put_nowait(None)
            elif kind == "window":
                exchange.grant(frame.window.bytes)
            elif kind == "reset":
                self.resets.put_nowait(frame.reset.code)
                exchange.stop()

    async def _serve(self, exchange: NodeExchange) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                await self._handler(exchange)
        finally:
            self.exchanges.pop(exchange.id, None)


class NodeExchange:
    """One relayed request, from the node's side."""

    def __init__(self, relay: FakeRelay, request_id: int, opening: relay_pb2.Open) -> None:
        self.id = request_id
        self.opening = opening
        self.body: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self._relay = relay
        self._credit = WINDOW
        self._granted = asyncio.Event()

    def stop(self) -> None:
        """The server gave it up."""
        if self.task is not None:
            self.task.cancel()

    def grant(self, size: int) -> None:
        """More may be sent."""
        self._credit += size
        self._granted.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The request's body, giving window back as it is consumed."""
        while (chunk := await self.body.get()) is not None:
            yield chunk
            await self._relay.send(request_id=self.id, window=relay_pb2.WindowUpdate(bytes=len(chunk)))

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def head(self, status: int = 200, **headers: str) -> None:
        """Status and headers; ``_`` in a name stands for ``-``."""
        lines = [relay_pb2.Header(name=name.replace("_", "-"), value=value) for name, value in headers.items()]
        await self._relay.send(request_id=self.id, head=relay_pb2.Head(status=status, headers=lines))

    async def data(self, body: bytes) -> None:
        """A piece of the answer, within the window."""
        view = memoryview(body)
        while view:
            while self._credit <= 0:
                self._granted.clear()
                await self._granted.wait()
            size = min(len(view), self._credit, 16 * 1024)
            self._credit -= size
            await self._relay.send(request_id=self.id, data=relay_pb2.Data(body=bytes(view[:size])))
            view = view[size:]

    async def end(self) -> None:
        """The answer is complete."""
        await self._relay.send(request_id=self.id, end=relay_pb2.End())

    async def reset(self, code: str, message: str) -> None:
        """Give the exchange up."""
        await self._relay.send(request_id=self.id, reset=relay_pb2.Reset(code=code, message=message))

    async def answer(self, status: int, body: bytes, **headers: str) -> None:
        """Head, body and end."""
        await self.head(status, **headers)
        await self.data(body)
        await self.end()
