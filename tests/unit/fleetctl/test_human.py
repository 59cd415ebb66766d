"""Ages, labels and parts as an operator reads them."""

import datetime

import pytest

from fleetctl import human

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"), (0.9, "0s"), (119, "119s"), (120, "2m"), (312, "5m12s"), (600, "10m"), (5700, "95m"),
        (3 * 3600, "3h"), (5 * 3600 + 1800, "5h30m"), (30 * 3600, "30h"), (5 * 86400 + 3 * 3600, "5d3h"),
        (8 * 86400, "8d"), (400 * 86400, "400d"),
    ],
)  # fmt: skip
def test_durations_have_two_places_where_they_matter(seconds: float, text: str) -> None:
    assert human.duration(seconds) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-11-22T11:59:00Z", "60s"), ("2026-11-22T11:59:00+00:00", "60s"), ("2026-11-22T12:59:00+01:00", "60s"),
        ("2026-11-22T11:59:00", "60s"), (None, "-"), ("yesterday", "-"), (17, "-"),
    ],
)  # fmt: skip
def test_ages_count_to_the_given_present(moment: object, text: str) -> None:
    assert human.age(moment, NOW) == text


def test_what_lies_ahead_and_what_has_passed() -> None:
    assert human.until("2026-11-22T13:00:00Z", NOW) == "in 60m"
    assert human.until("2026-11-22T11:00:00Z", NOW) == "expired 60m ago"


def test_labels_are_sorted() -> None:
    assert human.labels({"site": "lyon", "hw": "pi5"}) == "hw=pi5,site=lyon"
    assert human.labels({}) == human.labels(None) == "-"


@pytest.mark.parametrize(("done", "total", "text"), [(45, 100, "45%"), (7, 5, "100%"), (1, 0, ""), (None, None, "")])
def test_parts_of_an_unknown_whole_are_not_guessed(done: object, total: object, text: str) -> None:
    assert human.percent(done, total) == text
