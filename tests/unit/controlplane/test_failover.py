"""The mass-disconnect guard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.failover import FailoverPolicy, Presence, find_storms

POLICY = FailoverPolicy()
UP = None


@pytest.mark.parametrize(
    ("silent_since", "storms"),
    [
        ([UP, UP, 100.0], []),  # one killed node of a small fleet is replaced
        ([UP, 100.0, 100.0], []),
        ([100.0, 101.0, 102.0], [(3, 3)]),
        ([UP, UP, 100.0, 101.0, 102.0], [(3, 5)]),
        ([UP, UP, UP, 100.0, 101.0, 102.0], []),  # 50 %
        ([UP] * 9 + [100.0] * 11, [(11, 20)]),  # 55 % sharp
        ([UP] * 10 + [100.0] * 11, []),
        ([UP, UP, 100.0, 200.0, 300.0], []),  # one after the other is no storm
        # Long gone nodes are no part of the fleet that the storm hit.
        ([UP, UP] + [1.0] * 20 + [5000.0, 5001.0, 5002.0], [(20, 25), (3, 5)]),
        ([], []),
    ],
)
def test_storm(silent_since: list[float | None], storms: list[tuple[int, int]]) -> None:
    found = find_storms(POLICY, [Presence(since) for since in silent_since])
    assert [(storm.down, storm.of) for storm in found] == storms


@given(st.lists(st.none() | st.floats(min_value=0, max_value=1000), max_size=40), st.randoms())
def test_order_does_not_matter_and_the_numbers_are_true(silent_since: list[float | None], random: object) -> None:
    found = find_storms(POLICY, [Presence(since) for since in silent_since])
    shuffled = list(silent_since)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert find_storms(POLICY, [Presence(since) for since in shuffled]) == found
    for storm in found:
        assert storm.down == sum(storm.took(since) for since in silent_since)
        assert storm.down >= 3
        assert storm.down / storm.of >= 0.55
        assert storm.of <= len(silent_since)
