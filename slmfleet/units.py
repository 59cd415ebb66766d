"""Sizes and durations as people write them, to plain numbers and back."""

from __future__ import annotations

import re

_SIZE_UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KI": 2**10, "KIB": 2**10, "MI": 2**20, "MIB": 2**20, "GI": 2**30, "GIB": 2**30, "TI": 2**40, "TIB": 2**40,
}  # fmt: skip
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_size(value: str | int) -> int:
    """Bytes of ``"4Gi"`` (binary), ``"4GB"`` (decimal), ``"512"`` or ``512``.

    Raises ValueError with a sentence that names the value and gives examples.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is no size: it is negative")
        return value
    match = _NUMBER_AND_UNIT.fullmatch(value) if isinstance(value, str) else None
    factor = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{value!r} is no size: write bytes, or a number with a unit, such as 512Mi, 4Gi or 4GB")
    # A float would round whole numbers above 2**53.
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_size(size: float) -> str:
    """``98.4 MB``: three significant places, decimal units, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_duration(value: str | float) -> float:
    """Seconds of ``"10m"``, ``"1h30m"``, ``"250ms"``, ``"45"``, ``45`` or ``-1`` (by convention: never).

    Raises ValueError with a sentence that names the value and gives examples.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    text = value.strip() if isinstance(value, str) else ""
    try:
        return float(text)
    except ValueError:
        pass
    if not _DURATION.fullmatch(text):
        raise ValueError(
            f"{value!r} is no duration: write seconds, or a number with a unit, such as 250ms, 30s, 10m or 1h30m"
        )
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(text))
