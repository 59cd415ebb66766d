"""One worker's life as its owner sees it, and what is judged of it. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from agentd.models.process import Exit, Worker
from slmfleet.units import format_size
from slmfleet.v1.worker_pb2 import WorkerRequest

# llama.cpp: "0.00.004.025 E llama_model_load: error loading model: ...".
_LOG_PREFIX = re.compile(r"^[\d.]+ [EF] +\S+: +")
# Tokens per second under this share of what was measured, while tasks wait for memory for more than this share of time:
# the kernel takes pages of weights away as fast as they are read. Tried with a tight cgroup: 13 times slower.
SLOW_SHARE = 0.25
_STALLED_SHARE = 0.1
# Slower than this, whatever the kernel says: no other cause makes a model so slow for so long.
_VERY_SLOW_SHARE = 0.1


@dataclass(slots=True)
class Life:
    """One worker, from the decision to start it to its end. ``serial`` names it in events."""

    serial: int = 0
    started_s: float = 0.0
    # What it is told to load: the settings may change before it is spawned.
    load: WorkerRequest = field(default_factory=WorkerRequest)
    worker: Worker | None = None
    slots: int = 1
    ready_s: float | None = None
    # Why it is to go as soon as nobody uses it; why we killed it; what it said before it ended by itself.
    leave: str = ""
    verdict: str = ""
    failure: str = ""
    # The last request's wish.
    keep_alive_s: float | None = None
    # When it was measured, and its bytes then.
    memory: tuple[float, int] = (0.0, 0)
    # Why it is far slower than it was; "" when it is not.
    thrashing: str = ""


def why(failure: str, how: Exit) -> str:
    """One sentence about an end that nobody asked for: what the worker said, else its status and last lines."""
    errors = [_LOG_PREFIX.sub("", line) for line in how.lines if _LOG_PREFIX.match(line)]
    said = errors[0] if errors else "; ".join(how.lines[-3:])
    if failure:
        return f"{failure}: {said}" if errors else failure
    return f"the worker {how}: {said}" if said else f"the worker {how}"


def over_limit(memory_bytes: int, limit_bytes: int) -> str:
    """Why a worker that no cgroup holds must be ended; "" if it may go on."""
    if not limit_bytes or memory_bytes <= limit_bytes:
        return ""
    return f"it took {format_size(memory_bytes)}, more than its limit of {format_size(limit_bytes)}"


def thrash(tokens_per_s: float, usual_per_s: float | None, stalled: float) -> str:
    """Why a model counts as thrashing; "" if it does not. ``stalled``: share of time in which tasks wait for memory."""
    if not usual_per_s or tokens_per_s >= usual_per_s * SLOW_SHARE:
        return ""
    if stalled < _STALLED_SHARE and tokens_per_s >= usual_per_s * _VERY_SLOW_SHARE:
        return ""
    return (
        f"it gives {tokens_per_s:.1f} tokens/s instead of {usual_per_s:.1f}, and tasks wait for memory "
        f"{stalled:.0%} of the time: its memory limit or the device is too small, or too much else runs"
    )
