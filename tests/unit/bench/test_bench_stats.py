"""The arithmetic behind the figures."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import stats
from bench.report import Result

positive = st.floats(0.001, 1000)


def test_the_ratio_is_of_rounds_that_ran_beside_each_other() -> None:
    assert stats.ratio([1, 20, 3], [1, 10, 1]) == 2
    with pytest.raises(ValueError, match="shorter"):
        stats.ratio([1, 2], [1])


@pytest.mark.parametrize(("fraction", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.005, 1), (0.011, 2)])
def test_percentiles_are_values_that_were_seen(fraction: float, value: int) -> None:
    assert stats.percentile(range(1, 101), fraction) == value


@settings(max_examples=15)
@given(st.lists(positive, min_size=5, max_size=7))
def test_the_interval_lies_within_what_was_seen(values: list[float]) -> None:
    low, high = stats.interval(values[:5], max)
    assert min(values) <= low <= high <= max(values)


def test_the_same_rounds_have_the_same_interval() -> None:
    ours, baseline = [1.0, 1.1, 1.3, 0.9, 1.2], [1.0, 1.0, 1.1, 1.0, 0.9]
    low, high = stats.ratio_interval(ours, baseline)
    assert (low, high) == stats.ratio_interval(ours, baseline)
    assert low <= stats.ratio(ours, baseline) <= high


def test_a_line_has_what_a_reader_needs_to_judge_it() -> None:
    result = Result("x", {"ratio": 1 / 3}, [1.0], [3.0], "s", (0.3, 0.4), ["true"], {"kills": 200})
    line = json.loads(result.line())
    assert line["ratio"] == 0.33333
    assert line["kills"] == 200
    assert {"name", "ours", "baseline", "unit", "confidence", "commands", "machine"} <= set(line)
    assert line["machine"]["cpus"] >= 1
