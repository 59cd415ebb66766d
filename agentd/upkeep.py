"""Keeping an idle daemon small: what a burst of requests left in malloc's arenas goes back to the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

from agentd.device.clock import boottime_s

_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)
_M_ARENA_MAX = -8
# The session, the broker and the first telemetry are up within the first of these pauses, on slow devices the second.
AFTER_START_S = (2.0, 8.0)
LOOK_EVERY_S = 30.0
IDLE_S = 20.0


def own_memory_bytes() -> int:
    """Proportional set size of this process; 0 where the kernel does not tell."""
    with contextlib.suppress(OSError):
        match = _PSS.search(Path("/proc/self/smaps_rollup").read_bytes())
        return int(match[1]) * 1024 if match else 0
    return 0


def few_arenas() -> None:
    """One malloc arena for all threads: glibc gives each thread its own, and what it frees there stays there.

    Does nothing on a C library without mallopt (musl).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give free memory back to the kernel. Does nothing on a C library without malloc_trim."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Upkeep:
    """Trims after the start, after each busy time, and when a model was unloaded. ``last_request_s``: when a request
    last ended (CLOCK_BOOTTIME); ``in_flight``: how many run."""

    def __init__(self, last_request_s: Callable[[], float], in_flight: Callable[[], int]) -> None:
        self._last_request_s = last_request_s
        self._in_flight = in_flight
        self._wake = asyncio.Event()

    def poke(self) -> None:
        """A worker ended: what its requests left here can go, too."""
        self._wake.set()

    async def run(self) -> None:
        """Trim until cancelled."""
        pauses = list(AFTER_START_S)
        trimmed_after_s = self._last_request_s()
        while True:
            pause_s = pauses.pop(0) if pauses else None
            poked = await self._poked_within(pause_s or LOOK_EVERY_S)
            last_s = self._last_request_s()
            rested = last_s != trimmed_after_s and (poked or boottime_s() - last_s >= IDLE_S)
            if not self._in_flight() and (pause_s is not None or rested):
                trim()
                trimmed_after_s = last_s

    async def _poked_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True
