"""The ``Range`` header, as far as downloads need it (RFC 9110, section 14.1.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*")


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` to ``end``, the end excluded."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """The range lies outside the content."""


def parse_range(header: str | None, size: int) -> Range | Unsatisfiable | None:
    """The one range that is asked for. None: all of it; also for several ranges and for what is no range, which a
    server may ignore."""
    match = _ONE.fullmatch(header) if header else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        length = int(match[2])
        return Range(max(size - length, 0), size) if length and size else Unsatisfiable()
    start = int(match[1])
    last = int(match[2]) if match[2] else size - 1
    if match[2] and last < start:
        return None
    return Range(start, min(last + 1, size)) if start < size else Unsatisfiable()
