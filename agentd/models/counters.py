"""What is counted per model: for telemetry rows (differences) and for /metrics (totals)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

# Upper edges in seconds; fixed, so that histograms of all nodes can be added.
SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# Likewise, for the time of one token.
TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket; the last bucket has no upper edge, so ``counts`` has one element more than ``bounds``."""

    bounds: Sequence[float] = SECONDS_BOUNDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS_BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def plus(self, other: Histogram) -> Histogram:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Histogram(self.bounds, counts, self.sum + other.sum)


@dataclass(slots=True)
class ModelCounters:
    """Counts of one model since some moment. Fields as in telemetry.proto's ModelSample."""

    requests_ok: int = 0
    requests_failed: int = 0
    # Refused or cancelled requests are no failures of the model.
    requests_refused: int = 0
    requests_cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    loads: int = 0
    unloads: int = 0
    evictions: int = 0
    crashes: int = 0
    # Times that the model was found far slower than it was, or that agentd's own watch ended a worker.
    thrashes: int = 0
    over_limit: int = 0
    # Refusals by their code.
    refusals: dict[str, int] = field(default_factory=dict)
    first_token_s: Histogram = field(default_factory=Histogram)
    total_s: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)
    load_s: Histogram = field(default_factory=Histogram)
    # Mean time of a token, one value for each answer.
    token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))

    def plus(self, other: ModelCounters) -> ModelCounters:
        """The sum, as a new object."""
        return ModelCounters(**{f.name: _add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, Histogram):
        return a.plus(b)
    if isinstance(a, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in a.keys() | b.keys()}
    return a + b
