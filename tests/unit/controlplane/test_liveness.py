"""The truth table of liveness, row by row, and what must hold for any history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.liveness import DOWN, Facts, LivenessPolicy, NodeState, Session, assess

POLICY = LivenessPolicy(beat_s=5.0, beats_per_ttl=3.0)
TTL = POLICY.ttl_s
NOW = 1_000_000.0
S = NodeState


def facts(silence: float, *, stream: str = "open", previous: NodeState = S.ONLINE, **more: object) -> Facts:
    """A node whose last beat came ``silence`` TTLs ago and whose stream is open, closed or at a dead replica."""
    seen = NOW - silence * TTL
    died_ago = float(str(more.pop("died", silence)))
    died = NOW - died_ago * TTL if stream == "dead" else None
    session = None if stream == "never" else Session(stream != "closed", seen, died)
    telemetry = more.pop("telemetry", None)
    values: dict = {"up_since": 0.0, "current": True, **more}
    if telemetry is not None:
        values["telemetry_at"] = NOW - float(str(telemetry)) * TTL
    return Facts(previous=previous, session=session, **values)


# stream, silence in TTLs, presence, age of telemetry in TTLs, verdict
TABLE = [
    ("never", 0, None, None, S.DISCONNECTED),
    ("never", 9, True, 0.1, S.DISCONNECTED),
    ("open", 0.0, None, None, S.ONLINE),
    ("open", 0.4, False, None, S.ONLINE),  # a will cannot outvote a beat
    ("open", 0.5, False, None, S.SUSPECT),  # 1.5 beats
    ("open", 0.99, True, None, S.ONLINE),
    ("open", 0.99, None, 9, S.ONLINE),
    ("dead", 0.5, True, None, S.ONLINE),
    ("dead", 1.0, True, 0.1, S.SUSPECT),
    ("closed", 0.0, True, 0.0, S.SUSPECT),
    ("closed", 1.99, None, None, S.SUSPECT),
    ("open", 1.0, True, 0.1, S.SUSPECT),
    ("open", 1.99, None, None, S.SUSPECT),
    ("open", 2.0, True, 0.1, S.DISCONNECTED),
    ("closed", 2.0, None, None, S.DISCONNECTED),
    ("closed", 4.99, None, None, S.DISCONNECTED),
    ("closed", 5.0, True, 2.9, S.DISCONNECTED),  # it still sends telemetry
    ("closed", 500.0, False, 2.9, S.DISCONNECTED),
    ("closed", 5.0, True, 3.0, S.LOST),  # a retained presence proves nothing
    ("open", 5.0, None, None, S.LOST),
    ("dead", 5.0, None, None, S.LOST),
]


@pytest.mark.parametrize(("stream", "silence", "presence", "telemetry", "expected"), TABLE)
def test_truth_table(
    stream: str, silence: float, presence: bool | None, telemetry: float | None, expected: NodeState
) -> None:
    verdict = assess(NOW, POLICY, facts(silence, stream=stream, presence=presence, telemetry=telemetry))
    assert verdict.state is expected
    assert verdict.reason


# previous, drain wished, drain applied, newest desired state applied, verdict of a node that beats
CONNECTED_TABLE = [
    (S.ONLINE, False, False, False, S.ONLINE),
    (S.SUSPECT, False, False, False, S.ONLINE),
    (S.DISCONNECTED, False, False, False, S.RECONCILING),
    (S.LOST, False, False, False, S.RECONCILING),
    (S.RECONCILING, False, False, False, S.RECONCILING),
    (S.RECONCILING, False, False, True, S.ONLINE),
    (S.DISCONNECTED, False, False, True, S.ONLINE),
    (S.ONLINE, True, False, True, S.DRAINING),
    (S.DRAINING, True, True, True, S.DRAINED),
    (S.LOST, True, False, False, S.DRAINING),
    (S.DRAINED, False, True, False, S.ONLINE),
]


@pytest.mark.parametrize(("previous", "wished", "applied", "current", "expected"), CONNECTED_TABLE)
def test_connected_states(previous: NodeState, wished: bool, applied: bool, current: bool, expected: NodeState) -> None:
    known = facts(0.1, previous=previous, drain_wished=wished, drain_applied=applied, current=current)
    assert assess(NOW, POLICY, known).state is expected


def test_a_start_of_the_control_plane_gives_a_silent_node_all_its_time_again() -> None:
    before = facts(100, stream="closed", previous=S.SUSPECT, up_since=NOW)
    assert assess(NOW, POLICY, before).state is S.SUSPECT
    assert assess(NOW + 1.9 * TTL, POLICY, before).state is S.SUSPECT
    assert assess(NOW + 2.0 * TTL, POLICY, before).state is S.DISCONNECTED
    assert assess(NOW + 4.9 * TTL, POLICY, replace(before, previous=S.DISCONNECTED)).state is S.DISCONNECTED
    assert assess(NOW + 5.0 * TTL, POLICY, before).state is S.LOST


def test_grace_does_not_bring_a_lost_node_back() -> None:
    assert assess(NOW, POLICY, facts(100, stream="closed", previous=S.LOST, up_since=NOW)).state is S.LOST


def test_a_lost_node_that_came_and_went_is_suspect() -> None:
    assert assess(NOW, POLICY, facts(0.1, stream="closed", previous=S.LOST)).state is S.SUSPECT


def test_the_reason_tells_why_the_stream_closed() -> None:
    known = replace(facts(0, stream="closed"), session=Session(False, NOW, None, "connection reset"))
    assert assess(NOW, POLICY, known).reason == "its stream closed (connection reset)"
    lost = "its stream closed (connection reset), no beat since 1970-01-12 13:46:40 UTC"
    assert assess(NOW + 9 * TTL, POLICY, known).reason == lost


def test_the_reason_tells_since_when_nothing_was_heard() -> None:
    assert assess(NOW + 3600, POLICY, facts(0)).reason == "no beat since 1970-01-12 13:46:40 UTC"


spans = st.floats(min_value=0, max_value=12, allow_nan=False)
some_facts = st.builds(
    facts,
    spans,
    stream=st.sampled_from(["open", "closed", "dead"]),
    previous=st.sampled_from(list(NodeState)),
    died=spans,
    up_since=spans.map(lambda ttls: NOW - ttls * TTL),
    presence=st.sampled_from([True, False, None]),
    telemetry=st.none() | spans,
    drain_wished=st.booleans(),
    current=st.booleans(),
)


@given(some_facts)
def test_nobody_is_lost_before_its_time(known: Facts) -> None:
    assert known.session is not None
    heard = max(known.session.last_seen_at, known.up_since, known.session.owner_died_at or 0)
    if known.previous is not S.LOST and assess(NOW, POLICY, known).state is S.LOST:
        assert NOW - heard >= POLICY.lost_ttls * TTL - 1e-6


@given(some_facts, st.floats(min_value=0, max_value=0.999))
def test_nothing_is_said_that_time_alone_makes_untrue(known: Facts, part: float) -> None:
    """What is written once is read for months."""
    verdict = assess(NOW, POLICY, known)
    until = verdict.recheck_at if verdict.recheck_at is not None else NOW + 1e7
    later = assess(NOW + part * (until - NOW), POLICY, known)
    assert (later.state, later.reason) == (verdict.state, verdict.reason)


@given(some_facts)
def test_a_closed_stream_is_never_connected(known: Facts) -> None:
    assert known.session is not None
    if not known.session.stream_open:
        assert assess(NOW, POLICY, known).state in DOWN


@given(some_facts, st.lists(st.floats(min_value=0.01, max_value=3), max_size=12))
def test_without_a_beat_it_only_gets_worse(known: Facts, steps: list[float]) -> None:
    order = [S.SUSPECT, S.DISCONNECTED, S.LOST]
    now, known = NOW, replace(known, telemetry_at=None)
    worst = -1
    for step in steps:
        state = assess(now, POLICY, known).state
        level = order.index(state) if state in order else -1
        assert level >= worst
        worst, known, now = level, replace(known, previous=state), now + step * TTL


@given(some_facts)
def test_the_verdict_holds_until_its_recheck(known: Facts) -> None:
    first = assess(NOW, POLICY, known)
    settled = replace(known, previous=first.state)
    until = first.recheck_at
    later = (NOW + until) / 2 if until is not None else NOW + 1e6
    assert until is None or until > NOW
    if first.state is assess(NOW, POLICY, settled).state:
        assert assess(later, POLICY, settled).state is first.state
