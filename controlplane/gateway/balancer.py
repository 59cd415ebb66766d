"""What this gateway knows of each replica beside the database: outstanding requests and failures. One owner: the loop.

``choose`` reads links and counts at the moment of the choice and lets ``domain.routing`` decide.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum

from controlplane.domain import routing
from controlplane.domain.routing import AllBusy, Breaker, Candidate, Chosen, NoneReady
from controlplane.gateway.table import Replica, Target
from controlplane.node_api.links import NodeLinks


class Outcome(Enum):
    """What a request taught about its replica."""

    OK = "ok"
    FAILED = "failed"
    # Busy, or the caller left: neither good nor bad.
    NOTHING = "nothing"


class Balancer:
    """Counts, breakers and the choice."""

    def __init__(
        self,
        links: NodeLinks,
        *,
        most_per_replica: int,
        most_per_target: int,
        silent_s: float,
        clock: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        """``silent_s``: a node that was not heard for so long is not chosen. ``clock``: the event loop's."""
        self._links = links
        self._most_per_replica = most_per_replica
        self._most_per_target = most_per_target
        self._silent_s = silent_s
        self._clock = clock
        self._draw = draw
        self._outstanding: Counter[str] = Counter()
        self._breakers: dict[str, Breaker] = {}

    @property
    def outstanding(self) -> int:
        """Requests under way, over all replicas."""
        return self._outstanding.total()

    def choose(self, target: Target, tried: frozenset[str]) -> Chosen | NoneReady | AllBusy:
        """The replica to ask now."""
        now = self._clock()
        candidates = [self._candidate(replica, now) for replica in target.replicas]
        if sum(one.outstanding for one in candidates) >= self._most_per_target:
            return AllBusy(f"{target.name} has {self._most_per_target} requests already", 1.0)
        return routing.choose(
            target.name,
            candidates,
            now=now,
            draw=self._draw(),
            most_outstanding=self._most_per_replica,
            tried=tried,
        )

    def begin(self, replica: str) -> None:
        """A request goes to the replica; ``finish`` must follow."""
        self._outstanding[replica] += 1
        if breaker := self._breakers.get(replica):
            self._breakers[replica] = routing.begin(breaker, self._clock())

    def finish(self, replica: str, outcome: Outcome) -> None:
        """The request is over."""
        self._outstanding[replica] -= 1
        if self._outstanding[replica] <= 0:
            del self._outstanding[replica]
        breaker = self._breakers.get(replica)
        match outcome:
            case Outcome.FAILED:
                self._breakers[replica] = routing.failed(breaker or Breaker(), self._clock())
            case Outcome.OK if breaker is not None:
                self._breakers[replica] = routing.succeeded(breaker, self._clock())
            case Outcome.NOTHING if breaker is not None:
                self._breakers[replica] = routing.abandoned(breaker)
            case _:
                # Successes of a replica without failures need no book-keeping: they would only fill the memory.
                pass

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget replicas that are gone."""
        known = set(replicas)
        self._breakers = {replica: breaker for replica, breaker in self._breakers.items() if replica in known}

    def _candidate(self, replica: Replica, now: float) -> Candidate:
        up = self._links.relay(replica.node_id) is not None
        up = up and self._links.silent_s(replica.node_id, now) <= self._silent_s
        return Candidate(
            replica=replica.id,
            node=replica.node,
            ready=replica.ready,
            warm=replica.warm,
            link_up=up,
            outstanding=self._outstanding.get(replica.id, 0),
            breaker=self._breakers.get(replica.id, _FRESH),
            state=replica.state if up else replica.offline,
        )


_FRESH = Breaker()
