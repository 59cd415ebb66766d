"""The loop that all controllers share: wait until woken, load, plan, apply; then again.

Level-triggered: each pass derives everything from the full state. Hints only wake a loop early; a timer always stands
behind them. A pass that raises is logged with its traceback, counted, and tried again with back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.controllers.leadership import DATABASE_AWAY, Leadership
from controlplane.db.leaders import Deposed
from slmfleet import logs

log = logs.get(__name__)

_BACKOFF_FIRST_S, _BACKOFF_CAP_S = 0.5, 30.0
# A burst of hints becomes one pass; and a controller rests at least as long as its last pass took, so that a large
# fleet that never stops talking gets at most half of the processor.
_GATHER_S = 0.02


@dataclass(slots=True)
class Counters:
    """For the metrics page."""

    passes: int = 0
    failures: int = 0
    deposed: int = 0
    last_pass_s: float = 0.0


class Controller(ABC):
    """One loop. A subclass gives ``name``, ``interval_s`` and ``reconcile``."""

    name: ClassVar[str]
    # Seconds after which a pass happens without any hint.
    interval_s: float = 5.0

    def __init__(self, engine: AsyncEngine, leadership: Leadership) -> None:
        self._engine = engine
        self._leadership = leadership
        self._wake = asyncio.Event()
        self.counters = Counters()

    @abstractmethod
    async def reconcile(self, epoch: int) -> float | None:
        """One pass. Writes go through ``leaders.fenced(engine, name, epoch)``.

        Returns the seconds after which the next pass is due without a hint, if that is sooner than ``interval_s``.
        """

    def wants(self, topic: str) -> bool:
        """Whether a hint about ``topic`` matters here; "" means that hints may have been missed."""
        return topic in ("", "spec") or topic.startswith("node:")

    def on_hint(self, topic: str) -> None:
        """Wake up if it matters."""
        if self.wants(topic):
            self._wake.set()

    async def run(self) -> None:
        """Lead and reconcile until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._leadership.run(), name=f"{self.name}-leadership")
            group.create_task(self._loop(), name=f"{self.name}-loop")

    async def _loop(self) -> None:
        failures = 0
        while True:
            epoch = await self._leadership.held()
            self._wake.clear()
            due_s: float | None = None
            started = time.monotonic()
            try:
                due_s = await self.reconcile(epoch)
                failures = 0
            except Deposed as error:
                log.info("pass dropped", controller=self.name, reason=error)
                self.counters.deposed += 1
                self._leadership.lost(epoch)
                continue
            except DATABASE_AWAY as error:
                failures += 1
                log.warning("the database is away, will try again", controller=self.name, error=error)
            except Exception:
                failures += 1
                log.exception("pass failed, will try again", controller=self.name)
            self.counters.passes += 1
            self.counters.last_pass_s = time.monotonic() - started
            if failures:
                self.counters.failures += 1
                await asyncio.sleep(min(_BACKOFF_FIRST_S * 2 ** (failures - 1), _BACKOFF_CAP_S))
            else:
                await self._rest(self.interval_s if due_s is None else min(due_s, self.interval_s))

    async def _rest(self, at_most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(at_most_s, 0.0)):
                await self._wake.wait()
        await asyncio.sleep(max(_GATHER_S, min(self.counters.last_pass_s, 5.0)))
