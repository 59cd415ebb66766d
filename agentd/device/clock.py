"""The clocks of a device. Durations use CLOCK_BOOTTIME: a monotonic clock stops while the device sleeps."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_own_boot_id = str(uuid.uuid4())


def boottime_s() -> float:
    """Seconds since the device booted, time in suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_s() -> float:
    """Seconds since 1970 by the device's clock, which may be wrong."""
    return time.time()


def boot_id() -> str:
    """The kernel's random id of this boot; an id of this process where the kernel tells none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return _own_boot_id
