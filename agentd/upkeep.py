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


async def keep_slim(last_request_s: Callable[[], float]) -> None:
    """Trim once after each busy time (and once after the start). ``last_request_s``: CLOCK_BOOTTIME."""
    trimmed_after = -1.0
    while True:
        await asyncio.sleep(LOOK_EVERY_S if trimmed_after >= 0 else 5.0)
        last = last_request_s()
        if last != trimmed_after and boottime_s() - last >= IDLE_S:
            trim()
            trimmed_after = last
