"""The choice of a replica, retries, and the circuit breaker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.routing import (
    AllBusy,
    Breaker,
    BreakerPolicy,
    Candidate,
    Chosen,
    NoneReady,
    abandoned,
    admits,
    begin,
    choose,
    failed,
    may_retry,
    succeeded,
)

POLICY = BreakerPolicy()
GOOD = Candidate("r1", "n1", ready=True, warm=True, link_up=True, outstanding=0)
OPEN = replace(Breaker(), open_until=100.0, cooldown_s=5.0)


def pick(*candidates: Candidate, draw: float = 0.0, tried: frozenset[str] = frozenset(), now: float = 10.0):
    return choose("greeter", candidates, now=now, draw=draw, most_outstanding=8, tried=tried)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([], "greeter has no replicas"),
        (
            [replace(GOOD, ready=False, state="downloading 40 %"), replace(GOOD, link_up=False, state="lost")],
            "replicas of greeter: 1 downloading 40 %, 1 lost",
        ),
        ([replace(GOOD, breaker=OPEN)], "replicas of greeter: 1 left alone after failures"),
        (
            [replace(GOOD, replica=str(number), ready=False, state="lost") for number in range(3)]
            + [replace(GOOD, ready=False, state="starting")],
            "replicas of greeter: 3 lost, 1 starting",
        ),
    ],
)
def test_nobody_can_serve(candidates: list[Candidate], expected: str) -> None:
    found = pick(*candidates)
    assert isinstance(found, NoneReady)
    assert found.reason == expected
    assert found.retry_after_s >= 1


def test_an_open_circuit_says_when_to_come_back() -> None:
    found = pick(replace(GOOD, breaker=OPEN), now=93.0)
    assert isinstance(found, NoneReady)
    assert found.retry_after_s == 7.0


def test_busy_is_not_missing() -> None:
    assert isinstance(pick(replace(GOOD, outstanding=8)), AllBusy)


def test_what_was_tried_is_not_asked_again() -> None:
    found = pick(GOOD, replace(GOOD, replica="r2", outstanding=5), tried=frozenset({"r1"}))
    assert isinstance(found, Chosen)
    assert found.candidate.replica == "r2"
    assert isinstance(pick(GOOD, tried=frozenset({"r1"})), NoneReady)


def test_warm_goes_before_cold_unless_it_has_no_room() -> None:
    cold = replace(GOOD, replica="cold", warm=False)
    found = pick(cold, replace(GOOD, outstanding=7))
    assert isinstance(found, Chosen)
    assert found.candidate.replica == "r1"
    found = pick(cold, replace(GOOD, outstanding=8))
    assert isinstance(found, Chosen)
    assert found.candidate.replica == "cold"


candidates = st.lists(
    st.builds(
        Candidate,
        replica=st.uuids().map(str),
        node=st.just("n"),
        ready=st.booleans(),
        warm=st.booleans(),
        link_up=st.booleans(),
        outstanding=st.integers(0, 10),
        breaker=st.sampled_from([Breaker(), OPEN, replace(OPEN, open_until=5.0)]),
    ),
    max_size=8,
)


@given(candidates, st.floats(0, 1, exclude_max=True))
def test_a_choice_can_always_serve(some: list[Candidate], draw: float) -> None:
    found = pick(*some, draw=draw)
    able = [one for one in some if one.ready and one.link_up and admits(one.breaker, 10.0) and one.outstanding < 8]
    assert isinstance(found, Chosen) == bool(able)
    if isinstance(found, Chosen):
        assert found.candidate in able
        assert found.candidate.warm or not any(one.warm for one in able)
        assert found.reason


@given(st.lists(st.integers(0, 7), min_size=2, max_size=8), st.floats(0, 1, exclude_max=True))
def test_the_busiest_of_all_is_chosen_only_among_equals(loads: list[int], draw: float) -> None:
    found = pick(*(replace(GOOD, replica=str(index), outstanding=load) for index, load in enumerate(loads)), draw=draw)
    assert isinstance(found, Chosen)
    # Two different ones were compared: whoever is alone at the top can't win.
    assert found.candidate.outstanding < max(loads) or loads.count(max(loads)) > 1


def test_every_pair_is_compared() -> None:
    some = [replace(GOOD, replica=str(index), outstanding=index) for index in range(4)]
    winners = {pick(*some, draw=step / 48).candidate.replica for step in range(48)}  # type: ignore[union-attr]
    assert winners == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("attempts", "began", "now", "expected"),
    [(1, False, 0, True), (2, False, 0, True), (3, False, 0, False), (1, True, 0, False), (1, False, 60, False)],
)
def test_retries(attempts: int, began: bool, now: float, expected: bool) -> None:
    assert may_retry(attempts=attempts, began=began, now=now, deadline=60) is expected


# --- circuit breaker --------------------------------------------------------------------------------------------------


def run(breaker: Breaker, word: str, now: float = 1.0) -> Breaker:
    for letter in word:
        breaker = failed(breaker, now) if letter == "x" else succeeded(breaker, now)
    return breaker


@pytest.mark.parametrize(
    ("word", "open_"),
    [
        ("xx", False),
        ("xxx", True),
        ("xxoxx", True),  # 4 of 5
        ("xoxo", False),  # half, and too few
        ("xoxoxo", False),  # half is not more than half
        ("xoxox", True),  # 3 of 5
        ("oxxoo", False),
        ("ooooooxx", False),
    ],
)
def test_when_the_circuit_opens(word: str, open_: bool) -> None:
    assert (not admits(run(Breaker(), word), 1.0)) is open_


def test_counts_are_forgotten_after_a_span() -> None:
    assert admits(failed(succeeded(run(Breaker(), "xox"), 1.0), 1.0 + POLICY.span_s + 0.1), 1.0)


def test_cool_down_doubles_up_to_five_minutes_and_one_request_tries() -> None:
    breaker = run(Breaker(), "xxx", now=0.0)
    now = 0.0
    waits = []
    for _ in range(9):
        assert not admits(breaker, breaker.open_until - 0.001)
        waits.append(breaker.open_until - now)
        now = breaker.open_until
        assert admits(breaker, now)
        breaker = begin(breaker, now)
        assert not admits(breaker, now)
        breaker = failed(breaker, now)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_a_good_trial_closes_and_a_caller_that_left_frees_the_trial() -> None:
    breaker = begin(run(Breaker(), "xxx", now=0.0), 5.0)
    assert admits(abandoned(breaker), 5.0)
    assert succeeded(breaker, 6.0) == Breaker()
    # A trial that was never heard of again does not block for ever.
    assert admits(breaker, 5.0 + POLICY.trial_s)


def test_failures_that_were_under_way_when_it_opened_are_one_outage() -> None:
    breaker = run(Breaker(), "xxx", now=0.0)
    assert run(breaker, "xxxxx", now=0.1) == breaker
