"""What is judged of a worker: why it ended, whether it takes too much, whether it thrashes."""

from __future__ import annotations

import pytest

from agentd.models.admission import decode_speed, speed_so_far
from agentd.models.failures import Failures
from agentd.models.life import over_limit, thrash, why
from agentd.models.process import Exit
from agentd.models.settings import BackoffSettings
from slmfleet.v1.worker_pb2 import WorkerReply

MB = 10**6


@pytest.mark.parametrize(
    ("speed", "usual", "stalled", "thrashes"),
    [
        pytest.param(40.0, None, 0.9, False, id="nothing is known yet"),
        pytest.param(40.0, 40.0, 0.0, False, id="as ever"),
        pytest.param(12.0, 40.0, 0.9, False, id="slower, as beside a busy neighbour"),
        pytest.param(9.0, 40.0, 0.05, False, id="far slower, but nobody waits for memory"),
        pytest.param(9.0, 40.0, 0.2, True, id="far slower, and waiting for memory"),
        pytest.param(3.0, 40.0, 0.0, True, id="thirteen times slower, where the kernel does not tell"),
    ],
)
def test_thrash_is_seen_by_pressure_and_speed(speed, usual, stalled, thrashes):
    reason = thrash(speed, usual, stalled)
    assert bool(reason) is thrashes
    assert not thrashes or (f"{speed:.1f} tokens/s instead of {usual:.1f}" in reason and f"{stalled:.0%}" in reason)


@pytest.mark.parametrize(
    ("memory", "limit", "words"),
    [
        (100 * MB, 0, ""),
        (100 * MB, 100 * MB, ""),
        (101 * MB, 100 * MB, "it took 101.0 MB, more than its limit of 100.0 MB"),
    ],
)
def test_over_limit_names_the_numbers(memory, limit, words):
    assert over_limit(memory, limit) == words


@pytest.mark.parametrize(
    ("failure", "how", "words"),
    [
        ("no such file", Exit(1, ("noise",)), "no such file"),
        ("can't load", Exit(1, ("0.00.01.2 E llama_load: bad magic",)), "can't load: bad magic"),
        ("", Exit(-9, ("a", "b", "c", "d")), "the worker was killed by SIGKILL: b; c; d"),
        ("", Exit(3), "the worker ended with exit status 3"),
        ("", Exit(-9, (), 128 * MB), "the worker was killed by the kernel: it needed more than its limit of 128.0 MB"),
    ],
)
def test_why_a_worker_ended(failure, how, words):
    assert why(failure, how) == words


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [(100, 0.5, None), (100, 2.0, 50.0), (3, 2.0, None), (3, 10.0, 0.3), (0, 10.0, 0.0)],
)
def test_speed_is_told_when_there_is_enough_of_it(tokens, seconds, speed):
    assert speed_so_far(tokens, seconds) == speed


@pytest.mark.parametrize(("tokens", "seconds", "speed"), [(7, 1.0, None), (8, 2.0, 4.0), (8, 0.0, None)])
def test_speed_of_a_whole_answer(tokens, seconds, speed):
    assert decode_speed(WorkerReply.Done(output_tokens=tokens, decode_seconds=seconds)) == speed


def test_failures_in_a_row_degrade_and_one_success_forgives():
    failures = Failures(BackoffSettings(base_s=10, cap_s=300, degraded_after=3))
    lines = [f"line {n}" for n in range(9)]
    assert [failures.add("it died", lines, 100.0) for _ in range(2)] == ["it died", "it died"]
    assert (failures.until_s, failures.degraded) == (120.0, False)
    assert failures.add("it died", lines, 100.0) == "it died (3 times in a row)"
    assert failures.degraded
    assert failures.lines == tuple(lines[-5:])
    failures.succeeded()
    assert (failures.count, failures.degraded, failures.lines) == (0, False, ())
