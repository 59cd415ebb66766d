"""Which model is loaded next, which one goes, who waits and who is refused. Pure: no clock, no I/O, no logger.

The one that applies a plan (``scheduler.py``) calls ``plan`` again after every change, so each plan holds only the
next safe step: a model that needs room is loaded in a later plan, when those that were asked to go are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from agentd.models.types import ModelKey, ModelState
from slmfleet.units import format_size

# A wish that waited so long may ask busy models to make room once their running requests are through. Below the usual
# time that a request waits for its turn, so that who waits is served rather than refused.
STARVED_S = 20.0
# Points of priority that a waiting request gains per second, so that no priority starves another for ever.
AGEING_PER_SECOND = 1.0


@dataclass(frozen=True, slots=True)
class Holding:
    """A model that has, or was granted, memory."""

    key: ModelKey
    # Granted at the load, corrected by what was measured once it is ready.
    memory_bytes: int
    # LOADING, READY or STOPPING.
    state: ModelState
    # The part of ``memory_bytes`` that is mapped weights. The kernel calls those pages available, since it could
    # drop them; a worker that loses them thrashes instead of failing, so here they are taken.
    mapped_bytes: int = 0
    # Requests that run or wait for it.
    references: int = 0
    # ``warm`` models: unloaded only when the desired state says so.
    pinned: bool = False
    priority: int = 50
    last_used_s: float = 0.0
    load_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Wish:
    """A model that should be loaded."""

    key: ModelKey
    memory_bytes: int
    asked_at_s: float
    priority: int = 50
    # For the refusal's text: what the bytes are made of.
    explanation: str = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits, in bytes. 0 means no limit, except for ``available_bytes``, which is what the kernel has to give now."""

    available_bytes: int
    max_memory_bytes: int = 0
    max_loaded_models: int = 0
    # What the rest of the device lacks right now.
    short_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Grant the memory and start the worker."""

    key: ModelKey
    memory_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Ask an idle model to go. Its owner declines when a request came in meanwhile."""

    key: ModelKey
    reason: str


@dataclass(frozen=True, slots=True)
class Yield:
    """Ask a busy model to finish what runs and go: others starve."""

    key: ModelKey
    reason: str


@dataclass(frozen=True, slots=True)
class Queue:
    """The wish waits: for the models in the reason, or behind another wish."""

    key: ModelKey
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The wish can't be met, now or by waiting for running requests."""

    key: ModelKey
    reason: str


Action = Load | Evict | Yield | Queue | Refuse


def plan(holdings: Sequence[Holding], wishes: Sequence[Wish], budget: Budget, now_s: float) -> tuple[Action, ...]:
    """The next safe steps towards every wish, best wish first.

    A busy, loading or pinned model is never evicted; granted memory never exceeds the budget. The order of the
    inputs does not matter. Wishes behind one that waits for room wait too, so that small models can't starve a
    large one. Without any wish, idle models go while more is taken than the budget has.
    """
    held = {holding.key for holding in holdings}
    actions: list[Action] = [*_relieve(holdings, budget, now_s)]
    leaving = {action.key for action in actions}
    holdings = [replace(h, state=ModelState.STOPPING) if h.key in leaving else h for h in holdings]
    room = _Room.of(holdings, budget)
    blocked: Wish | None = None
    for wish in sorted((w for w in wishes if w.key not in held), key=lambda w: _rank(w, now_s)):
        if refusal := _never_fits(wish, holdings, budget):
            actions.append(Refuse(wish.key, refusal))
        elif blocked is not None:
            actions.append(Queue(wish.key, f"waits behind {blocked.key}, which waits for memory"))
        elif room.fits(wish.memory_bytes):
            room = room.with_load(wish.memory_bytes)
            actions.append(Load(wish.key, wish.memory_bytes, f"{format_size(wish.memory_bytes)} fit"))
        else:
            blocked = wish
            actions.extend(_make_room(wish, holdings, room, now_s))
    return tuple(actions)


def keep_value(holding: Holding, now_s: float) -> float:
    """Worth of keeping an idle model: seconds of loading saved per byte, fading with idleness, scaled by priority.

    The greedy-dual-size rule of web caches (Cao and Irani, 1997) with recency in the place of its inflation term.
    """
    idle_s = max(0.0, now_s - holding.last_used_s)
    return (holding.priority + 1) * max(holding.load_seconds, 0.01) / ((1.0 + idle_s) * max(holding.memory_bytes, 1))


def _relieve(holdings: Sequence[Holding], budget: Budget, now_s: float) -> Iterator[Evict]:
    """Idle models that go because workers grew, the limit fell, or the rest of the device is short of memory."""
    over = sum(h.memory_bytes for h in holdings) - budget.max_memory_bytes if budget.max_memory_bytes else 0
    too_many = len(holdings) - budget.max_loaded_models if budget.max_loaded_models else 0
    for holding in holdings:
        if holding.state is ModelState.STOPPING:
            over, too_many = over - holding.memory_bytes, too_many - 1
    short = budget.short_bytes - sum(h.memory_bytes for h in holdings if h.state is ModelState.STOPPING)
    for holding in sorted(_idle(holdings), key=lambda h: (keep_value(h, now_s), h.key)):
        if over > 0:
            yield Evict(holding.key, f"the models take {format_size(over)} more than they may")
        elif short > 0:
            yield Evict(holding.key, f"the device is short of {format_size(short)} of memory")
        elif too_many > 0:
            yield Evict(holding.key, f"{len(holdings)} models are loaded, {budget.max_loaded_models} may be")
        else:
            return
        over, short, too_many = over - holding.memory_bytes, short - holding.memory_bytes, too_many - 1


def _idle(holdings: Sequence[Holding]) -> list[Holding]:
    return [h for h in holdings if h.state is ModelState.READY and not h.references and not h.pinned]


def _rank(wish: Wish, now_s: float) -> tuple[float, float, ModelKey]:
    waited_s = max(0.0, now_s - wish.asked_at_s)
    return (-(wish.priority + AGEING_PER_SECOND * waited_s), wish.asked_at_s, wish.key)


@dataclass(frozen=True, slots=True)
class _Room:
    """What can still be granted, now and once the stopping models are gone."""

    free_bytes: float
    free_places: float
    coming_bytes: int
    coming_places: int

    @classmethod
    def of(cls, holdings: Sequence[Holding], budget: Budget) -> _Room:
        granted = sum(holding.memory_bytes for holding in holdings)
        # Loading models have not taken all of their memory yet: the kernel still counts it as available.
        promised = sum(
            h.memory_bytes if h.state is ModelState.LOADING else min(h.mapped_bytes, h.memory_bytes) for h in holdings
        )
        stopping = [h for h in holdings if h.state is ModelState.STOPPING]
        by_limit = budget.max_memory_bytes - granted if budget.max_memory_bytes else math.inf
        places = budget.max_loaded_models - len(holdings) if budget.max_loaded_models else math.inf
        return cls(
            free_bytes=min(by_limit, budget.available_bytes - promised),
            free_places=places,
            coming_bytes=sum(h.memory_bytes for h in stopping),
            coming_places=len(stopping),
        )

    def fits(self, memory_bytes: int) -> bool:
        return self.free_places >= 1 and memory_bytes <= self.free_bytes

    def with_load(self, memory_bytes: int) -> _Room:
        return _Room(self.free_bytes - memory_bytes, self.free_places - 1, self.coming_bytes, self.coming_places)

    def lacks(self, memory_bytes: int, given: Sequence[Holding]) -> bool:
        """True if ``memory_bytes`` do not fit even when the stopping models and ``given`` are gone."""
        gained = self.coming_bytes + sum(h.memory_bytes for h in given)
        places = self.free_places + self.coming_places + len(given)
        return places < 1 or memory_bytes > self.free_bytes + gained


def _never_fits(wish: Wish, holdings: Sequence[Holding], budget: Budget) -> str:
    """Why waiting would not help: the sentence names the numbers. "" if it may fit one day."""
    detail = f": {wish.explanation}" if wish.explanation else ""
    need = format_size(wish.memory_bytes)
    if budget.max_memory_bytes and wish.memory_bytes > budget.max_memory_bytes:
        return f"{wish.key} needs {need} and the limit for all models is {format_size(budget.max_memory_bytes)}{detail}"
    pinned = [h for h in holdings if h.pinned]
    others = [h for h in holdings if not h.pinned]
    room = _Room.of(holdings, budget)
    gone = [h for h in others if h.state is not ModelState.STOPPING]
    if not room.lacks(wish.memory_bytes, gone):
        return ""
    if budget.max_loaded_models and len(pinned) >= budget.max_loaded_models:
        return f"{wish.key} can't be loaded: all {budget.max_loaded_models} places are taken by models kept warm"
    kept = f" beside {format_size(sum(h.memory_bytes for h in pinned))} kept warm" if pinned else ""
    most = room.free_bytes + sum(h.memory_bytes for h in others)
    return f"{wish.key} needs {need} and at most {format_size(max(0.0, most))} can be freed{kept}{detail}"


def _make_room(wish: Wish, holdings: Sequence[Holding], room: _Room, now_s: float) -> list[Action]:
    victims = _choose(wish, _idle(holdings), room, now_s)
    if victims is None:
        # Evicting the idle ones alone would not do: leave them until the busy ones are through.
        victims = _choose(wish, _outranked(wish, holdings, now_s), room, now_s)
    if victims is None:
        busy = ", ".join(sorted(str(h.key) for h in holdings if h.references or h.state is ModelState.LOADING))
        return [Queue(wish.key, f"waits for memory that is in use by {busy or 'others'}")]
    leaving = sorted(str(h.key) for h in holdings if h.state is ModelState.STOPPING or h in victims)
    actions: list[Action] = [
        Yield(h.key, f"{wish.key} has waited long") if h.references else Evict(h.key, f"makes room for {wish.key}")
        for h in victims
    ]
    return [*actions, Queue(wish.key, f"waits for {', '.join(leaving)} to unload")]


def _outranked(wish: Wish, holdings: Sequence[Holding], now_s: float) -> list[Holding]:
    """Ready models, idle or busy, over which a wish that starves goes, even if they ask to come back at once."""
    waited_s = now_s - wish.asked_at_s
    if waited_s < STARVED_S:
        return []
    claim = wish.priority + AGEING_PER_SECOND * (waited_s - STARVED_S)
    return [
        h for h in holdings
        if h.state is ModelState.READY and not h.pinned and (not h.references or claim >= h.priority)
    ]  # fmt: skip


def _choose(wish: Wish, holdings: Sequence[Holding], room: _Room, now_s: float) -> list[Holding] | None:
    """The holdings that are worth least and whose end makes room, idle ones first; None if all together do not."""
    victims: list[Holding] = []
    for holding in sorted(holdings, key=lambda h: (h.references > 0, keep_value(h, now_s), h.key)):
        if not room.lacks(wish.memory_bytes, victims):
            break
        victims.append(holding)
    if room.lacks(wish.memory_bytes, victims):
        return None
    # A victim that turns out not to be needed, once the others are gone, stays: busy ones above all.
    for holding in sorted(victims, key=lambda h: (h.references == 0, -keep_value(h, now_s), h.key)):
        rest = [h for h in victims if h is not holding]
        if not room.lacks(wish.memory_bytes, rest):
            victims = rest
    return victims
