"""A batch that comes twice counts once, in whatever order batches come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ingest.decode import DecodedBatch
from controlplane.ingest.plan import DedupPlan, Span, StreamKey, plan_dedup, spans_by_stream

KEY = StreamKey("n1", "metrics", 7)


def batch(first: int, last: int, dropped: int = 0, key: StreamKey = KEY) -> DecodedBatch:
    return DecodedBatch(key.node_id, key.stream, key.epoch, first, last, dropped, "boot")


def applied(committed: list[Span], plan: DedupPlan) -> list[Span]:
    """The table of ranges after the plan."""
    table = {span.first: span for span in committed}
    for _, first in plan.removed:
        del table[first]
    table.update({span.first: span for _, span in plan.written})
    return sorted(table.values())


@pytest.mark.parametrize(
    ("committed", "arrived", "verdict", "after"),
    [
        ([], (1, 5), "fresh", [Span(1, 5)]),
        ([Span(1, 5)], (1, 5), "repeated", [Span(1, 5)]),
        ([Span(1, 9)], (4, 6), "repeated", [Span(1, 9)]),
        ([Span(1, 5)], (6, 9), "fresh", [Span(1, 9)]),
        ([Span(6, 9)], (1, 5), "fresh", [Span(1, 9)]),
        ([Span(1, 3), Span(7, 9)], (4, 6), "fresh", [Span(1, 9)]),
        ([Span(1, 3)], (5, 6), "fresh", [Span(1, 3), Span(5, 6)]),
        ([Span(1, 5)], (4, 8), "overlapping", [Span(1, 5)]),
        ([Span(4, 8)], (1, 5), "overlapping", [Span(4, 8)]),
        ([Span(4, 5)], (1, 9), "overlapping", [Span(4, 5)]),
        ([Span(1, 3), Span(5, 9)], (2, 6), "overlapping", [Span(1, 3), Span(5, 9)]),
    ],
)
def test_verdicts(committed: list[Span], arrived: tuple[int, int], verdict: str, after: list[Span]) -> None:
    plan = plan_dedup([batch(*arrived)], {KEY: committed})
    assert {name: len(getattr(plan, name)) for name in ("fresh", "repeated", "overlapping")} == {
        name: int(name == verdict) for name in ("fresh", "repeated", "overlapping")
    }
    assert applied(committed, plan) == after


def test_numberings_are_apart() -> None:
    others = [KEY._replace(node_id="n2"), KEY._replace(stream="events"), KEY._replace(epoch=8)]
    plan = plan_dedup([batch(1, 5, key=key) for key in others], {KEY: [Span(1, 5)]})
    assert len(plan.fresh) == 3
    assert {key for key, _ in plan.written} == set(others)
    assert plan.removed == []


def test_what_was_dropped_is_added_up() -> None:
    plan = plan_dedup([batch(1, 5, 2), batch(6, 9, 1)], {})
    assert plan.written == [(KEY, Span(1, 9, 3))]


@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=30), seed=st.randoms(use_true_random=False))
def test_any_order_and_any_repetition_ends_in_one_range_and_counts_each_row_once(
    cuts: list[int], seed: random.Random
) -> None:
    batches, first = [], 1
    for length in cuts:
        batches.append(batch(first, first + length - 1, dropped=1))
        first += length
    arrivals = batches + seed.choices(batches, k=len(batches))
    seed.shuffle(arrivals)
    table: list[Span] = []
    stored: list[DecodedBatch] = []
    while arrivals:
        size = seed.randint(1, 5)
        group, arrivals = arrivals[:size], arrivals[size:]
        plan = plan_dedup(group, {KEY: table})
        assert not plan.overlapping
        stored += plan.fresh
        table = applied(table, plan)
        again = plan_dedup(group, {KEY: table})
        assert (again.fresh, again.written, again.removed) == ([], [], [])
    assert sorted(b.first for b in stored) == [b.first for b in batches]
    assert table == [Span(1, first - 1, len(batches))]


def test_acknowledgements_are_grouped() -> None:
    other = KEY._replace(stream="events")
    assert spans_by_stream([batch(1, 2), batch(1, 1, key=other), batch(3, 4)]) == {
        KEY: [(1, 2), (3, 4)],
        other: [(1, 1)],
    }
