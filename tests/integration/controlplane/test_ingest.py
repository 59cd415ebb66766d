"""Telemetry from a real broker into a real Postgres: each batch once, acknowledged when it is committed."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import uuid
import zlib
from collections.abc import AsyncIterator, Iterable

import asyncpg
import paho.mqtt.client as paho
import pytest
import sqlalchemy as sa
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import tables
from controlplane.db.engine import make_engine
from controlplane.ingest.ingest import Ingest
from controlplane.ingest.mqtt import MqttSettings
from slmfleet.v1 import telemetry_pb2 as pb
from tests.support.mqtt import Mqtt
from tests.support.processes import eventually

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt]

Ack = tuple[str, str, int, list[tuple[int, int]]]


class Acks:
    """Keeps what nodes would be told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Ack] = asyncio.Queue()

    def outbox_committed(
        self, node_id: str, stream: str, epoch: int, ranges: Iterable[tuple[int, int]], credit: int = 0
    ) -> bool:
        assert credit > 0
        self.told.put_nowait((node_id, stream, epoch, list(ranges)))
        return True

    async def next(self) -> Ack:
        async with asyncio.timeout(20):
            return await self.told.get()


class Fleet:
    """An ingester at work, one enrolled node, and a client that speaks as any node."""

    def __init__(self, url: str, mqtt: Mqtt, window: int = 1000) -> None:
        self.node_id = str(uuid.uuid4())
        self.url = url
        self.engine: AsyncEngine = make_engine(url)
        self.acks = Acks()
        self._mqtt = mqtt
        settings = MqttSettings(mqtt.host, mqtt.port, mqtt.username, mqtt.password)
        self.ingest = Ingest(self.engine, settings, self.acks, f"test-{uuid.uuid4()}", window)
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.client.max_inflight_messages_set(1000)
        if mqtt.username:
            self.client.username_pw_set(mqtt.username, mqtt.password)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        async with self.engine.begin() as connection:
            await connection.execute(sa.insert(tables.nodes).values(id=self.node_id, name="edge-1"))
        self.client.connect(self._mqtt.host, self._mqtt.port)
        self.client.loop_start()
        task = asyncio.create_task(self.ingest.run(), name="ingest")
        try:
            await eventually(lambda: self.ingest.connected, "the broker is connected")
            await self.subscribed()
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.client.disconnect()
            self.client.loop_stop()
            await self.engine.dispose()

    async def subscribed(self) -> None:
        """Until the ingester hears: it counts each message that is no batch."""
        async with asyncio.timeout(20):
            while not self.ingest.counters.bad:
                self.send("metrics", b"no batch", node_id="nobody")
                await asyncio.sleep(0.05)

    def send(self, stream: str, payload: bytes, *, node_id: str | None = None, retain: bool = False) -> None:
        self.client.publish(f"slmfleet/v1/{node_id or self.node_id}/{stream}", payload, qos=1, retain=retain)

    async def rows(self, query: str) -> list[tuple[object, ...]]:
        async with self.engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(sa.text(query))]


def metrics(first: int, last: int, epoch: int = 1) -> bytes:
    rows = [pb.MetricRow(sequence=number, cpu_fraction=0.5) for number in range(first, last + 1)]
    payload = zlib.compress(pb.MetricRows(rows=rows).SerializeToString())
    return pb.Batch(
        stream="metrics", epoch=epoch, first=first, last=last, boot_id="boot", payload=payload
    ).SerializeToString()


def test_a_batch_is_stored_and_acknowledged_and_a_repeated_one_only_acknowledged(
    migrated_postgres_url: str, mqtt: Mqtt
) -> None:
    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            for _ in range(2):
                fleet.send("metrics", metrics(1, 3))
                assert await fleet.acks.next() == (fleet.node_id, "metrics", 1, [(1, 3)])
            fleet.send("metrics", metrics(4, 5))
            assert await fleet.acks.next() == (fleet.node_id, "metrics", 1, [(4, 5)])
            stored = await fleet.rows("SELECT sequence FROM node_metrics ORDER BY sequence")
            assert stored == [(1,), (2,), (3,), (4,), (5,)]
            assert await fleet.rows("SELECT first, last FROM outbox_ranges") == [(1, 5)]
            assert await fleet.rows("SELECT telemetry_at IS NOT NULL FROM nodes") == [(True,)]
            assert (fleet.ingest.counters.batches, fleet.ingest.counters.repeated) == (2, 1)

    asyncio.run(scenario())


def test_events_become_events_of_the_node(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            at = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
            row = pb.EventRow(
                sequence=1,
                time=pb.RowTime(wall_ms=int(at.timestamp() * 1000)),
                severity="warning",
                reason="WorkerCrashed",
                message="The worker ended.",
                object="model/tiny",
            )
            payload = zlib.compress(pb.EventRows(rows=[row]).SerializeToString())
            batch = pb.Batch(stream="events", epoch=2, first=1, last=1, payload=payload)
            fleet.send("events", batch.SerializeToString())
            await fleet.acks.next()
            assert await fleet.rows("SELECT at, severity, object, reason, message FROM events") == [
                (at, "warning", "node/edge-1", "WorkerCrashed", "The worker ended. (model/tiny)")
            ]

    asyncio.run(scenario())


def test_bad_messages_are_counted_and_do_no_harm(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            fleet.send("metrics", b"\xff\xff")
            fleet.send("events", metrics(1, 1))
            fleet.send("metrics", metrics(1, 1), node_id="stranger")
            fleet.send("metrics", metrics(5, 9))
            fleet.send("metrics", metrics(7, 12))
            fleet.send("metrics", metrics(10, 11))
            told = [await fleet.acks.next()]
            while (10, 11) not in told[-1][3]:
                told.append(await fleet.acks.next())
            assert {node_id for node_id, *_ in told} == {fleet.node_id}
            bad = fleet.ingest.counters.bad
            assert bad["mismatch"] == bad["unknown_node"] == bad["overlap"] == 1
            assert bad["malformed"] >= 1
            assert await fleet.rows("SELECT first, last FROM outbox_ranges") == [(5, 11)]
            assert await fleet.rows("SELECT count(*) FROM node_metrics") == [(7,)]

    asyncio.run(scenario())


def test_the_presence_of_a_deleted_node_is_passed_over(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    """A broker keeps it, and tells it each time the ingester connects."""

    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            fleet.send("presence", pb.Presence(online=True).SerializeToString(), node_id="deleted", retain=True)
            fleet.send("metrics", metrics(1, 1))
            await fleet.acks.next()
            fleet.send("presence", b"", node_id="deleted", retain=True)
            assert fleet.ingest.counters.bad.keys() == {"malformed"}

    asyncio.run(scenario())


def test_presence_is_stored_hinted_and_an_old_last_will_is_passed_over(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            async with fleet.engine.begin() as connection:
                await connection.execute(
                    sa.insert(tables.node_sessions).values(node_id=fleet.node_id, replica_id="r", epoch=3)
                )
            listener = await asyncpg.connect(migrated_postgres_url)
            hints: asyncio.Queue[str] = asyncio.Queue()
            await listener.add_listener("slmfleet", lambda _c, _p, _ch, topic: hints.put_nowait(str(topic)))
            try:
                fleet.send("presence", pb.Presence(online=True, session_epoch=3).SerializeToString(), retain=True)
                async with asyncio.timeout(20):
                    assert await hints.get() == f"node:{fleet.node_id}"
                fleet.send("presence", pb.Presence(online=False, session_epoch=2).SerializeToString(), retain=True)
                fleet.send("metrics", metrics(1, 1))
                await fleet.acks.next()
                assert await fleet.rows("SELECT presence FROM nodes") == [(True,)]
                fleet.send("presence", pb.Presence(online=False, session_epoch=3).SerializeToString(), retain=True)
                async with asyncio.timeout(20):
                    assert await hints.get() == f"node:{fleet.node_id}"
                assert await fleet.rows("SELECT presence FROM nodes") == [(False,)]
            finally:
                await listener.close()
                fleet.send("presence", b"", retain=True)

    asyncio.run(scenario())


def test_nothing_is_lost_while_the_database_refuses(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    """Far more batches than may be unacknowledged arrive while the table can't be written; all are there afterwards."""

    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            async with fleet.engine.begin() as connection:
                await connection.execute(sa.text("ALTER TABLE node_metrics RENAME TO elsewhere"))
            count = 1500
            for number in range(1, count + 1):
                fleet.send("metrics", metrics(number, number))
            await eventually(lambda: fleet.ingest.counters.retries, "the ingester tries again")
            assert fleet.acks.told.empty()
            assert fleet.ingest.waiting <= 1000
            async with fleet.engine.begin() as connection:
                await connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO node_metrics"))
            acknowledged: set[int] = set()
            while len(acknowledged) < count:
                *_, ranges = await fleet.acks.next()
                acknowledged |= {first for first, _ in ranges}
            assert await fleet.rows("SELECT count(*) FROM node_metrics") == [(count,)]
            assert await fleet.rows("SELECT first, last FROM outbox_ranges") == [(1, count)]

    asyncio.run(scenario())


def test_nothing_is_lost_when_the_broker_sends_more_than_it_may(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    """Mosquitto 2.0.11 does, to a reader that is slower than the writers."""

    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt, window=50).running() as fleet:
            count, most = 1500, 0
            for number in range(1, count + 1):
                fleet.send("metrics", metrics(number, number))
            acknowledged: set[int] = set()
            while len(acknowledged) < count:
                *_, ranges = await fleet.acks.next()
                acknowledged |= {first for first, _ in ranges}
                most = max(most, fleet.ingest.waiting)
            assert most <= 50
            assert await fleet.rows("SELECT first, last FROM outbox_ranges") == [(1, count)]

    asyncio.run(scenario())


def test_two_ingesters_store_each_batch_once(migrated_postgres_url: str, mqtt: Mqtt) -> None:
    async def scenario() -> None:
        async with Fleet(migrated_postgres_url, mqtt).running() as fleet:
            settings = MqttSettings(mqtt.host, mqtt.port, mqtt.username, mqtt.password)
            acks = Acks()
            other = Ingest(fleet.engine, settings, acks, f"test-{uuid.uuid4()}")
            async with asyncio.TaskGroup() as group:
                task = group.create_task(other.run(), name="other")
                async with asyncio.timeout(20):
                    while not other.counters.bad:
                        fleet.send("metrics", b"no batch", node_id="nobody")
                        await asyncio.sleep(0.05)
                for number in range(1, 201):
                    fleet.send("metrics", metrics(10 * number, 10 * number + 9))
                for told in (fleet.acks, acks):
                    seen: set[int] = set()
                    while len(seen) < 200:
                        *_, ranges = await told.next()
                        seen |= {first for first, _ in ranges}
                task.cancel()
            assert await fleet.rows("SELECT count(*) FROM node_metrics") == [(2000,)]
            assert fleet.ingest.counters.batches + other.counters.batches == 200

    asyncio.run(scenario())
