"""How many requests run at once in all workers of a node, and whose turn it is when that is the limit.

There are no books: how many run is asked of the owners each time, so a worker that dies takes no place with it. All of
this happens on one event loop without a wait in between, so what is asked is so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

# Smaller goes first; the order of two ranks does not change while both wait (see admission.rank).
Rank = tuple[float, float, str]


class Contender(Protocol):
    """What is asked of an owner."""

    @property
    def running(self) -> int:
        """Requests that its worker serves now."""
        ...

    @property
    def turn(self) -> Rank | None:
        """Rank of its best waiting request; None if it could not start one now."""
        ...

    def wake(self) -> None:
        """Have it look again."""
        ...


class Places:
    """The node's places for running requests. ``limit`` is asked each time; 0 = no limit."""

    def __init__(self, limit: Callable[[], int], contenders: Callable[[], Iterable[Contender]]) -> None:
        self._limit = limit
        self._contenders = contenders

    def may_start(self, contender: Contender) -> bool:
        """True if ``contender`` may start its best request now."""
        return self._is_free() and (not self._limit() or self._best() is contender)

    def look(self, contender: Contender) -> None:
        """``contender`` has done what it could: if a place is free, wake the one whose turn it is."""
        if self._limit() and self._is_free():
            best = self._best()
            if best is not None and best is not contender:
                best.wake()

    def _is_free(self) -> bool:
        limit = self._limit()
        return not limit or sum(contender.running for contender in self._contenders()) < limit

    def _best(self) -> Contender | None:
        ranked = [(turn, contender) for contender in self._contenders() if (turn := contender.turn) is not None]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None
