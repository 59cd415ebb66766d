"""Writes one row of telemetry per interval into the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from agentd.device.clock import boottime_s
from agentd.models.types import ModelHost
from agentd.store.database import STORAGE_ERRORS
from agentd.store.outbox import Outbox
from agentd.telemetry.events import row_time
from agentd.telemetry.ledger import Ledger
from agentd.telemetry.rows import model_samples
from slmfleet import logs
from slmfleet.v1 import telemetry_pb2 as pb

log = logs.get(__name__)

STREAM = "metrics"


class Recorder:
    """``interval_s`` is asked before each wait: operators may change it. ``written`` is called after each row."""

    def __init__(
        self,
        outbox: Outbox,
        host: ModelHost,
        ledger: Ledger,
        disk: Path,
        interval_s: Callable[[], float],
        in_flight: Callable[[], int],
        written: Callable[[], None],
    ) -> None:
        self._outbox = outbox
        self._host = host
        self._ledger = ledger
        self._disk = disk
        self._interval_s = interval_s
        self._in_flight = in_flight
        self._written = written
        # Rows in a row that found no room on the disk.
        self._unstored = 0

    async def run(self) -> None:
        """Record until cancelled. A first row comes at once: a node that just started is worth a look."""
        from agentd.telemetry.sampler import Sampler

        sampler = Sampler(self._disk)
        last_s = boottime_s()
        while True:
            now_s = boottime_s()
            row = pb.MetricRow(time=row_time(), interval_s=now_s - last_s, in_flight=self._in_flight())
            last_s = now_s
            sampler.sample(row)
            row.models.extend(model_samples(self._host.status(), self._ledger.since_last_row()))
            await self._store(row)
            await asyncio.sleep(self._interval_s())

    async def _store(self, row: pb.MetricRow) -> None:
        try:
            await self._outbox.append(STREAM, [_numbered(row)])
        except STORAGE_ERRORS as error:
            # The row is gone, the next one tries again. The first of a run and then each doubling is told.
            self._unstored += 1
            if self._unstored & (self._unstored - 1) == 0:
                log.warning("telemetry could not be stored", rows=self._unstored, error=error)
            return
        if self._unstored:
            log.info("telemetry is stored again", rows_lost=self._unstored)
            self._unstored = 0
        self._written()


def _numbered(row: pb.MetricRow) -> Callable[[int], bytes]:
    def serialize(sequence: int) -> bytes:
        row.sequence = sequence
        return row.SerializeToString()

    return serialize
