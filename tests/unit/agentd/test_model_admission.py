"""Small decisions about requests and workers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.admission import backoff_s, hang_limit_s, next_index, retry_after_s
from agentd.models.backends.stops import StopScanner
from agentd.models.settings import BackoffSettings, default_threads
from agentd.models.worker.environment import worker_environment


@dataclass
class Waiting:
    priority: int
    submitted_s: float


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ([(50, 1.0), (50, 2.0)], 0),
        ([(50, 1.0), (60, 2.0)], 1),
        ([(0, 0.0), (100, 101.0)], 0),
    ],
)
def test_next(queue, expected):
    assert next_index([Waiting(*item) for item in queue]) == expected


@pytest.mark.parametrize(
    ("waiting", "slots", "service_s", "oldest_s", "expected"),
    [(4, 1, 2.5, 0.0, 10.0), (4, 2, 2.5, 0.0, 5.0), (1, 1, 0.01, 0.0, 1.0), (3, 1, None, 7.0, 21.0)],
)
def test_retry_after_follows_the_service_rate(waiting, slots, service_s, oldest_s, expected):
    assert retry_after_s(waiting, slots, service_s, oldest_s) == expected


def test_backoff_doubles_up_to_its_cap():
    waits = [backoff_s(n, BackoffSettings()) for n in range(1, 9)]
    assert waits == [10, 20, 40, 80, 160, 300, 300, 300]
    assert backoff_s(10_000, BackoffSettings()) == 300


@pytest.mark.parametrize(
    ("speed", "chunk", "expected"), [(None, 128, 32.0), (1000.0, 128, 15.0), (10.0, 128, 256.0), (None, 16, 15.0)]
)
def test_hang_limit_follows_the_prefill_speed(speed, chunk, expected):
    assert hang_limit_s(speed, chunk, 15.0) == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (8, 7)])
def test_threads_leave_a_processor_free(cores, expected):
    assert default_threads(cores) == expected


@settings(max_examples=80, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_stop_sequences_never_show(text, stops, step):
    scanner = StopScanner(stops)
    shown = ""
    for start in range(0, len(text), step):
        shown += scanner.feed(text[start : start + step])
        if scanner.found:
            break
    else:
        shown += scanner.rest()
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        assert scanner.found
        assert all(stop not in shown for stop in stops)
        assert text.startswith(shown)
    else:
        assert shown == text


def test_worker_gets_no_settings_of_agentd():
    found = worker_environment({"PATH": "/bin", "AGENTD_TOKEN": "x", "GOMP_SPINCOUNT": "9"}, {"A": "b"})
    assert "AGENTD_TOKEN" not in found
    assert found["PATH"] == "/bin"
    assert found["A"] == "b"
    assert found["GOMP_SPINCOUNT"] == "0"
    assert found["ORT_DISABLE_TELEMETRY"] == "1"
