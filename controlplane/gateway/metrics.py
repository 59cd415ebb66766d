"""What the gateway counts, in Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats/).

Labels are names of targets that exist (never what a caller made up) and words of a fixed set.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Cumulative buckets of seconds, one series a target."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, target: str, seconds: float) -> None:
        """Count one value."""
        counts = self._counts.setdefault(target, [0] * (len(_BOUNDS_S) + 1))
        counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self._sums[target] = self._sums.get(target, 0.0) + seconds

    def lines(self, name: str) -> Iterator[str]:
        """The series, as text."""
        for target, counts in self._counts.items():
            running = 0
            for bound, count in zip((*_BOUNDS_S, "+Inf"), counts, strict=True):
                running += count
                yield f'{name}_bucket{{target="{target}",le="{bound}"}} {running}'
            yield f'{name}_sum{{target="{target}"}} {self._sums[target]:.6f}'
            yield f'{name}_count{{target="{target}"}} {running}'


class Metrics:
    """All counters of one gateway. Owned by the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()  # (target, result)
        self.tokens: Counter[tuple[str, str]] = Counter()  # (target, "prompt" or "completion")
        self.retries: Counter[str] = Counter()
        self.first_byte_s = Histogram()
        self.total_s = Histogram()

    def text(self, outstanding: int) -> str:
        """Everything, one line a series."""
        parts: list[str] = []
        parts += _head("slmfleet_gateway_requests_total", "counter", "Requests by target and result.")
        parts += _series("slmfleet_gateway_requests_total", ("target", "result"), self.requests.items())
        parts += _head("slmfleet_gateway_tokens_total", "counter", "Tokens, where the answer told them.")
        parts += _series("slmfleet_gateway_tokens_total", ("target", "kind"), self.tokens.items())
        parts += _head("slmfleet_gateway_retries_total", "counter", "Requests that another replica was asked.")
        retries = (((target,), count) for target, count in self.retries.items())
        parts += _series("slmfleet_gateway_retries_total", ("target",), retries)
        parts += _head("slmfleet_gateway_outstanding", "gauge", "Requests that replicas work on now.")
        parts.append(f"slmfleet_gateway_outstanding {outstanding}")
        parts += _head("slmfleet_gateway_first_byte_seconds", "histogram", "From arrival to the answer's first byte.")
        parts += self.first_byte_s.lines("slmfleet_gateway_first_byte_seconds")
        parts += _head("slmfleet_gateway_seconds", "histogram", "From arrival to the answer's end.")
        parts += self.total_s.lines("slmfleet_gateway_seconds")
        return "\n".join(parts) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _series(name: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], int]]) -> Iterator[str]:
    for key, value in sorted(values, key=lambda item: tuple(item[0])):
        pairs = ",".join(f'{label}="{word}"' for label, word in zip(labels, key, strict=True))
        yield f"{name}{{{pairs}}} {value}"
