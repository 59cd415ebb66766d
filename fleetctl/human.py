"""Numbers and times as an operator reads them. Pure: the present is an argument."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any


def parse_time(text: Any) -> datetime.datetime | None:
    """A moment of RFC 3339 text; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def duration(seconds: float) -> str:
    """``45s``, ``5m12s``, ``95m``, ``5h30m``, ``30h``, ``5d3h``, ``12d``: two places where they matter, as kubectl."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    return f"{days}d"


def _two(great: int, great_unit: str, small: int, small_unit: str) -> str:
    return f"{great}{great_unit}{small}{small_unit}" if small else f"{great}{great_unit}"


def age(text: Any, now: datetime.datetime) -> str:
    """How long ago; ``-`` when it is not known."""
    moment = parse_time(text)
    return duration((now - moment).total_seconds()) if moment else "-"


def until(text: Any, now: datetime.datetime) -> str:
    """``in 55m``, or ``expired 3m ago``."""
    moment = parse_time(text)
    if moment is None:
        return "-"
    left = (moment - now).total_seconds()
    return f"in {duration(left)}" if left > 0 else f"expired {duration(-left)} ago"


def labels(value: Any) -> str:
    """``hw=pi5,site=lyon``, sorted; ``-`` for none."""
    if not isinstance(value, Mapping) or not value:
        return "-"
    return ",".join(f"{key}={text}" for key, text in sorted(value.items()))


def percent(done: Any, total: Any) -> str:
    """``45%``; empty when the total is not known."""
    if not isinstance(done, (int, float)) or not isinstance(total, (int, float)) or total <= 0:
        return ""
    return f"{100 * min(done, total) / total:.0f}%"
