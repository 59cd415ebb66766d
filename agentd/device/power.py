"""How much the device should spend on models: a profile from battery, heat and throttling, with its reason.

Readings come from sysfs: ``Documentation/ABI/testing/sysfs-class-power`` and ``sysfs-class-thermal`` of the kernel,
``thermal_throttle`` of x86, and ``get_throttled`` of the Raspberry Pi's firmware. What a device lacks is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agentd.models.settings import Tuning

# Below this share of the battery every minute counts; it must be well over it again to leave the profile.
_LOW_BATTERY, _BATTERY_MARGIN = 0.30, 0.05
# Degrees below the device's own hot point (else 85, where most boards begin to throttle) that count as warm.
_HOT_C, _WARM_BELOW_C, _HEAT_MARGIN_C = 85.0, 10.0, 5.0
# Bits 0 to 3 of the Raspberry Pi's register: under-voltage, frequency capped, throttled, soft temperature limit. Now.
_PI_NOW = 0xF
# Temperatures outside of this come from sensors that are not there.
_SANE_C = (-40.0, 150.0)


class Profile(StrEnum):
    """From the most to the least that models get."""

    PERFORMANCE = "performance"
    BALANCED = "balanced"
    SAVER = "saver"


@dataclass(frozen=True, slots=True)
class Readings:
    """What the device says of itself; None = it does not say."""

    on_battery: bool | None = None
    # 0 to 1.
    battery_fraction: float | None = None
    temperature_c: float | None = None
    # Where the device itself begins to slow down or switch off.
    hot_c: float | None = None
    # The processor was slowed down for heat or voltage since the last look.
    throttled: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A profile and why."""

    profile: Profile
    reason: str


def choose(setting: str, readings: Readings, before: Profile | None = None) -> Choice:
    """``setting``: a profile's name, or ``auto``. ``before`` is the profile that holds: leaving a tighter one needs a
    margin, so that a device at the edge does not go to and fro. Pure."""
    if setting != "auto":
        return Choice(Profile(setting), "set by the configuration")
    reasons = list(_saver(readings, before))
    if reasons:
        return Choice(Profile.SAVER, ", ".join(reasons))
    reasons = list(_balanced(readings, before))
    if reasons:
        return Choice(Profile.BALANCED, ", ".join(reasons))
    return Choice(Profile.PERFORMANCE, "on mains power and cool, as far as the device tells")


def tuning(profile: Profile, threads: int) -> Tuning:
    """What a profile means to the model host; ``threads``: what a worker has in ``performance``. Pure."""
    match profile:
        case Profile.PERFORMANCE:
            return Tuning()
        case Profile.BALANCED:
            # Memory is bandwidth-bound work: a few threads less cost little speed and much heat.
            return Tuning(keep_alive_cap_s=120.0, threads=max(1, threads * 3 // 4))
        case Profile.SAVER:
            return Tuning(keep_alive_cap_s=30.0, threads=max(1, threads // 2), slots=1, max_concurrent=1)


def _saver(readings: Readings, before: Profile | None) -> Iterator[str]:
    held = before is Profile.SAVER
    fraction = readings.battery_fraction
    if readings.on_battery and fraction is not None and fraction < _LOW_BATTERY + held * _BATTERY_MARGIN:
        yield f"the battery is at {fraction:.0%}"
    if readings.throttled:
        yield "the processor is being slowed down for heat or voltage"
    hot_c = readings.hot_c or _HOT_C
    if readings.temperature_c is not None and readings.temperature_c >= hot_c - held * _HEAT_MARGIN_C:
        yield f"{readings.temperature_c:.0f} °C"


def _balanced(readings: Readings, before: Profile | None) -> Iterator[str]:
    margin_c = _HEAT_MARGIN_C if before in (Profile.BALANCED, Profile.SAVER) else 0.0
    if readings.on_battery:
        yield "on battery"
    warm_c = (readings.hot_c or _HOT_C) - _WARM_BELOW_C
    if readings.temperature_c is not None and readings.temperature_c >= warm_c - margin_c:
        yield f"{readings.temperature_c:.0f} °C"


class Sensors:
    """Reads them. ``root`` is for tests. Remembers counters, to tell what happened since the last look."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._sys = root / "sys"
        self._throttles: int | None = None

    def read(self) -> Readings:
        """A few small files; some firmwares take milliseconds, so not on an event loop."""
        on_battery, fraction = self._battery()
        temperature, hot = self._temperature()
        return Readings(on_battery, fraction, temperature, hot, self._throttled())

    def _battery(self) -> tuple[bool | None, float | None]:
        fractions, discharging, mains = [], False, False
        for supply in sorted(self._sys.glob("class/power_supply/*")):
            kind = _text(supply / "type")
            if kind in ("Mains", "USB", "Wireless"):
                mains |= _text(supply / "online") == "1"
            # A mouse has a battery, too.
            elif kind == "Battery" and _text(supply / "scope") != "Device":
                capacity = _number(supply / "capacity")
                if capacity is not None:
                    fractions.append(min(max(capacity / 100, 0.0), 1.0))
                discharging |= _text(supply / "status") == "Discharging"
        if not fractions and not discharging:
            return None, None
        return discharging and not mains, min(fractions, default=None)

    def _temperature(self) -> tuple[float | None, float | None]:
        """The hottest zone in proportion to its own limit, and that limit."""
        zones = []
        for zone in self._sys.glob("class/thermal/thermal_zone*"):
            value = _number(zone / "temp")
            if value is not None and _SANE_C[0] < value / 1000 < _SANE_C[1]:
                trips = [trip for trip in _trips(zone) if 40.0 < trip < _SANE_C[1]]
                zones.append((value / 1000, min(trips, default=None)))
        if not zones:
            return None, None
        return max(zones, key=lambda zone: zone[0] - (zone[1] or _HOT_C))

    def _throttled(self) -> bool:
        pi = _text(self._sys / "devices/platform/soc/soc:firmware/get_throttled")
        with contextlib.suppress(ValueError):
            if pi and int(pi, 16) & _PI_NOW:
                return True
        counters = self._sys.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
        counts = [count for file in counters if (count := _number(file)) is not None]
        before, self._throttles = self._throttles, int(sum(counts))
        return before is not None and self._throttles > before


def _trips(zone: Path) -> Iterator[float]:
    """Temperatures at which the kernel slows the device down or switches it off."""
    for kind in zone.glob("trip_point_*_type"):
        if _text(kind) in ("passive", "hot", "critical"):
            value = _number(kind.with_name(kind.name.replace("_type", "_temp")))
            if value is not None:
                yield value / 1000


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file: Path) -> float | None:
    try:
        return float(_text(file))
    except ValueError:
        return None
