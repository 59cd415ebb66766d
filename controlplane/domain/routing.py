"""Which replica answers a request, when another may be asked, and who is left alone after failures (pure).

Chance and time are arguments: ``draw`` is one number in [0, 1), ``now`` any monotonic clock in seconds.

Choice: of the replicas that can serve, the warm ones if there is any with room, else the others; among those, two at
random, and of the two the one with less work outstanding (Mitzenmacher, "The power of two choices", 2001).

Circuit breaker of one replica, after LiteLLM's and AIBrix's figures (docs/architecture.md)::

    closed --3 failures in a row, or more than half of at least 5--> open (5 s, doubling to 5 min)
    open --cool-down over--> half open: one request may try --ok--> closed
                                                            --failure--> open, twice as long
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a replica is left alone, and for how long. Seconds."""

    failures_in_row: int = 3
    least_calls: int = 5
    failed_share: float = 0.5
    # Calls are counted over spans of this length.
    span_s: float = 30.0
    cooldown_s: float = 5.0
    longest_cooldown_s: float = 300.0
    # A trial whose outcome never came does not block the replica for ever.
    trial_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """What is known of one replica's failures. The default is a replica without a past."""

    in_row: int = 0
    span_start: float = 0.0
    calls: int = 0
    failed: int = 0
    # 0: closed. Else open until then, and half open after it.
    open_until: float = 0.0
    cooldown_s: float = 0.0
    # While half open: until when the one trial may take.
    trial_until: float = 0.0


_POLICY = BreakerPolicy()


def admits(breaker: Breaker, now: float) -> bool:
    """Whether a request may go to the replica now."""
    return breaker.open_until == 0.0 or (now >= breaker.open_until and now >= breaker.trial_until)


def begin(breaker: Breaker, now: float, policy: BreakerPolicy = _POLICY) -> Breaker:
    """A request goes to the replica; while half open it is the one trial."""
    return breaker if breaker.open_until == 0.0 else replace(breaker, trial_until=now + policy.trial_s)


def succeeded(breaker: Breaker, now: float, policy: BreakerPolicy = _POLICY) -> Breaker:
    """The replica answered."""
    if breaker.open_until:
        # One that comes back after an outage starts without a past. A late success of a request that was sent before
        # the circuit opened proves as much as a trial.
        return Breaker()
    calls, failed, start = _counts(breaker, now, policy)
    return replace(breaker, in_row=0, calls=calls + 1, failed=failed, span_start=start)


def failed(breaker: Breaker, now: float, policy: BreakerPolicy = _POLICY) -> Breaker:
    """The replica, or the way to it, failed."""
    if breaker.open_until:
        if now < breaker.open_until:
            # Sent before the circuit opened: one outage, not two.
            return breaker
        return _opened(breaker, now, min(breaker.cooldown_s * 2, policy.longest_cooldown_s))
    calls, failures, start = _counts(breaker, now, policy)
    counted = replace(breaker, in_row=breaker.in_row + 1, calls=calls + 1, failed=failures + 1, span_start=start)
    too_many = counted.calls >= policy.least_calls and counted.failed > policy.failed_share * counted.calls
    if counted.in_row >= policy.failures_in_row or too_many:
        return _opened(counted, now, policy.cooldown_s)
    return counted


def abandoned(breaker: Breaker) -> Breaker:
    """The caller left, or the replica was busy: nothing was learnt, and a trial may be made again."""
    return replace(breaker, trial_until=0.0) if breaker.trial_until else breaker


def _counts(breaker: Breaker, now: float, policy: BreakerPolicy) -> tuple[int, int, float]:
    if now - breaker.span_start > policy.span_s:
        return 0, 0, now
    return breaker.calls, breaker.failed, breaker.span_start


def _opened(breaker: Breaker, now: float, cooldown_s: float) -> Breaker:
    return replace(breaker, open_until=now + cooldown_s, cooldown_s=cooldown_s, trial_until=0.0, calls=0, failed=0)


# --- choice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the gateway sees it now."""

    replica: str
    node: str
    ready: bool
    warm: bool
    # Whether requests can reach its node from here.
    link_up: bool
    # Requests of this gateway that it works on.
    outstanding: int
    breaker: Breaker = Breaker()
    # Why it can't serve, as people say it: "downloading 40 %", "lost". Of no meaning while it can.
    state: str = "not ready"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Ask this one. ``reason`` is for people and for the header of the answer."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class NoneReady:
    """No replica can serve; ``reason`` counts why."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class AllBusy:
    """There are replicas, each with as much work as it may have."""

    reason: str
    retry_after_s: float


_RETRY_NOT_READY_S = 2.0
_RETRY_BUSY_S = 1.0


def choose(
    name: str,
    candidates: Sequence[Candidate],
    *,
    now: float,
    draw: float,
    most_outstanding: int,
    tried: frozenset[str] = frozenset(),
) -> Chosen | NoneReady | AllBusy:
    """The replica of ``name`` to ask; ``tried`` ones (by id) are not asked again."""
    able = [one for one in candidates if one.ready and one.link_up and one.replica not in tried]
    admitted = [one for one in able if admits(one.breaker, now)]
    free = [one for one in admitted if one.outstanding < most_outstanding]
    if free:
        warm = [one for one in free if one.warm]
        return _pick(warm or free, draw)
    if admitted:
        return AllBusy(f"every ready replica of {name} has {most_outstanding} requests already", _RETRY_BUSY_S)
    waits = [max(one.breaker.open_until, one.breaker.trial_until) - now for one in able]
    retry_after_s = max(1.0, min(waits)) if waits else _RETRY_NOT_READY_S
    return NoneReady(_why_none(name, candidates, now, tried), retry_after_s)


def _pick(some: Sequence[Candidate], draw: float) -> Chosen:
    kind = "warm" if some[0].warm else "ready, not loaded"
    if len(some) == 1:
        return Chosen(some[0], f"the only {kind} replica with room")
    # One draw names an ordered pair of different candidates.
    pair = min(int(draw * len(some) * (len(some) - 1)), len(some) * (len(some) - 1) - 1)
    first, step = divmod(pair, len(some) - 1)
    one, other = some[first], some[(first + 1 + step) % len(some)]
    better, worse = (one, other) if one.outstanding <= other.outstanding else (other, one)
    loads = f"{better.outstanding} outstanding against {worse.outstanding}"
    return Chosen(better, f"{kind}, {loads}, two of {len(some)} compared")


def _why_none(name: str, candidates: Iterable[Candidate], now: float, tried: frozenset[str]) -> str:
    counts = Counter(_state(one, now, tried) for one in candidates)
    if not counts:
        return f"{name} has no replicas"
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"replicas of {name}: " + ", ".join(f"{count} {state}" for state, count in most_first)


def _state(candidate: Candidate, now: float, tried: frozenset[str]) -> str:
    if candidate.replica in tried:
        return "failed just now"
    if not (candidate.ready and candidate.link_up):
        return candidate.state
    if not admits(candidate.breaker, now):
        return "left alone after failures"
    return "busy"


# --- retries ----------------------------------------------------------------------------------------------------------

MOST_RETRIES = 2


def may_retry(*, attempts: int, began: bool, now: float, deadline: float) -> bool:
    """Whether a request that failed may be asked of another replica.

    ``attempts``: replicas that were asked so far; ``began``: the caller has seen a byte of an answer. What has begun is
    never repeated.
    """
    return not began and attempts <= MOST_RETRIES and now < deadline
