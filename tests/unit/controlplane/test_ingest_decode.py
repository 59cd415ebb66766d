"""What a node sends is checked before it is believed."""

from __future__ import annotations

import contextlib
import datetime
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ingest import decode as subject
from controlplane.ingest.decode import BadMessage, DecodedBatch, PresenceSeen, Reason, Topic, decode, parse_topic
from slmfleet.v1 import telemetry_pb2 as pb

NOW = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
METRICS = Topic("n1", "metrics")
EVENTS = Topic("n1", "events")


def metric_batch(*sequence: int, **fields: int) -> pb.Batch:
    rows = pb.MetricRows(rows=[pb.MetricRow(sequence=number, cpu_fraction=0.5) for number in sequence])
    given = {"epoch": 7, "first": 1, "last": 9, **fields}
    return pb.Batch(stream="metrics", payload=zlib.compress(rows.SerializeToString()), boot_id="b", **given)


def refused(topic: Topic, payload: bytes) -> Reason:
    with pytest.raises(BadMessage) as caught:
        decode(topic, payload, NOW)
    return caught.value.reason


def test_a_good_batch_becomes_rows() -> None:
    row = pb.MetricRow(sequence=2, time=pb.RowTime(wall_ms=1_700_000_000_000, boottime_ms=5), in_flight=3)
    row.models.add(output_tokens=10, requests_ok=1)
    row.models.add(output_tokens=5, requests_failed=2)
    batch = pb.Batch(
        stream="metrics",
        epoch=1,
        first=1,
        last=2,
        dropped=1,
        boot_id="boot",
        payload=zlib.compress(pb.MetricRows(rows=[row]).SerializeToString()),
    )
    found = decode(METRICS, batch.SerializeToString(), NOW)
    assert isinstance(found, DecodedBatch)
    assert (found.node_id, found.stream, found.epoch, found.first, found.last) == ("n1", "metrics", 1, 1, 2)
    (record,) = found.metrics
    assert (record.output_tokens, record.requests_ok, record.requests_failed) == (15, 1, 2)
    assert record.at == datetime.datetime(2023, 11, 14, 22, 13, 20, tzinfo=datetime.UTC)
    assert record.row == row.SerializeToString()


def test_a_batch_of_dropped_rows_alone_is_good() -> None:
    batch = pb.Batch(stream="metrics", epoch=1, first=1, last=50, dropped=50)
    found = decode(METRICS, batch.SerializeToString(), NOW)
    assert isinstance(found, DecodedBatch)
    assert (found.rows, found.dropped) == (0, 50)


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (METRICS, b"\xff\xff\xff", Reason.MALFORMED),
        (METRICS, bytes(subject.MAX_MESSAGE_BYTES + 1), Reason.OVERSIZE),
        (EVENTS, metric_batch(1).SerializeToString(), Reason.MISMATCH),
        (METRICS, metric_batch(1, first=2, last=1).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(1, first=0).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(1, epoch=2**63).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(1, last=2**63).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(10).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(2, 2).SerializeToString(), Reason.RANGE),
        (METRICS, metric_batch(3, 2).SerializeToString(), Reason.RANGE),
        (
            METRICS,
            pb.Batch(stream="metrics", first=1, last=1, payload=b"no zlib").SerializeToString(),
            Reason.MALFORMED,
        ),
        (
            METRICS,
            pb.Batch(stream="metrics", first=1, last=1, payload=zlib.compress(b"x" * 99)[:-6]).SerializeToString(),
            Reason.MALFORMED,
        ),
        (Topic("n1", "presence"), b"\xff", Reason.MALFORMED),
    ],
)
def test_what_can_t_be_believed_is_refused_whole(topic: Topic, payload: bytes, reason: Reason) -> None:
    assert refused(topic, payload) == reason


def test_a_zip_bomb_is_not_unpacked() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    assert len(bomb) < 100_000
    batch = pb.Batch(stream="metrics", epoch=1, first=1, last=1, payload=bomb)
    assert refused(METRICS, batch.SerializeToString()) == Reason.OVERSIZE


@pytest.mark.parametrize(
    "topic",
    ["", "slmfleet/v1/n1", "slmfleet/v1/n1/metrics/x", "slmfleet/v2/n1/metrics", "slmfleet/v1//metrics", "a/b/c/d"],
)
def test_topics_that_are_not_ours(topic: str) -> None:
    with pytest.raises(BadMessage):
        parse_topic(topic)


def test_presence() -> None:
    said = pb.Presence(online=True, session_epoch=4).SerializeToString()
    assert decode(parse_topic("slmfleet/v1/n1/presence"), said, NOW) == PresenceSeen("n1", True, 4)
    assert decode(Topic("n1", "presence"), b"", NOW) is None


def test_an_event_of_a_device_that_woke_in_1970_gets_no_time() -> None:
    def at(moment: datetime.datetime) -> datetime.datetime | None:
        row = pb.EventRow(sequence=1, time=pb.RowTime(wall_ms=int(moment.timestamp() * 1000)), message="m\x00m")
        payload = zlib.compress(pb.EventRows(rows=[row]).SerializeToString())
        batch = pb.Batch(stream="events", epoch=1, first=1, last=1, payload=payload)
        found = decode(EVENTS, batch.SerializeToString(), NOW)
        assert isinstance(found, DecodedBatch)
        assert found.events[0].message == "mm"
        assert found.events[0].severity == "info"
        return found.events[0].at

    assert at(NOW - datetime.timedelta(days=3)) == NOW - datetime.timedelta(days=3)
    assert at(datetime.datetime(1970, 1, 1, 0, 1, tzinfo=datetime.UTC)) is None
    assert at(NOW + datetime.timedelta(hours=1)) is None


@given(payload=st.binary(max_size=300), stream=st.sampled_from(["metrics", "events", "presence"]))
def test_no_bytes_break_it(payload: bytes, stream: str) -> None:
    with contextlib.suppress(BadMessage):
        decode(Topic("n1", stream), payload, NOW)


@given(
    wall=st.integers(-(2**63), 2**63 - 1),
    memory=st.integers(0, 2**64 - 1),
    in_flight=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 2**64 - 1),
)
def test_every_number_fits_its_column(wall: int, memory: int, in_flight: int, tokens: int) -> None:
    row = pb.MetricRow(sequence=1, time=pb.RowTime(wall_ms=wall), memory_used_bytes=memory, in_flight=in_flight)
    row.models.add(output_tokens=tokens)
    row.models.add(output_tokens=tokens)
    payload = zlib.compress(pb.MetricRows(rows=[row]).SerializeToString())
    batch = pb.Batch(stream="metrics", epoch=1, first=1, last=1, payload=payload)
    found = decode(METRICS, batch.SerializeToString(), NOW)
    assert isinstance(found, DecodedBatch)
    record = found.metrics[0]
    assert 0 <= record.memory_used_bytes < 2**63
    assert 0 <= record.output_tokens < 2**63
    assert 0 <= record.in_flight < 2**31
    assert record.at.year < 10_000
