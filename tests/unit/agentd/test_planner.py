"""The planner: tables of what it decides, and properties of everything it could be asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.planner import STARVED_S, Budget, Evict, Holding, Load, Queue, Refuse, Wish, Yield, keep_value, plan
from agentd.models.types import ModelKey, ModelState

READY, LOADING, STOPPING = ModelState.READY, ModelState.LOADING, ModelState.STOPPING
MB = 10**6


def key(name: str) -> ModelKey:
    return ModelKey(name, "1", "q4")


def held(name: str, size_mb: int = 100, **more: object) -> Holding:
    return replace(Holding(key(name), size_mb * MB, READY), **more)  # type: ignore[arg-type]


def wish(name: str, size_mb: int = 100, asked_at_s: float = 0.0, priority: int = 50) -> Wish:
    return Wish(key(name), size_mb * MB, asked_at_s, priority)


def budget(available_mb: int = 1000, limit_mb: int = 0, models: int = 0) -> Budget:
    return Budget(available_mb * MB, limit_mb * MB, models)


@pytest.mark.parametrize(
    ("holdings", "wishes", "limits", "expected"),
    [
        pytest.param([], [], budget(), [], id="nothing to do"),
        pytest.param([], [wish("a")], budget(), [(Load, "a")], id="fits"),
        pytest.param([held("a")], [wish("a")], budget(), [], id="already there"),
        pytest.param([], [wish("a", 300), wish("b", 300)], budget(500), [(Load, "a"), (Queue, "b")], id="one of two"),
        pytest.param([held("old")], [wish("a")], budget(50), [(Evict, "old"), (Queue, "a")], id="evict idle"),
        pytest.param([held("x", references=1)], [wish("a")], budget(50), [(Queue, "a")], id="busy stays"),
        pytest.param([held("x", pinned=True)], [wish("a")], budget(50), [(Refuse, "a")], id="pinned: refuse"),
        pytest.param([held("x", state=LOADING)], [wish("a")], budget(100), [(Queue, "a")], id="promised to a load"),
        pytest.param([held("x", state=STOPPING)], [wish("a")], budget(50), [(Queue, "a")], id="room is coming"),
        pytest.param([], [wish("a", 600)], budget(1000, limit_mb=500), [(Refuse, "a")], id="larger than the limit"),
        pytest.param([], [wish("a", 600)], budget(500), [(Refuse, "a")], id="larger than the machine"),
        pytest.param(
            [held("x"), held("y")], [wish("a")], budget(models=2), [(Evict, "x"), (Queue, "a")], id="places are full"
        ),
        pytest.param(
            [held("x", 90, mapped_bytes=80 * MB)], [wish("a")], budget(150), [(Evict, "x"), (Queue, "a")],
            id="mapped weights are not available",
        ),
        pytest.param(
            [held("busy", 300, references=1)], [wish("big", 400, asked_at_s=0), wish("small", 10, asked_at_s=1)],
            budget(200), [(Queue, "big"), (Queue, "small")], id="no overtaking",
        ),
    ],
)  # fmt: skip
def test_decision(holdings, wishes, limits, expected):
    actions = plan(holdings, wishes, limits, now_s=10.0)
    assert [(type(action), action.key.model) for action in actions] == expected


def test_refusal_names_the_numbers():
    (refusal,) = plan([held("w", 300, pinned=True)], [wish("a", 600)], budget(200), 0.0)
    assert isinstance(refusal, Refuse)
    assert "600.0 MB" in refusal.reason
    assert "200.0 MB" in refusal.reason
    assert "300.0 MB kept warm" in refusal.reason


def test_evicts_what_costs_least_to_bring_back():
    cheap = held("cheap", load_seconds=0.5, last_used_s=0.0)
    dear = held("dear", load_seconds=60.0, last_used_s=0.0)
    actions = plan([dear, cheap], [wish("a")], budget(10), 100.0)
    assert [a.key.model for a in actions if isinstance(a, Evict)] == ["cheap"]


@pytest.mark.parametrize(
    "change",
    [
        {"last_used_s": 99.0},
        {"priority": 90},
        {"load_seconds": 30.0},
        {"memory_bytes": 10 * MB},
    ],
)
def test_worth_of_keeping_grows_with(change):
    base = held("m", last_used_s=10.0, load_seconds=3.0)
    assert keep_value(replace(base, **change), 100.0) > keep_value(base, 100.0)


def test_does_not_evict_more_than_needed():
    holdings = [held("tiny", 1, load_seconds=0.01), held("large", 500, load_seconds=1.0)]
    actions = plan(holdings, [wish("a", 100)], budget(0), 1000.0)
    assert [a.key.model for a in actions if isinstance(a, Evict)] == ["large"]


@pytest.mark.parametrize(
    ("waited_s", "priority", "expected"),
    [
        pytest.param(STARVED_S - 1, 50, [(Queue, "a")], id="not yet"),
        pytest.param(STARVED_S, 50, [(Yield, "busy"), (Queue, "a")], id="it starves"),
        pytest.param(STARVED_S + 9, 40, [(Queue, "a")], id="less important: it would lose to the other's return"),
        pytest.param(STARVED_S + 10, 40, [(Yield, "busy"), (Queue, "a")], id="less important, but older"),
    ],
)
def test_a_model_in_constant_use_does_not_starve_others(waited_s, priority, expected):
    actions = plan([held("busy", 300, references=2)], [wish("a", 200, priority=priority)], budget(50), waited_s)
    assert [(type(action), action.key.model) for action in actions] == expected


def test_who_yields_loses_to_who_waited():
    """Or the model that went would be loaded again at once, and the one that starves would go on starving."""
    now = STARVED_S + 10
    starved, back = wish("a", 200, priority=40), wish("busy", 300, asked_at_s=now, priority=50)
    actions = plan([], [back, starved], budget(350), now)
    assert [(type(action), action.key.model) for action in actions] == [(Load, "a"), (Queue, "busy")]


def test_idle_models_yield_before_busy_ones():
    holdings = [held("busy", 300, references=1), held("idle", 300)]
    actions = plan(holdings, [wish("a", 200)], budget(10), STARVED_S + 1)
    assert [(type(action), action.key.model) for action in actions] == [(Evict, "idle"), (Queue, "a")]


@pytest.mark.parametrize(
    ("holdings", "limits", "expected"),
    [
        pytest.param([held("a"), held("b")], budget(limit_mb=200), [], id="as much as allowed"),
        pytest.param([held("a"), held("b", 150)], budget(limit_mb=200), ["b"], id="grew over the limit"),
        pytest.param([held("a", references=1), held("b", 150, pinned=True)], budget(limit_mb=200), [], id="all in use"),
        pytest.param([held("a"), held("b", 150, state=STOPPING)], budget(limit_mb=200), [], id="one is going"),
        pytest.param([held("a"), held("b")], budget(models=1), ["b"], id="fewer are allowed now"),
        pytest.param([held("a"), held("b")], replace(budget(), short_bytes=1), ["b"], id="others need memory"),
        pytest.param([held("a"), held("b")], replace(budget(), short_bytes=150 * MB), ["a", "b"], id="much of it"),
    ],
)
def test_idle_models_go_when_more_is_taken_than_there_is(holdings, limits, expected):
    holdings = [replace(h, load_seconds=2.0) if h.key.model == "a" else h for h in holdings]
    actions = plan(holdings, [], limits, 100.0)
    assert all(isinstance(action, Evict) for action in actions)
    assert sorted(action.key.model for action in actions) == expected


NAMES = [key(f"m{n}") for n in range(8)]
HOLDINGS = st.lists(
    st.builds(
        Holding,
        key=st.sampled_from(NAMES),
        memory_bytes=st.integers(1, 100),
        state=st.sampled_from([READY, LOADING, STOPPING]),
        mapped_bytes=st.integers(0, 50),
        references=st.integers(0, 2),
        pinned=st.booleans(),
        priority=st.integers(0, 100),
        last_used_s=st.floats(0, 100),
        load_seconds=st.floats(0, 100),
    ),
    unique_by=lambda holding: holding.key,
    max_size=6,
)
WISHES = st.lists(
    st.builds(
        Wish,
        key=st.sampled_from(NAMES),
        memory_bytes=st.integers(1, 150),
        asked_at_s=st.floats(0, 100),
        priority=st.integers(0, 100),
    ),
    unique_by=lambda wish: wish.key,
    max_size=5,
)
BUDGETS = st.builds(
    Budget,
    available_bytes=st.integers(0, 300),
    max_memory_bytes=st.integers(0, 300),
    max_loaded_models=st.integers(0, 4),
)


def granted(holdings: list[Holding]) -> int:
    return sum(holding.memory_bytes for holding in holdings)


def apply(action: object, holdings: list[Holding], wishes: list[Wish]) -> tuple[list[Holding], list[Wish]]:
    match action:
        case Load(which, size, _):
            return [*holdings, Holding(which, size, LOADING)], [w for w in wishes if w.key != which]
        case Evict(which, _) | Yield(which, _):
            return [replace(h, state=STOPPING) if h.key == which else h for h in holdings], wishes
        case Refuse(which, _):
            return holdings, [w for w in wishes if w.key != which]
    return holdings, wishes


@settings(max_examples=120, deadline=None)
@given(HOLDINGS, WISHES, BUDGETS)
def test_every_prefix_of_a_plan_is_safe(holdings, wishes, limits):
    before = granted(holdings)
    protected = {h.key for h in holdings if h.references or h.pinned or h.state is not READY}
    for action in plan(holdings, wishes, limits, 100.0):
        if isinstance(action, Evict):
            assert action.key not in protected
        if isinstance(action, Yield):
            assert not any(h.pinned or h.state is not READY for h in holdings if h.key == action.key)
        holdings, wishes = apply(action, holdings, wishes)
        if isinstance(action, Load):
            assert not limits.max_memory_bytes or granted(holdings) <= max(limits.max_memory_bytes, before)
            assert granted(holdings) - before <= limits.available_bytes
            assert not limits.max_loaded_models or len(holdings) <= limits.max_loaded_models
        assert len({h.key for h in holdings}) == len(holdings)


@settings(max_examples=120, deadline=None)
@given(HOLDINGS, WISHES, BUDGETS)
def test_planning_after_applying_only_waits(holdings, wishes, limits):
    for action in plan(holdings, wishes, limits, 100.0):
        holdings, wishes = apply(action, holdings, wishes)
    again = plan(holdings, wishes, limits, 100.0)
    assert all(isinstance(action, Queue) for action in again)


@settings(max_examples=80, deadline=None)
@given(HOLDINGS, WISHES, BUDGETS, st.randoms(use_true_random=False))
def test_order_of_inputs_does_not_matter(holdings, wishes, limits, chance):
    expected = plan(holdings, wishes, limits, 100.0)
    chance.shuffle(holdings)
    chance.shuffle(wishes)
    assert plan(holdings, wishes, limits, 100.0) == expected


@settings(max_examples=80, deadline=None)
@given(HOLDINGS, WISHES, BUDGETS)
def test_every_wish_gets_an_answer(holdings, wishes, limits):
    answered = {a.key for a in plan(holdings, wishes, limits, 100.0) if not isinstance(a, Evict | Yield)}
    assert answered == {w.key for w in wishes} - {h.key for h in holdings}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(0, 100), st.integers(0, 100))
def test_ageing_bounds_starvation(now, low, high):
    """A wish that waited 101 s goes before any fresh one, whatever the priorities."""
    old, fresh = wish("old", asked_at_s=now, priority=low), wish("fresh", asked_at_s=now + 101.0, priority=high)
    first, *_ = plan([], [fresh, old], budget(100), now + 101.0)
    assert first.key == old.key
