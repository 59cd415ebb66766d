"""Medians with their uncertainty. Pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

RESAMPLES = 10_000


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the rounds' ratios: round i of ours by round i of the baseline, which ran right beside it."""
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=True))


def ratio_interval(ours: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """95 % interval of ``ratio``."""
    return interval([a / b for a, b in zip(ours, baseline, strict=True)], statistics.median)


def interval(values: Sequence[float], figure: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """95 % bootstrap interval of a figure (Efron's percentile method); the same values give the same interval."""
    chance = random.Random(20261122)
    figures = sorted(figure(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return figures[int(0.025 * RESAMPLES)], figures[int(0.975 * RESAMPLES) - 1]


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least ``fraction`` of all values do not exceed (nearest rank, no interpolation)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * fraction // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)]
