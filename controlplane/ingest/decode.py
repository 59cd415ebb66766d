"""From an MQTT message to checked values. Pure; whoever speaks is not believed.

A topic is ``slmfleet/v1/{node_id}/{stream}``; its payload is a ``Batch`` (streams ``metrics`` and ``events``) or a
``Presence``. What can't be stored whole is refused whole, with a reason from ``Reason``: a batch is immutable, so half
of it is nothing.
"""

from __future__ import annotations

import datetime
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from google.protobuf.message import DecodeError

from slmfleet.v1 import telemetry_pb2 as pb

Message = TypeVar("Message", pb.Presence, pb.Batch, pb.MetricRows, pb.EventRows)

TOPIC_ROOT = "slmfleet/v1"
SUBSCRIPTIONS = tuple(f"{TOPIC_ROOT}/+/{stream}" for stream in ("metrics", "events", "presence"))

MAX_MESSAGE_BYTES = 1 << 20
# A node cuts batches of some hundred rows of some kilobytes.
MAX_UNPACKED_BYTES = 8 << 20
MAX_ROWS = 10_000
MAX_MESSAGE_CHARACTERS = 2_000
MAX_WORD_CHARACTERS = 200

_MAX_BIGINT = 2**63 - 1
_MAX_INTEGER = 2**31 - 1
_SEVERITIES = frozenset({"info", "warning", "error"})
_LATEST_MS = int(datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC).timestamp() * 1000)
# An event's time by its node's clock counts only when it is near the truth; a device may wake in 1970.
_OLDEST_EVENT = datetime.timedelta(days=90)
_CLOCK_AHEAD = datetime.timedelta(minutes=5)


class Reason(StrEnum):
    """Why a message was not taken; the label of a counter."""

    TOPIC = "topic"
    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    MISMATCH = "mismatch"
    RANGE = "range"
    OVERLAP = "overlap"
    UNKNOWN_NODE = "unknown_node"
    REFUSED_BY_DATABASE = "refused_by_database"


class BadMessage(Exception):
    """The message can't be taken; ``reason`` for the counter, the text for the log."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Topic:
    """Who speaks of what, as the topic has it."""

    node_id: str
    stream: str


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """A row of ``node_metrics``: columns in the order of ``controlplane.db.telemetry.METRIC_COLUMNS`` after the node's
    id and the epoch."""

    sequence: int
    at: datetime.datetime
    boottime_ms: int
    cpu_fraction: float
    memory_used_bytes: int
    in_flight: int
    output_tokens: int
    requests_ok: int
    requests_failed: int
    row: bytes


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A row of ``events`` before its node has a name. ``at`` None: the node's clock is not to be believed."""

    sequence: int
    at: datetime.datetime | None
    severity: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """A batch whose every field fits its column."""

    node_id: str
    stream: str
    epoch: int
    first: int
    last: int
    dropped: int
    boot_id: str
    metrics: Sequence[MetricRecord] = ()
    events: Sequence[EventRecord] = ()

    @property
    def rows(self) -> int:
        """How many rows it carries."""
        return len(self.metrics) + len(self.events)


@dataclass(frozen=True, slots=True)
class PresenceSeen:
    """The node says that it is here, or its last will says that it is gone, in session ``session_epoch`` (0: none)."""

    node_id: str
    online: bool
    session_epoch: int


def parse_topic(topic: str) -> Topic:
    """Raises BadMessage when the topic is not one of ours."""
    parts = topic.split("/")
    if len(parts) != 4 or "/".join(parts[:2]) != TOPIC_ROOT or not 0 < len(parts[2]) <= MAX_WORD_CHARACTERS:
        raise BadMessage(Reason.TOPIC, "the topic is not slmfleet/v1/<node>/<stream>")
    if parts[3] not in ("metrics", "events", "presence"):
        raise BadMessage(Reason.TOPIC, "the stream is none of metrics, events, presence")
    return Topic(parts[2], parts[3])


def decode(topic: Topic, payload: bytes, now: datetime.datetime) -> DecodedBatch | PresenceSeen | None:
    """The message as values; None for an empty one (a retained message being cleared). Raises BadMessage."""
    if not payload:
        return None
    if len(payload) > MAX_MESSAGE_BYTES:
        raise BadMessage(Reason.OVERSIZE, f"the message has {len(payload)} bytes, more than {MAX_MESSAGE_BYTES}")
    if topic.stream == "presence":
        presence = _parse(pb.Presence(), payload)
        return PresenceSeen(topic.node_id, presence.online, min(presence.session_epoch, _MAX_BIGINT))
    batch = _parse(pb.Batch(), payload)
    if batch.stream != topic.stream:
        raise BadMessage(Reason.MISMATCH, f"a batch of {_word(batch.stream)!r} on the topic of {topic.stream!r}")
    _check_range(batch)
    unpacked = unpack(batch.payload) if batch.payload else b""
    metrics: Sequence[MetricRecord] = ()
    events: Sequence[EventRecord] = ()
    if topic.stream == "metrics":
        metrics = [_metric(row) for row in _parse(pb.MetricRows(), unpacked).rows]
    else:
        events = [_event(row, now) for row in _parse(pb.EventRows(), unpacked).rows]
    _check_sequence(batch, [*(record.sequence for record in metrics), *(record.sequence for record in events)])
    return DecodedBatch(
        node_id=topic.node_id,
        stream=topic.stream,
        epoch=batch.epoch,
        first=batch.first,
        last=batch.last,
        dropped=min(batch.dropped, _MAX_BIGINT),
        boot_id=_word(batch.boot_id),
        metrics=metrics,
        events=events,
    )


def unpack(packed: bytes) -> bytes:
    """zlib, at most MAX_UNPACKED_BYTES of it. Raises BadMessage."""
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(packed, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise BadMessage(Reason.MALFORMED, f"the payload is no zlib stream: {error}") from None
    if stream.unconsumed_tail:
        raise BadMessage(Reason.OVERSIZE, f"the payload unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    if not stream.eof:
        raise BadMessage(Reason.MALFORMED, "the payload's zlib stream is cut short")
    return unpacked


def _parse(into: Message, data: bytes) -> Message:
    try:
        into.ParseFromString(data)
    except DecodeError:
        raise BadMessage(Reason.MALFORMED, f"the bytes are no {type(into).__name__}") from None
    return into


def _check_range(batch: pb.Batch) -> None:
    if not (0 < batch.first <= batch.last <= _MAX_BIGINT and batch.epoch <= _MAX_BIGINT):
        raise BadMessage(Reason.RANGE, f"no such range: epoch {batch.epoch}, rows {batch.first} to {batch.last}")


def _check_sequence(batch: pb.Batch, sequence: Sequence[int]) -> None:
    if len(sequence) > MAX_ROWS:
        raise BadMessage(Reason.OVERSIZE, f"{len(sequence)} rows in one batch, more than {MAX_ROWS}")
    if any(later <= earlier for earlier, later in itertools.pairwise(sequence)):
        raise BadMessage(Reason.RANGE, "the rows are not in the order of their numbers")
    if sequence and not (batch.first <= sequence[0] and sequence[-1] <= batch.last):
        raise BadMessage(Reason.RANGE, f"rows outside the batch's own range {batch.first} to {batch.last}")


def _metric(row: pb.MetricRow) -> MetricRecord:
    return MetricRecord(
        sequence=row.sequence,
        at=instant(row.time.wall_ms),
        boottime_ms=row.time.boottime_ms,
        cpu_fraction=row.cpu_fraction,
        memory_used_bytes=min(row.memory_used_bytes, _MAX_BIGINT),
        in_flight=min(row.in_flight, _MAX_INTEGER),
        output_tokens=min(sum(model.output_tokens for model in row.models), _MAX_BIGINT),
        requests_ok=min(sum(model.requests_ok for model in row.models), _MAX_BIGINT),
        requests_failed=min(sum(model.requests_failed for model in row.models), _MAX_BIGINT),
        row=row.SerializeToString(),
    )


def _event(row: pb.EventRow, now: datetime.datetime) -> EventRecord:
    at = instant(row.time.wall_ms)
    believed = now - _OLDEST_EVENT <= at <= now + _CLOCK_AHEAD
    subject = f" ({_word(row.object)})" if row.object else ""
    return EventRecord(
        sequence=row.sequence,
        at=at if believed else None,
        severity=row.severity if row.severity in _SEVERITIES else "info",
        reason=_word(row.reason),
        message=_text(row.message)[:MAX_MESSAGE_CHARACTERS] + subject,
    )


def instant(wall_ms: int) -> datetime.datetime:
    """Milliseconds since 1970 as a time that Postgres can store."""
    return datetime.datetime.fromtimestamp(max(0, min(wall_ms, _LATEST_MS)) / 1000, datetime.UTC)


def _text(value: str) -> str:
    # Postgres stores no NUL in a text.
    return value.replace("\x00", "")


def _word(value: str) -> str:
    return _text(value)[:MAX_WORD_CHARACTERS]
