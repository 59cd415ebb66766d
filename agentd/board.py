"""Where statuses are put up: written by convergence, read by the session, each reader told when something changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from agentd.convergence import conditions
from slmfleet.v1 import state_pb2 as pb


class StatusBoard:
    """The newest status of every assignment. All on one event loop; ``statuses`` is replaced, never changed."""

    def __init__(self) -> None:
        self.statuses: Mapping[str, pb.AssignmentStatus] = {}
        self._changed = asyncio.Event()

    def put_up(self, current: Iterable[pb.AssignmentStatus], now_ms: int) -> list[pb.AssignmentStatus]:
        """Replace all statuses; those that differ from before, for the log."""
        stamped = conditions.stamp(self.statuses, current, now_ms)
        news = [status for key, status in stamped.items() if self.statuses.get(key) != status]
        if news or stamped.keys() != self.statuses.keys():
            self.statuses = stamped
            self._changed.set()
            self._changed = asyncio.Event()
        return news

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set at the next change. Take it before reading ``statuses``: then no change is missed."""
        return self._changed
