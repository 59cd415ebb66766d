"""What a model took when it was loaded on this device: it corrects the estimate of the next load, in this life of
agentd or a later one. Plain values and their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from agentd.models.types import ModelKey

# Models that were measured most lately are kept; more of them than any device holds.
_KEPT = 200


@dataclass(frozen=True, slots=True)
class Measurement:
    """``shape`` says for which files and settings it counts (see ``launcher.Prepared``); another shape is another
    estimate."""

    shape: str
    # Peak of the proportional set size, bytes.
    memory_bytes: int
    # From the spawn to readiness.
    load_seconds: float


def to_json(measured: Mapping[ModelKey, Measurement]) -> str:
    """As it is stored."""
    newest = list(measured.items())[-_KEPT:]
    return json.dumps([[*key, m.shape, m.memory_bytes, round(m.load_seconds, 3)] for key, m in newest])


def from_json(text: str | None) -> dict[ModelKey, Measurement]:
    """What was stored; empty if that is nothing or unreadable, since an estimate will do."""
    try:
        rows = json.loads(text or "[]")
        return {
            ModelKey(str(model), str(version), str(variant)): Measurement(str(shape), int(memory), float(seconds))
            for model, version, variant, shape, memory, seconds in rows
        }
    except (ValueError, TypeError):
        return {}
