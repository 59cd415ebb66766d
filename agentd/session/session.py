"""The one stream to the control plane: connect, Hello, desired state in, statuses out, and again when it breaks.

One attempt is ``_connected``: a reader, a writer and the relay as tasks that live and die together. Around it ``run``
waits as ``backoff`` says and connects again. Nothing that the node serves depends on any of this.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from agentd.board import StatusBoard
from agentd.desired import DesiredOwner, Refuse
from agentd.device.clock import boottime_s, wall_s
from agentd.identity.files import Identity
from agentd.session.backoff import invited_delay_s, reconnect_delay_s
from agentd.session.channel import open_channel
from agentd.session.operations import Operations
from agentd.store.database import STORAGE_ERRORS
from slmfleet import logs
from slmfleet.v1 import session_pb2 as pb
from slmfleet.v1 import session_pb2_grpc, state_pb2

log = logs.get(__name__)

WELCOME_TIMEOUT_S = 15.0
# Status changes within this time travel in one message.
COALESCE_S = 0.1
QUEUE_LENGTH = 64
# A desired state that could not be stored is tried again after this long.
STORE_AGAIN_S = 5.0


class LinkLost(Exception):
    """This stream is over; the text says why. Another attempt is made."""


class ComeBack(Exception):
    """The server asks to connect again after ``seconds``."""

    def __init__(self, seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.seconds = seconds


# How a stream ends in the ordinary course of things. grpc.aio raises InvalidStateError for a write after the end.
_EXPECTED = (LinkLost, ComeBack, OSError, grpc.RpcError, asyncio.InvalidStateError)


@dataclass(slots=True)
class Link:
    """What is known of the connection, for people and metrics. Written by the session alone."""

    connected: bool = False
    since_s: float = 0.0
    session_epoch: int = 0
    attempts: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the session tells the rest of the daemon, all on the event loop. None of them may take long."""

    # A Welcome came: endpoints may have changed, here is the broker.
    welcomed: Callable[[pb.Welcome], None]
    # These batches are committed in Postgres.
    acknowledged: Callable[[pb.OutboxAck], Awaitable[None]]
    # Opens the relay on the session's channel and serves it until cancelled.
    relay: Callable[[grpc.aio.Channel], Coroutine[Any, Any, None]]
    in_flight: Callable[[], int]
    hello_facts: Callable[[], Awaitable[tuple[state_pb2.Inventory, list[str]]]]


class Session:
    """Owns the stream. ``identity`` is called before each attempt, so that a renewed certificate is used."""

    def __init__(
        self,
        identity: Callable[[], Identity],
        desired: DesiredOwner,
        board: StatusBoard,
        callbacks: Callbacks,
        hello: Mapping[str, Any],
    ) -> None:
        self._identity = identity
        self._desired = desired
        self._board = board
        self._callbacks = callbacks
        # Fields of Hello that do not change while agentd runs.
        self._hello = hello
        self._operations = Operations()
        # The newest desired state that came and is not judged yet: latest wins.
        self._offered: state_pb2.DesiredState | None = None
        self._offer_came = asyncio.Event()
        self.link = Link()

    async def run(self) -> None:
        """Keep the node connected until cancelled."""
        failures = 0
        while True:
            self.link.attempts += 1
            try:
                await self._attempt()
                delay_s = 0.0
            except ComeBack as invitation:
                failures = 0
                delay_s = invited_delay_s(invitation.seconds, random.random())
                self.link.problem = f"asked to come back: {invitation}"
            except _EXPECTED as error:
                failures = 1 if self.link.connected else failures + 1
                delay_s = reconnect_delay_s(failures, random.random())
                self.link.problem = _sentence(error)
            except Exception as error:  # a bug here must not stop what the node serves
                log.error("the session failed", exc_info=True)
                failures += 1
                delay_s = reconnect_delay_s(failures, random.random())
                self.link.problem = repr(error)
            self.link.connected = False
            # The first failure in a row and then each doubling: a month offline must not fill the log.
            if failures & (failures - 1) == 0:
                log.warning("no link to the control plane", reason=self.link.problem, failures=failures,
                            next_try_s=round(delay_s, 1))  # fmt: skip
            await asyncio.sleep(delay_s)

    async def _attempt(self) -> None:
        channel = open_channel(self._identity())
        call = session_pb2_grpc.NodeSessionStub(channel).Connect()
        try:
            await self._connected(channel, call)
        finally:
            call.cancel()
            await channel.close()

    async def _connected(self, channel: grpc.aio.Channel, call: Any) -> None:
        hello = await self._make_hello()
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(pb.Up(hello=hello))
                welcome = _welcome(await call.read())
        except TimeoutError:
            raise LinkLost(f"no Welcome within {WELCOME_TIMEOUT_S:g} s") from None
        self.link.connected, self.link.since_s, self.link.problem = True, boottime_s(), ""
        self.link.session_epoch = welcome.session_epoch
        log.info("session opened", epoch=welcome.session_epoch, beat_s=welcome.beat_s, ttl_s=welcome.ttl_s)
        self._callbacks.welcomed(welcome)
        outgoing: asyncio.Queue[pb.Up] = asyncio.Queue(QUEUE_LENGTH)
        self._offered = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(call, outgoing, max(welcome.ttl_s, 1.0)), name="session reader")
                tasks.create_task(self._write(call, outgoing), name="session writer")
                tasks.create_task(self._beat(outgoing, max(welcome.beat_s, 0.05)), name="session beat")
                tasks.create_task(self._tell(outgoing), name="session statuses")
                tasks.create_task(self._store(outgoing), name="session desired state")
                tasks.create_task(self._callbacks.relay(channel), name="relay")
        except ExceptionGroup as group:
            expected, bugs = group.split(_EXPECTED)
            if bugs is not None or expected is None:
                raise
            raise _most_telling(expected) from None

    async def _make_hello(self) -> pb.Hello:
        stored = self._desired.stored
        inventory, artifacts = await self._callbacks.hello_facts()
        return pb.Hello(
            inventory=inventory,
            timeline=stored.timeline if stored else "",
            observed_generation=stored.generation if stored else 0,
            observed_sha256=stored.sha256 if stored else b"",
            artifacts=artifacts,
            statuses=self._board.statuses.values(),
            **self._hello,
        )

    async def _read(self, call: Any, outgoing: asyncio.Queue[pb.Up], ttl_s: float) -> None:
        while True:
            try:
                # Pongs come each beat: silence of one TTL means a dead peer or a dead path.
                async with asyncio.timeout(ttl_s):
                    message = await call.read()
            except TimeoutError:
                raise LinkLost(f"the control plane was silent for {ttl_s:g} s") from None
            if message is grpc.aio.EOF:
                raise LinkLost("the control plane closed the session")
            await self._handle(message, outgoing)

    async def _handle(self, message: pb.Down, outgoing: asyncio.Queue[pb.Up]) -> None:
        match message.WhichOneof("message"):
            case "desired_state":
                self._offered = message.desired_state
                self._offer_came.set()
            case "operation":
                result = self._operations.answer(message.operation, wall_s())
                if result is not None:
                    await outgoing.put(pb.Up(operation_result=result))
            case "outbox_ack":
                await self._callbacks.acknowledged(message.outbox_ack)
            case "come_back_in":
                raise ComeBack(message.come_back_in.seconds, message.come_back_in.reason)
            case "conflict":
                self._desired.hold(message.conflict.reason)
            case _:
                # Pong, and what a newer control plane may say: the message itself is the sign of life.
                pass

    async def _store(self, outgoing: asyncio.Queue[pb.Up]) -> None:
        """Judge and store what is offered, and say so; again and again while the disk is full, the newest only."""
        failed: state_pb2.DesiredState | None = None
        told = pb.Applied()
        while True:
            await self._offer_came.wait()
            self._offer_came.clear()
            offered = self._offered
            if offered is None:
                continue
            again = offered is failed
            try:
                answer = await self._apply(offered)
                if offered is self._offered:
                    self._offered = None
            except STORAGE_ERRORS as error:
                failed = offered
                answer = _refusal(offered, f"cannot store the desired state: {error}; free some space on the node")
                asyncio.get_running_loop().call_later(STORE_AGAIN_S, self._offer_came.set)
            if not again or answer != told:
                await outgoing.put(pb.Up(applied=answer))
            told = answer

    async def _apply(self, offered: state_pb2.DesiredState) -> pb.Applied:
        verdict = await self._desired.offer(offered)
        if isinstance(verdict, Refuse):
            return _refusal(offered, verdict.reason)
        return pb.Applied(timeline=offered.timeline, generation=offered.generation, sha256=offered.sha256)

    async def _write(self, call: Any, outgoing: asyncio.Queue[pb.Up]) -> None:
        while True:
            await call.write(await outgoing.get())

    async def _beat(self, outgoing: asyncio.Queue[pb.Up], beat_s: float) -> None:
        sequence = 0
        while True:
            sequence += 1
            ping = pb.Ping(sequence=sequence, in_flight=self._callbacks.in_flight())
            await outgoing.put(pb.Up(ping=ping))
            await asyncio.sleep(beat_s)

    async def _tell(self, outgoing: asyncio.Queue[pb.Up]) -> None:
        async for report in _reports(self._board):
            await outgoing.put(pb.Up(statuses=report))


async def _reports(board: StatusBoard) -> AsyncIterator[pb.StatusReport]:
    """First everything, then what changed, for ever; complete again when an assignment came or went."""
    changed, told = board.changed, dict(board.statuses)
    yield pb.StatusReport(statuses=told.values(), complete=True)
    while True:
        await changed.wait()
        await asyncio.sleep(COALESCE_S)
        changed, current = board.changed, dict(board.statuses)
        if current.keys() != told.keys():
            yield pb.StatusReport(statuses=current.values(), complete=True)
        else:
            news = [status for key, status in current.items() if status != told[key]]
            if news:
                yield pb.StatusReport(statuses=news)
        told = current


def _refusal(offered: state_pb2.DesiredState, reason: str) -> pb.Applied:
    return pb.Applied(timeline=offered.timeline, generation=offered.generation, sha256=offered.sha256, refused=reason)


def _welcome(message: Any) -> pb.Welcome:
    if message is grpc.aio.EOF:
        raise LinkLost("the control plane closed the session before it answered Hello")
    match message.WhichOneof("message"):
        case "welcome":
            return message.welcome
        case "come_back_in":
            raise ComeBack(message.come_back_in.seconds, message.come_back_in.reason)
        case kind:
            raise LinkLost(f"the control plane answered Hello with {kind}")


def _most_telling(group: ExceptionGroup[Any]) -> BaseException:
    """Of what ended the tasks of one link, an invitation first: it decides when to come back."""
    found = list(_leaves(group))
    return next((error for error in found if isinstance(error, ComeBack)), found[0])


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _sentence(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        code = error.code() if hasattr(error, "code") else None
        details = error.details() if hasattr(error, "details") else str(error)
        return f"{code.name if code else 'ERROR'}: {details}"
    return str(error) or type(error).__name__
