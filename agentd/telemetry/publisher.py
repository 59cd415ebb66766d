"""Moves batches from the outbox to the broker; they leave the outbox only when the session acknowledges them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentd.device.clock import boottime_s
from agentd.store.database import STORAGE_ERRORS
from agentd.store.outbox import Outbox, SealedBatch
from agentd.telemetry.window import Window
from slmfleet import logs
from slmfleet.v1 import session_pb2
from slmfleet.v1 import telemetry_pb2 as pb

if TYPE_CHECKING:
    # paho is imported when the first broker is known: a node that never sees one does not carry it.
    from agentd.telemetry.broker import Broker

log = logs.get(__name__)

STREAMS = ("events", "metrics")
PERIOD_S = 5.0


class Publisher:
    """Owns the MQTT connection. ``poke`` after rows were written; ``use`` with the broker of each Welcome."""

    def __init__(self, outbox: Outbox, node_id: str, boot_id: str, context: Callable[[], ssl.SSLContext]) -> None:
        self._outbox = outbox
        self._node_id = node_id
        self._boot_id = boot_id
        self._context = context
        self._endpoint: session_pb2.MqttEndpoint | None = None
        self._session_epoch = 0
        self._wake = asyncio.Event()
        self._windows = {stream: Window() for stream in STREAMS}
        self._broker: Broker | None = None
        self._fresh = False

    @property
    def connected(self) -> bool:
        """Whether the broker is connected."""
        return self._broker is not None and self._broker.connected

    def poke(self) -> None:
        """Rows wait."""
        self._wake.set()

    def use(self, endpoint: session_pb2.MqttEndpoint, session_epoch: int) -> None:
        """Publish there from now on."""
        # Acknowledgements come over the session: those of the last one may be lost, and the batches they were for would
        # wait for REPEAT_S. The server drops what it has.
        self._fresh = self._fresh or session_epoch != self._session_epoch
        self._endpoint = endpoint
        self._session_epoch = session_epoch
        self.poke()

    async def acknowledge(self, ack: session_pb2.OutboxAck) -> None:
        """The server committed these batches."""
        ranges = [(item.first, item.last) for item in ack.ranges]
        try:
            if ranges:
                await self._outbox.acknowledge(ack.stream, ack.epoch, ranges)
        except STORAGE_ERRORS as error:
            # They stay, are published again, and are acknowledged again.
            log.warning("an acknowledgement could not be stored", stream=ack.stream, error=error)
        if ack.stream in self._windows:
            self._windows[ack.stream].acknowledge(ack.epoch, ranges, ack.credit)
        self.poke()

    async def run(self) -> None:
        """Publish until cancelled; then say goodbye to the broker."""
        current: session_pb2.MqttEndpoint | None = None
        announced = 0
        try:
            while True:
                if self._endpoint is not None and self._endpoint != current:
                    await self._switch(self._endpoint)
                    current, announced = self._endpoint, self._session_epoch
                elif self._broker is not None and self._broker.connected and announced != self._session_epoch:
                    self._broker.announce()
                    announced = self._session_epoch
                if self.connected:
                    await self._pump_if_possible()
                await self._sleep()
        finally:
            if self._broker is not None:
                # Shielded: this runs while the task is being cancelled.
                await asyncio.shield(self._broker.stop())

    async def _switch(self, endpoint: session_pb2.MqttEndpoint) -> None:
        from agentd.telemetry.broker import Broker, Endpoint

        if self._broker is not None:
            await self._broker.stop()
        where = Endpoint(endpoint.host, endpoint.port, endpoint.username, endpoint.password, endpoint.tls)
        self._broker = Broker(where, self._node_id, self._presence, self._context, self._link_changed)
        self._broker.start()

    def _presence(self, online: bool) -> pb.Presence:
        return pb.Presence(online=online, boot_id=self._boot_id, session_epoch=self._session_epoch)

    def _link_changed(self, connected: bool) -> None:
        self._fresh = self._fresh or connected
        self.poke()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(PERIOD_S):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _pump_if_possible(self) -> None:
        try:
            await self._pump()
        except STORAGE_ERRORS as error:
            log.warning("the outbox can't be read or cut now", error=error, next_try_s=PERIOD_S)
            # Rows come faster than that: no hammering of a disk that is full.
            await asyncio.sleep(PERIOD_S)

    async def _pump(self) -> None:
        if self._fresh:
            self._fresh = False
            for window in self._windows.values():
                window.forget()
        for stream, window in self._windows.items():
            now_s = boottime_s()
            for batch in window.due(now_s):
                self._publish(batch, window, now_s)
            await self._fill(stream, window, now_s)

    async def _fill(self, stream: str, window: Window, now_s: float) -> None:
        """Publish what is sealed and not on its way, then seal more while there is room."""
        for batch in await self._outbox.unacknowledged(stream):
            if not window.room:
                return
            if batch.id not in window.sent and not self._publish(batch, window, now_s):
                return
        while window.room:
            sealed = await self._outbox.cut(stream)
            if sealed is None or not self._publish(sealed, window, now_s):
                return

    def _publish(self, batch: SealedBatch, window: Window, now_s: float) -> bool:
        message = pb.Batch(
            stream=batch.stream, epoch=batch.epoch, first=batch.first, last=batch.last, dropped=batch.dropped,
            boot_id=batch.boot_id, payload=batch.payload,
        )  # fmt: skip
        assert self._broker is not None
        if not self._broker.publish(message):
            return False
        window.publish(batch, now_s)
        return True
