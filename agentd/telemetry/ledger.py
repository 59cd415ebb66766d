"""Counts per model, out of the model host, kept twice: since agentd started (``/metrics``) and since the last row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agentd.models.counters import ModelCounters
from agentd.models.types import ModelKey


class Ledger:
    """``take`` gives what the host counted since it was last called; nothing is lost between the two readers."""

    def __init__(self, take: Callable[[], Mapping[ModelKey, ModelCounters]]) -> None:
        self._take = take
        self._totals: dict[ModelKey, ModelCounters] = {}
        self._pending: dict[ModelKey, ModelCounters] = {}

    def totals(self) -> Mapping[ModelKey, ModelCounters]:
        """Since agentd started."""
        self._collect()
        return self._totals

    def since_last_row(self) -> Mapping[ModelKey, ModelCounters]:
        """Since this was last called."""
        self._collect()
        taken, self._pending = self._pending, {}
        return taken

    def refused(self, key: ModelKey, code: str) -> None:
        """A request was refused before it reached the host (its agent's own limits), for this reason."""
        self._add(key, ModelCounters(requests_refused=1, refusals={code: 1}))

    def _collect(self) -> None:
        for key, counters in self._take().items():
            self._add(key, counters)

    def _add(self, key: ModelKey, counters: ModelCounters) -> None:
        for book in (self._totals, self._pending):
            book[key] = book[key].plus(counters) if key in book else counters.plus(ModelCounters())
