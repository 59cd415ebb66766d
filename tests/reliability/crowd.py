"""Many nodes in one process: real sessions over real mutual TLS, agentd's own back-off, no models and no disks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec

from agentd.identity.files import SERVER_NAME
from agentd.session.backoff import invited_delay_s, reconnect_delay_s
from controlplane.db import nodes
from controlplane.db.engine import make_engine
from controlplane.node_api.pki import Pki
from slmfleet.v1 import session_pb2 as pb
from slmfleet.v1 import session_pb2_grpc
from tests.reliability.site import Site
from tests.support.fake_node import key_pem, make_csr

_ROWS_AT_ONCE = 200
_WELCOME_S = 15.0


class Line:
    """The one link that all of them share: up or cut."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.up.set()

    def cut(self) -> None:
        """Every session breaks, every attempt fails."""
        self.up.clear()
        self.down.set()

    def mend(self) -> None:
        """From now on attempts succeed, if the server lets them."""
        self.down.clear()
        self.up.set()


class SimulatedNode:
    """A session and its returns."""

    def __init__(self, node_id: str, port: int, credentials: grpc.ChannelCredentials, line: Line) -> None:
        self.id = node_id
        self.connected = False
        self.attempts = 0
        self._address = f"127.0.0.1:{port}"
        self._credentials = credentials
        self._line = line

    async def run(self) -> None:
        """Keep connected until cancelled, as ``agentd.session.session.Session`` does."""
        failures = 0
        while True:
            self.attempts += 1
            invited_s: float | None = None
            try:
                if self._line.up.is_set():
                    invited_s = await self._session()
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
                pass
            failures = 1 if self.connected or invited_s is not None else failures + 1
            self.connected = False
            delay_s = reconnect_delay_s(failures, random.random())
            await asyncio.sleep(delay_s if invited_s is None else invited_delay_s(invited_s, random.random()))

    async def _session(self) -> float | None:
        """One session to its end; seconds to come back in, where the server said so."""
        options = (("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(self._address, self._credentials, options=options) as channel:
            call = session_pb2_grpc.NodeSessionStub(channel).Connect()
            cut = asyncio.create_task(self._line.down.wait(), name=f"cut {self.id}")
            talk = asyncio.create_task(self._greet(call), name=f"talk {self.id}")
            try:
                await asyncio.wait((cut, talk), return_when=asyncio.FIRST_COMPLETED)
                return talk.result() if talk.done() and not talk.cancelled() else None
            finally:
                call.cancel()
                cut.cancel()
                talk.cancel()
                await asyncio.gather(cut, talk, return_exceptions=True)

    async def _greet(self, call: grpc.aio.StreamStreamCall) -> float | None:
        async with asyncio.timeout(_WELCOME_S):
            await call.write(pb.Up(hello=pb.Hello(boot_id="boot", agentd_version="0.1.0")))
            first = await call.read()
        return await self._talk(call, first)

    async def _talk(self, call: grpc.aio.StreamStreamCall, message: pb.Down) -> float | None:
        beat_s = 5.0
        while message is not grpc.aio.EOF:
            match message.WhichOneof("message"):
                case "come_back_in":
                    return message.come_back_in.seconds
                case "welcome":
                    self.connected, beat_s = True, message.welcome.beat_s
                    await call.write(pb.Up(statuses=pb.StatusReport(complete=True)))
                    await call.write(pb.Up(ping=pb.Ping(sequence=1)))
                case "desired_state":
                    state = message.desired_state
                    applied = pb.Applied(timeline=state.timeline, generation=state.generation, sha256=state.sha256)
                    await call.write(pb.Up(applied=applied))
                case "pong":
                    await asyncio.sleep(beat_s)
                    await call.write(pb.Up(ping=pb.Ping(sequence=message.pong.sequence + 1)))
            message = await call.read()
        return None


async def _enrolled(site: Site, count: int) -> list[tuple[str, grpc.ChannelCredentials]]:
    """Nodes in the database with certificates, as enrolment leaves them. One key for all: it is no secret here."""
    pki = Pki.open(site.folder / "server" / "pki")
    key = ec.generate_private_key(ec.SECP256R1())
    csr, pem = make_csr(key), key_pem(key)
    engine = make_engine(site.postgres_url)
    made = []
    try:
        for start in range(0, count, _ROWS_AT_ONCE):
            async with engine.begin() as connection:
                for number in range(start, min(start + _ROWS_AT_ONCE, count)):
                    node_id = str(uuid.uuid4())
                    assert await nodes.create(
                        connection, nodes.NewNode(node_id, f"sim-{number}", {}, {}, "0.1.0", "no password")
                    )
                    signed = pki.sign_node_csr(csr, node_id)
                    await nodes.add_certificate(
                        connection, node_id, signed.fingerprint, signed.key_sha256, signed.not_after
                    )
                    credentials = grpc.ssl_channel_credentials(pki.ca_pem, pem, signed.chain_pem.encode())
                    made.append((node_id, credentials))
    finally:
        await engine.dispose()
    return made


@contextlib.asynccontextmanager
async def crowd(site: Site, count: int, line: Line) -> AsyncIterator[Sequence[SimulatedNode]]:
    """That many nodes, at work."""
    made = [
        SimulatedNode(node_id, site.ports["node"], credentials, line)
        for node_id, credentials in await _enrolled(site, count)
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(node.run(), name=f"simulated {node.id}") for node in made]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()


async def all_connected(made: Sequence[SimulatedNode], deadline_s: float) -> float:
    """Until every node has its Welcome; seconds that took."""
    began = time.monotonic()
    while missing := sum(not node.connected for node in made):
        if time.monotonic() - began > deadline_s:
            raise AssertionError(f"{missing} of {len(made)} nodes are not back after {deadline_s:g} s")
        await asyncio.sleep(0.1)
    return time.monotonic() - began
