"""NodeSession: the one stream that a node holds open.

Life of a session::

    Hello --> Welcome --> talk (both ways) --> end
      |
      +--> refused (no certificate, unknown or revoked node, no Hello in time)

The handler reads and writes the stream and nothing else: what it hears goes to the ``Recorder``, what it has to say
comes through ``Session.send`` from the ``Distributor`` and the telemetry ingester.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import nodes, sessions
from controlplane.node_api import messages
from controlplane.node_api.history import Version
from controlplane.node_api.identity import peer_node_id, refuse
from controlplane.node_api.links import NodeLinks
from controlplane.node_api.recorder import Recorder
from slmfleet import logs
from slmfleet.v1 import enrollment_pb2, session_pb2, session_pb2_grpc, state_pb2

log = logs.get(__name__)

# Messages that wait to be sent to one node. One that lets so many pile up does not read.
_MAX_OUTBOUND = 512
# How long a session that ends may take to send its last words.
_LAST_WORDS_S = 1.0
# Sessions that may open at once (each needs a connection to Postgres), and how many may wait for that.
_OPENING = 8
_OPENING_WAITING = 400

_LOST = "the connection closed"
GONE = "this node was removed from the fleet: enrol it again with a new token"


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """Times that nodes are told, and limits. Seconds."""

    beat_s: float = 5.0
    ttl_s: float = 15.0
    hello_timeout_s: float = 10.0


class Session:
    """One open session, as the rest of the process sees it. Owned by its handler."""

    def __init__(self, node_id: str, name: str, epoch: int, held: Version, now: float) -> None:
        self.node_id = node_id
        self.name = name
        self.epoch = epoch
        # The newest desired state that the node says it stores.
        self.held = held
        # The newest one that it was sent, or told to hold at: not said twice.
        self.told: Version | None = None
        self.delivered: set[str] = set()
        # Loop time of the last word from the node, and what it said of its work.
        self.heard_at = now
        self.in_flight = 0
        # What controllers were last told of each assignment.
        self.flags: dict[str, tuple[object, ...]] = {}
        # All assignments that the node last said it has; None before it did.
        self.inventory: set[str] | None = None
        self.ended = asyncio.Event()
        self.reason = ""
        self.denied = False
        # Ended because this process stops: that is no fact about the node, and its row stays as it is.
        self.stopped = False
        self.outbound: asyncio.Queue[session_pb2.Down | None] = asyncio.Queue(_MAX_OUTBOUND + 2)

    def send(self, message: session_pb2.Down) -> bool:
        """Queue a message; False when the session is over. A node that does not read loses its session."""
        if self.ended.is_set():
            return False
        if self.outbound.qsize() >= _MAX_OUTBOUND:
            self.end("the node does not read its session")
            return False
        self.outbound.put_nowait(message)
        return True

    def end(self, reason: str, *, denied: bool = False, come_back_s: float | None = None) -> None:
        """Close the stream after what is queued. Ending twice does nothing.

        ``denied``: with PERMISSION_DENIED. ``come_back_s``: this process stops; the node is told to connect again after
        about so long.
        """
        if self.ended.is_set():
            return
        if come_back_s is not None:
            back = session_pb2.ComeBackIn(seconds=come_back_s * (0.5 + random.random()), reason=reason)
            self.outbound.put_nowait(session_pb2.Down(come_back_in=back))
            self.stopped = True
        self.outbound.put_nowait(None)
        self.reason = reason
        self.denied = denied
        self.ended.set()


class SessionService(session_pb2_grpc.NodeSessionServicer):
    """The gRPC handler of sessions."""

    def __init__(
        self,
        engine: AsyncEngine,
        links: NodeLinks,
        recorder: Recorder,
        replica_id: str,
        policy: SessionPolicy,
        endpoints: Callable[[], enrollment_pb2.Endpoints],
        mqtt: Callable[[str, str], session_pb2.MqttEndpoint | None],
        opened: Callable[[str], None],
    ) -> None:
        """``endpoints()`` and ``mqtt(node_id, password)`` are what a node is told; ``opened(node_id)`` is called for
        each session that begins, so that its desired state is brought to it."""
        self._engine = engine
        self._links = links
        self._recorder = recorder
        self._replica_id = replica_id
        self._policy = policy
        self._endpoints = endpoints
        self._mqtt = mqtt
        self._opened = opened
        self._places = asyncio.Semaphore(_OPENING)
        self._waiting = 0

    async def Connect(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one session from its Hello to its end."""
        node_id = peer_node_id(context)
        if node_id is None:
            await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "a session needs the node's client certificate")
        hello = await self._hello(context)
        if self._waiting >= _OPENING_WAITING:
            # A whole fleet returns at once: spread it instead of letting everybody wait for a connection.
            back = session_pb2.ComeBackIn(seconds=self._policy.beat_s * random.random(), reason="too many at once")
            await context.write(session_pb2.Down(come_back_in=back))
            return
        node, session = await self._open(node_id, hello, context)
        try:
            session.send(self._welcome(node, session))
            self._opened(node_id)
            await self._talk(session, context)
        finally:
            self._links.detach_session(session)
            # gRPC cancels the handler of a connection that broke: then nobody gave a reason yet.
            session.end(_LOST)
            if not session.stopped:
                self._recorder.closed(node_id, session.epoch, session.reason)
            log.info("session closed", node=node.name, epoch=session.epoch, reason=session.reason)
        if session.denied:
            await refuse(context, grpc.StatusCode.PERMISSION_DENIED, session.reason)

    async def _hello(self, context: grpc.aio.ServicerContext) -> session_pb2.Hello:
        try:
            async with asyncio.timeout(self._policy.hello_timeout_s):
                first = await context.read()
        except TimeoutError:
            limit = f"{self._policy.hello_timeout_s:g} s"
            await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {limit}")
        if first is grpc.aio.EOF or first.WhichOneof("message") != "hello":
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "the first message of a session must be Hello")
        hello: session_pb2.Hello = first.hello
        return hello

    async def _open(
        self, node_id: str, hello: session_pb2.Hello, context: grpc.aio.ServicerContext
    ) -> tuple[nodes.NodeRow, Session]:
        self._waiting += 1
        try:
            async with self._places:
                node, epoch = await self._begin(node_id, hello)
        except (OSError, sa.exc.SQLAlchemyError) as error:
            log.warning("cannot open a session: the database is not there", error=error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, "the control plane has no database now: try again")
        finally:
            self._waiting -= 1
        if node is None or node.revoked:
            log.warning("session refused: unknown or revoked node", node=node.name if node else node_id)
            await refuse(context, grpc.StatusCode.PERMISSION_DENIED, GONE)
        held = Version(hello.timeline, hello.observed_generation, hello.observed_sha256)
        session = Session(node_id, node.name, epoch, held, asyncio.get_running_loop().time())
        self._links.attach_session(session)
        self._recorder.heard(node_id, epoch, session.heard_at)
        if held.generation:
            stored = session_pb2.Applied(timeline=held.timeline, generation=held.generation, sha256=held.sha256)
            self._recorder.applied(messages.applied_row(node_id, epoch, stored))
        self._take_statuses(session, hello.statuses, complete=True)
        log.info("session opened", node=node.name, epoch=epoch, generation=held.generation)
        return node, session

    async def _begin(self, node_id: str, hello: session_pb2.Hello) -> tuple[nodes.NodeRow | None, int]:
        async with self._engine.begin() as connection:
            node = await nodes.find(connection, node_id, lock=True)
            if node is None or node.revoked:
                return node, 0
            epoch = await sessions.open_session(connection, node_id, self._replica_id)
            await nodes.introduce(
                connection,
                node_id,
                boot_id=messages.text(hello.boot_id),
                agentd_version=messages.text(hello.agentd_version),
                local_api=messages.text(hello.local_api),
                inventory=messages.inventory(hello.inventory),
                features=[messages.text(feature) for feature in hello.features],
                artifacts=messages.digests(hello.artifacts),
            )
            return node, epoch

    def _welcome(self, node: nodes.NodeRow, session: Session) -> session_pb2.Down:
        welcome = session_pb2.Welcome(
            session_epoch=session.epoch,
            beat_s=self._policy.beat_s,
            ttl_s=self._policy.ttl_s,
            endpoints=self._endpoints(),
            mqtt=self._mqtt(node.id, node.mqtt_password or ""),
        )
        welcome.server_time.GetCurrentTime()
        return session_pb2.Down(welcome=welcome)

    async def _talk(self, session: Session, context: grpc.aio.ServicerContext) -> None:
        """Read and write until the session ends. Its last words get a moment to leave."""
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(session, context), name=f"session-read-{session.name}")
            writer = group.create_task(_write(session, context), name=f"session-write-{session.name}")
            await session.ended.wait()
            await asyncio.wait([writer], timeout=_LAST_WORDS_S)
            writer.cancel()
            reader.cancel()

    async def _read(self, session: Session, context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                if session.ended.is_set():
                    return
                session.heard_at = loop.time()
                self._recorder.heard(session.node_id, session.epoch, session.heard_at)
                self._take(session, message)
            session.end(_LOST)
        except grpc.aio.BaseError:
            session.end(_LOST)

    def _take(self, session: Session, message: session_pb2.Up) -> None:
        match message.WhichOneof("message"):
            case "ping":
                session.in_flight = message.ping.in_flight
                session.send(session_pb2.Down(pong=session_pb2.Pong(sequence=message.ping.sequence)))
            case "statuses":
                self._take_statuses(session, message.statuses.statuses, complete=message.statuses.complete)
            case "applied":
                self._take_applied(session, message.applied)
            case "operation_result":
                self._recorder.result(messages.result_row(session.node_id, message.operation_result))
            case "hello":
                session.end("a second Hello came in one session")
            case _:
                # A newer node may say more than we know (versions differ by up to two minor releases).
                log.debug("unknown message in a session", node=session.name)

    def _take_applied(self, session: Session, applied: session_pb2.Applied) -> None:
        row = messages.applied_row(session.node_id, session.epoch, applied)
        if applied.refused:
            log.warning("desired state refused", node=session.name, generation=row.generation, reason=row.refused)
            self._recorder.event(session.name, "warning", "DesiredStateRefused", row.refused)
        else:
            session.held = Version(applied.timeline, applied.generation, applied.sha256)
        self._recorder.applied(row)

    def _take_statuses(
        self, session: Session, statuses: Iterable[state_pb2.AssignmentStatus], *, complete: bool
    ) -> None:
        rows = [messages.status_row(session.node_id, session.epoch, status) for status in statuses]
        for row in rows:
            flags = (row.revision, row.observed_generation, row.staged, row.ready, row.warm, row.degraded)
            self._recorder.status(row, wake=session.flags.get(row.assignment_id) != flags)
            session.flags[row.assignment_id] = flags
        if complete:
            ids = {row.assignment_id for row in rows}
            session.flags = {key: flags for key, flags in session.flags.items() if key in ids}
            if ids != session.inventory:
                session.inventory = ids
                self._recorder.inventoried(sessions.Inventoried(session.node_id, session.epoch, ids))


async def _write(session: Session, context: grpc.aio.ServicerContext) -> None:
    try:
        while (message := await session.outbound.get()) is not None:
            await context.write(message)
    except grpc.aio.BaseError:
        session.end(_LOST)
