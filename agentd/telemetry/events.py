"""Events: things that happened on the node which an operator wants to read later. They go through the outbox."""

from __future__ import annotations

from collections.abc import Callable

from agentd.device.clock import boottime_s, wall_s
from agentd.store.database import STORAGE_ERRORS
from agentd.store.outbox import Outbox
from slmfleet import logs
from slmfleet.v1 import telemetry_pb2 as pb

log = logs.get(__name__)

STREAM = "events"


class EventLog:
    """Writes events to the outbox; ``written`` is called after each."""

    def __init__(self, outbox: Outbox, written: Callable[[], None]) -> None:
        self._outbox = outbox
        self._written = written

    async def record(self, severity: str, reason: str, message: str, subject: str = "") -> None:
        """``severity``: info, warning, error; ``reason``: CamelCase; ``message``: a sentence, never a prompt.

        An event that can't be written is in the log alone: what it tells of must go on.
        """
        row = pb.EventRow(severity=severity, reason=reason, message=message[:2000], object=subject, time=row_time())

        def numbered(sequence: int) -> bytes:
            row.sequence = sequence
            return row.SerializeToString()

        try:
            await self._outbox.append(STREAM, [numbered])
        except STORAGE_ERRORS as error:
            log.warning("an event could not be stored", event=reason, text=message[:200], error=error)
            return
        self._written()


def row_time() -> pb.RowTime:
    """Both clocks, now."""
    return pb.RowTime(wall_ms=int(wall_s() * 1000), boottime_ms=int(boottime_s() * 1000))
