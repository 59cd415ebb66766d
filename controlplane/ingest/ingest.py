"""The ingester: messages from the broker into Postgres, acknowledgements back to the nodes.

One loop: take what has arrived, decode it, store all of it in one transaction, then say what is committed: to the node
over its session (so that it may delete the rows), and to the broker. A group that meets a broken database waits and
tries again; meanwhile nothing is acknowledged, and the broker holds the rest back.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import sqlalchemy as sa
from asyncpg import InterfaceError, PostgresError
from asyncpg.exceptions import DataError, IntegrityConstraintViolationError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.db import telemetry
from controlplane.ingest.decode import (
    SUBSCRIPTIONS,
    BadMessage,
    DecodedBatch,
    PresenceSeen,
    Reason,
    decode,
    parse_topic,
)
from controlplane.ingest.mqtt import WINDOW, Arrived, MqttSettings, MqttSource
from controlplane.ingest.plan import Span, StreamKey, key_of, plan_dedup, spans_by_stream
from slmfleet import logs

log = logs.get(__name__)

MAX_GROUP = 200
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 15.0
COMPLAIN_EVERY_S = 60.0
MAX_COMPLAINTS_KEPT = 1000

# The database is there and says no to a value; COPY speaks with the driver, so its errors come unwrapped.
VALUE_ERRORS = (
    DataError,
    IntegrityConstraintViolationError,
    sa.exc.DataError,
    sa.exc.IntegrityError,
    ValueError,
    OverflowError,
)
DATABASE_ERRORS = (OSError, TimeoutError, PostgresError, InterfaceError, sa.exc.SQLAlchemyError)


class Acks(Protocol):
    """Who tells nodes what is committed; ``controlplane.node_api.links.NodeLinks`` does."""

    def outbox_committed(
        self, node_id: str, stream: str, epoch: int, ranges: Iterable[tuple[int, int]], credit: int = 0
    ) -> bool:
        """Rows ``first`` to ``last`` of each range are committed; False when the node can't be told now."""
        ...


@dataclass
class Counters:
    """What went through since the start."""

    batches: int = 0
    repeated: int = 0
    rows: int = 0
    bytes: int = 0
    dropped_rows: int = 0
    groups: int = 0
    retries: int = 0
    bad: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one transaction did."""

    acknowledged: Sequence[DecodedBatch] = ()
    fresh: Sequence[DecodedBatch] = ()
    refused: Sequence[tuple[str, BadMessage]] = ()


class Complaints:
    """Says whether a node's bad message is worth a line in the log: once per node and minute."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def worth_a_line(self, node_id: str, now: float) -> bool:
        """``now`` in seconds of any steady clock."""
        if now - self._last.get(node_id, -COMPLAIN_EVERY_S) < COMPLAIN_EVERY_S:
            return False
        if len(self._last) >= MAX_COMPLAINTS_KEPT:
            self._last.clear()
        self._last[node_id] = now
        return True


class Ingest:
    """See the module. ``client_id`` names the session at the broker: one per replica. ``window``: messages that may be
    here at once."""

    def __init__(
        self,
        engine: AsyncEngine,
        settings: MqttSettings,
        acks: Acks,
        client_id: str = "controlplane-ingest",
        window: int = WINDOW,
    ) -> None:
        self.counters = Counters()
        self._engine = engine
        self._acks = acks
        self._window = window
        self._source = MqttSource(settings, client_id, SUBSCRIPTIONS, window)
        self._complaints = Complaints()

    @property
    def connected(self) -> bool:
        """Whether the broker is connected."""
        return self._source.connected

    @property
    def waiting(self) -> int:
        """Messages that wait here."""
        return self._source.messages.qsize()

    @property
    def overflowed(self) -> int:
        """Messages of quality of service 0 that found no room."""
        return self._source.overflowed

    async def run(self) -> None:
        """Ingest until cancelled."""
        self._source.start()
        try:
            while True:
                await self._handle(await self._next_group())
        finally:
            await asyncio.to_thread(self._source.stop)

    async def _next_group(self) -> list[Arrived]:
        """At least one message, and what else is there: the slower the database, the larger the group."""
        messages = self._source.messages
        group = [await messages.get()]
        while len(group) < MAX_GROUP and not messages.empty():
            group.append(messages.get_nowait())
        return group

    async def _handle(self, group: Sequence[Arrived]) -> None:
        decoded = self._decode(group, datetime.datetime.now(datetime.UTC))
        if decoded:
            outcome = await self._store_for_certain(decoded)
            self._tell(outcome)
        for message in group:
            self._source.done(message)
        self.counters.groups += 1

    def _decode(self, group: Sequence[Arrived], now: datetime.datetime) -> list[DecodedBatch | PresenceSeen]:
        decoded: list[DecodedBatch | PresenceSeen] = []
        for message in group:
            self.counters.bytes += len(message.payload)
            try:
                topic = parse_topic(message.topic)
            except BadMessage as bad:
                self._complain("", bad)
                continue
            try:
                value = decode(topic, message.payload, now)
            except BadMessage as bad:
                self._complain(topic.node_id, bad)
                continue
            if value is not None:
                decoded.append(value)
        return decoded

    async def _store_for_certain(self, decoded: Sequence[DecodedBatch | PresenceSeen]) -> Outcome:
        """Store the group; again and again while the database is away. A value that the database refuses is given up,
        alone."""
        delay = FIRST_RETRY_S
        while True:
            try:
                return await store(self._engine, decoded)
            except VALUE_ERRORS as error:
                return await self._store_one_by_one(decoded, error)
            except DATABASE_ERRORS as error:
                self.counters.retries += 1
                log.warning("telemetry waits for the database", error=_short(error), retry_s=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_RETRY_S)

    async def _store_one_by_one(self, decoded: Sequence[DecodedBatch | PresenceSeen], error: Exception) -> Outcome:
        if len(decoded) == 1:
            bad = BadMessage(Reason.REFUSED_BY_DATABASE, f"the database refused it: {_short(error)}")
            return Outcome(refused=[(decoded[0].node_id, bad)])
        outcomes = [await self._store_for_certain([value]) for value in decoded]
        return Outcome(
            [batch for outcome in outcomes for batch in outcome.acknowledged],
            [batch for outcome in outcomes for batch in outcome.fresh],
            [refusal for outcome in outcomes for refusal in outcome.refused],
        )

    def _tell(self, outcome: Outcome) -> None:
        self.counters.batches += len(outcome.fresh)
        self.counters.repeated += len(outcome.acknowledged) - len(outcome.fresh)
        self.counters.rows += sum(batch.rows for batch in outcome.fresh)
        self.counters.dropped_rows += sum(batch.dropped for batch in outcome.fresh)
        for node_id, bad in outcome.refused:
            self._complain(node_id, bad)
        credit = max(0, self._window - self.waiting)
        for key, ranges in spans_by_stream(outcome.acknowledged).items():
            self._acks.outbox_committed(key.node_id, key.stream, key.epoch, ranges, credit)

    def _complain(self, node_id: str, bad: BadMessage) -> None:
        self.counters.bad[bad.reason] += 1
        if self._complaints.worth_a_line(node_id, asyncio.get_running_loop().time()):
            log.warning("telemetry refused", node=node_id, reason=bad.reason, detail=bad)


async def store(engine: AsyncEngine, decoded: Sequence[DecodedBatch | PresenceSeen]) -> Outcome:
    """One transaction for the whole group: all of it is committed when this returns."""
    batches = [value for value in decoded if isinstance(value, DecodedBatch)]
    async with engine.begin() as connection:
        names = await telemetry.lock_nodes(connection, {value.node_id for value in decoded})
        for value in decoded:
            if isinstance(value, PresenceSeen) and value.node_id in names:
                await telemetry.record_presence(connection, value.node_id, value.online, value.session_epoch)
        known = [batch for batch in batches if batch.node_id in names]
        outcome = await _store_batches(connection, known, names) if known else Outcome()
    # A broker keeps the presence of nodes that were deleted and tells it with each connection: nobody's fault.
    strangers = {batch.node_id for batch in batches} - names.keys()
    unknown = BadMessage(Reason.UNKNOWN_NODE, "no such node, or one that was revoked")
    return Outcome(
        outcome.acknowledged, outcome.fresh, [*outcome.refused, *((node_id, unknown) for node_id in sorted(strangers))]
    )


async def _store_batches(
    connection: AsyncConnection, batches: Sequence[DecodedBatch], names: dict[str, str]
) -> Outcome:
    found = await telemetry.committed_spans(connection, {key_of(batch) for batch in batches})
    plan = plan_dedup(batches, {StreamKey(*key): [Span(*span) for span in spans] for key, spans in found.items()})
    if plan.fresh:
        await telemetry.copy_metrics(connection, [row for batch in plan.fresh for row in _metric_rows(batch)])
        now = datetime.datetime.now(datetime.UTC)
        await telemetry.copy_events(
            connection, [row for batch in plan.fresh for row in _event_rows(batch, names[batch.node_id], now)]
        )
        await telemetry.write_spans(connection, plan.written, plan.removed)
    await telemetry.touch(connection, {batch.node_id for batch in (*plan.fresh, *plan.repeated)})
    overlap = BadMessage(Reason.OVERLAP, "a batch that shares rows with others that are committed")
    return Outcome([*plan.fresh, *plan.repeated], plan.fresh, [(batch.node_id, overlap) for batch in plan.overlapping])


def _metric_rows(batch: DecodedBatch) -> list[tuple[Any, ...]]:
    """In the order of ``telemetry.METRIC_COLUMNS``."""
    return [
        (
            batch.node_id,
            batch.epoch,
            record.sequence,
            record.at,
            batch.boot_id,
            record.boottime_ms,
            record.cpu_fraction,
            record.memory_used_bytes,
            record.in_flight,
            record.output_tokens,
            record.requests_ok,
            record.requests_failed,
            record.row,
        )
        for record in batch.metrics
    ]


def _event_rows(batch: DecodedBatch, name: str, now: datetime.datetime) -> list[tuple[Any, ...]]:
    """In the order of ``telemetry.EVENT_COLUMNS``."""
    return [
        (record.at or now, record.severity, f"node/{name}", record.reason, record.message) for record in batch.events
    ]


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
