"""What the device does now: one cheap look at /proc through psutil."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import psutil

from agentd.upkeep import own_memory_bytes
from slmfleet.v1 import telemetry_pb2 as pb


class Sampler:
    """Samples the device. Counters of the system are turned into figures since the last sample."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._network: tuple[int, int] | None = None
        psutil.cpu_percent(interval=None)

    def sample(self, row: pb.MetricRow) -> None:
        """Fill in the fields that describe the device. Takes about a millisecond."""
        memory = psutil.virtual_memory()
        row.cpu_fraction = psutil.cpu_percent(interval=None) / 100
        row.memory_total_bytes = memory.total
        row.memory_used_bytes = memory.total - memory.available
        row.disk_free_bytes = shutil.disk_usage(self._disk).free
        row.load1 = os.getloadavg()[0]
        row.agentd_memory_bytes = own_memory_bytes()
        self._sample_network(row)
        temperature = _temperature_c()
        if temperature is not None:
            row.temperature_c = temperature
        battery = _battery_fraction()
        if battery is not None:
            row.battery_fraction = battery

    def _sample_network(self, row: pb.MetricRow) -> None:
        counters = psutil.net_io_counters(nowrap=True)
        now = (counters.bytes_sent, counters.bytes_recv) if counters else (0, 0)
        if self._network is not None:
            row.network_sent_bytes = max(now[0] - self._network[0], 0)
            row.network_received_bytes = max(now[1] - self._network[1], 0)
        self._network = now


def _temperature_c() -> float | None:
    with contextlib.suppress(OSError, AttributeError):
        found = [entry.current for entries in psutil.sensors_temperatures().values() for entry in entries]
        return max(found, default=None)
    return None


def _battery_fraction() -> float | None:
    with contextlib.suppress(OSError, AttributeError):
        battery = psutil.sensors_battery()
        return battery.percent / 100 if battery else None
    return None
