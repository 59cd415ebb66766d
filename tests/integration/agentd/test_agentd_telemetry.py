"""Telemetry through a real broker: presence, batches, and deletion only when the control plane says so."""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt_client
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agentd.models.counters import ModelCounters
from agentd.models.types import ModelKey
from agentd.store.database import Database
from agentd.store.outbox import Outbox
from agentd.telemetry.events import EventLog
from agentd.telemetry.ledger import Ledger
from agentd.telemetry.publisher import Publisher
from agentd.telemetry.recorder import Recorder
from slmfleet.v1 import session_pb2
from slmfleet.v1 import telemetry_pb2 as pb
from tests.support.fake_controlplane import Log, running
from tests.support.fake_host import FakeHost
from tests.support.mqtt import Mqtt

pytestmark = pytest.mark.mqtt


class Listener:
    """Subscribes to one node's topics; what comes is in ``log`` as (stream, bytes)."""

    def __init__(self, broker: Mqtt, node: str) -> None:
        self.log = Log()
        self._broker = broker
        self._node = node
        self._client = mqtt_client.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        if broker.username:
            self._client.username_pw_set(broker.username, broker.password)

    async def __aenter__(self) -> Listener:
        loop = asyncio.get_running_loop()
        subscribed = asyncio.Event()

        def came(_client: Any, _data: Any, message: mqtt_client.MQTTMessage) -> None:
            item = (message.topic.rpartition("/")[2], message.payload)
            asyncio.run_coroutine_threadsafe(self.log.add(item), loop)

        def ready(*_: Any) -> None:
            loop.call_soon_threadsafe(subscribed.set)

        self._client.on_message = came
        self._client.on_subscribe = ready
        self._client.connect(self._broker.host, self._broker.port)
        self._client.loop_start()
        self._client.subscribe(f"slmfleet/v1/{self._node}/#", qos=1)
        await subscribed.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    async def presence(self, online: bool, epoch: int) -> None:
        def fits(item: tuple[str, bytes]) -> bool:
            if item[0] != "presence":
                return False
            found = pb.Presence.FromString(item[1])
            return found.online is online and found.session_epoch == epoch and found.boot_id == "b1"

        await self.log.wait(fits)

    async def batch(self, stream: str, after: int = 0) -> pb.Batch:
        item = await self.log.wait(lambda item: item[0] == stream, after)
        return pb.Batch.FromString(item[1])


class Rig:
    """The telemetry of one node."""

    def __init__(self, database: Database, broker: Mqtt, node: str) -> None:
        self.node = node
        self.outbox = Outbox(database, "b1", 10**6)
        self.publisher = Publisher(self.outbox, node, "b1", lambda: pytest.fail("no TLS here"))
        self.events = EventLog(self.outbox, self.publisher.poke)
        self._broker = broker

    def endpoint(self) -> session_pb2.MqttEndpoint:
        return session_pb2.MqttEndpoint(
            host=self._broker.host, port=self._broker.port, username=self._broker.username or "",
            password=self._broker.password or "",
        )  # fmt: skip

    async def acknowledge(self, batch: pb.Batch, credit: int = 8) -> None:
        span = session_pb2.Range(first=batch.first, last=batch.last)
        await self.publisher.acknowledge(
            session_pb2.OutboxAck(stream=batch.stream, epoch=batch.epoch, ranges=[span], credit=credit)
        )


@asynccontextmanager
async def rigged(path: Path, broker: Mqtt) -> AsyncIterator[tuple[Rig, Listener]]:
    node = f"id-{secrets.token_hex(6)}"
    database = await Database.open(path / "store.db")
    async with Listener(broker, node) as listener:
        yield Rig(database, broker, node), listener
    await database.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def messages(batch: pb.Batch) -> list[str]:
    return [row.message for row in pb.EventRows.FromString(zlib.decompress(batch.payload)).rows]


def test_presence_is_retained_and_follows_the_session(tmp_path: Path, mqtt: Mqtt) -> None:
    async def test() -> None:
        async with rigged(tmp_path, mqtt) as (rig, listener):
            async with running(rig.publisher.run(), "publisher"):
                rig.publisher.use(rig.endpoint(), 3)
                await listener.presence(online=True, epoch=3)
                async with Listener(mqtt, rig.node) as late:
                    await late.presence(online=True, epoch=3)
                rig.publisher.use(rig.endpoint(), 4)
                await listener.presence(online=True, epoch=4)
            await listener.presence(online=False, epoch=4)

    run(test)


def test_rows_reach_the_broker_and_stay_until_they_are_acknowledged(tmp_path: Path, mqtt: Mqtt) -> None:
    async def test() -> None:
        async with rigged(tmp_path, mqtt) as (rig, listener):
            # Written before there is any broker: they wait.
            await rig.events.record("info", "Started", "agentd started")
            await rig.events.record("warning", "DiskFull", "the disk is full", "artifact/x")
            async with running(rig.publisher.run(), "publisher"):
                rig.publisher.use(rig.endpoint(), 1)
                batch = await listener.batch("events")
                assert (batch.first, batch.last, batch.dropped, batch.boot_id) == (1, 2, 0, "b1")
                assert messages(batch) == ["agentd started", "the disk is full"]
                assert (await rig.outbox.size()).batches == 1
                await rig.acknowledge(batch)
                assert (await rig.outbox.size()).batches == 0
                seen = len(listener.log.items)
                await rig.events.record("info", "More", "more")
                assert (await listener.batch("events", after=seen)).first == 3

    run(test)


def test_credit_bounds_what_is_sent_and_the_rest_follows(tmp_path: Path, mqtt: Mqtt) -> None:
    async def test() -> None:
        async with rigged(tmp_path, mqtt) as (rig, listener):
            async with running(rig.publisher.run(), "publisher"):
                rig.publisher.use(rig.endpoint(), 1)
                await rig.events.record("info", "A", "a")
                first = await listener.batch("events")
                await rig.acknowledge(first, credit=0)
                for text in "bcd":
                    seen = len(listener.log.items)
                    await rig.events.record("info", "More", text)
                    if text == "b":
                        second = await listener.batch("events", after=seen)
                # Only one is on its way; the other rows wait uncut.
                size = await rig.outbox.size()
                assert (size.batches, size.rows) == (1, 2)
                seen = len(listener.log.items)
                await rig.acknowledge(second, credit=5)
                assert messages(await listener.batch("events", after=seen)) == ["c", "d"]

    run(test)


def test_what_was_not_acknowledged_is_published_again_after_a_restart(tmp_path: Path, mqtt: Mqtt) -> None:
    async def test() -> None:
        node = f"id-{secrets.token_hex(6)}"
        batches = []
        for _ in range(2):
            database = await Database.open(tmp_path / "store.db")
            rig = Rig(database, mqtt, node)
            if not batches:
                await rig.events.record("info", "A", "a")
            async with Listener(mqtt, node) as listener, running(rig.publisher.run(), "publisher"):
                rig.publisher.use(rig.endpoint(), 1)
                batches.append(await listener.batch("events"))
            await database.close()
        assert batches[0] == batches[1]

    run(test)


def test_a_row_describes_the_device_and_its_models(tmp_path: Path, mqtt: Mqtt) -> None:
    async def test() -> None:
        async with rigged(tmp_path, mqtt) as (rig, listener):
            key = ModelKey("m", "1", "q4")
            waiting = [{key: ModelCounters(requests_ok=4, output_tokens=9)}]
            ledger = Ledger(lambda: waiting.pop() if waiting else {})
            recorder = Recorder(
                rig.outbox, FakeHost(), ledger, tmp_path, lambda: 0.2, lambda: 3, rig.publisher.poke
            )  # fmt: skip
            async with running(rig.publisher.run(), "publisher"), running(recorder.run(), "recorder"):
                rig.publisher.use(rig.endpoint(), 1)
                batch = await listener.batch("metrics")
                (row, *_) = pb.MetricRows.FromString(zlib.decompress(batch.payload)).rows
                assert row.sequence == batch.first == 1
                assert row.time.wall_ms > 1.7e12
                assert row.time.boottime_ms > 0
                assert 0 < row.memory_used_bytes < row.memory_total_bytes
                assert row.agentd_memory_bytes > 10**6
                assert row.disk_free_bytes > 0
                assert row.in_flight == 3
                assert (row.models[0].model, row.models[0].requests_ok, row.models[0].output_tokens) == ("m@1", 4, 9)
                seen = len(listener.log.items)
                later = await listener.batch("metrics", after=seen)
                assert later.first > batch.last

    run(test)
