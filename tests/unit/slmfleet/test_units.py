"""Sizes and durations: the table of spellings, the words of errors, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmfleet.units import format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4Gi", 4 * 2**30),
        ("4GiB", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("1.5Ki", 1536),
        (" 512 ", 512),
        ("512 Mi", 512 * 2**20),
        ("0", 0),
        (512, 512),
        ("2Ti", 2 * 2**40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 GiBs", "-1", -1, "Gi", "1e3", True, 1.5, None, "4Gi4", "١٢x"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (98_400_000, "98.4 MB"), (1500, "1.5 kB"), (2e12, "2.0 TB"), (5e15, "5000.0 TB")],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("2d", 172800),
        ("45", 45),
        (45, 45),
        (0.5, 0.5),
        ("-1", -1),
        (-1, -1),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 m", "1h 30m", "10M", "-5m", True, None, [], "m"])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=2**60), st.sampled_from(["", "Ki", "Mi", "GB"]))
def test_a_size_without_a_fraction_is_exact(number: int, unit: str) -> None:
    factor = {"": 1, "Ki": 2**10, "Mi": 2**20, "GB": 10**9}[unit]
    assert parse_size(f"{number}{unit}") == number * factor


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_sentence(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            value = parse(text)
        except ValueError as error:
            message = str(error)
        else:
            message = str(value)
        assert message
