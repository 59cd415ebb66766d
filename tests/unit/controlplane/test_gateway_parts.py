"""The gateway's pure parts: the table of names, server-sent events, counters."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.db.routes import DeploymentRow, ReplicaRow
from controlplane.gateway.answers import ApiError, Events, error_event, tokens_in
from controlplane.gateway.metrics import Metrics
from controlplane.gateway.table import build

DEPLOYMENT = DeploymentRow("greeter", 1, "greeter", "smol", "1", exposed=True)
REPLICA = ReplicaRow("r1", "greeter", "n1", "edge-1", "online", True, True, False, 0, 0)


def test_names() -> None:
    table = build(
        [
            DEPLOYMENT,
            replace(DEPLOYMENT, name="greeter-south"),
            replace(DEPLOYMENT, name="hidden", agent="secretary", exposed=False),
            replace(DEPLOYMENT, name="bare", agent=None),
            replace(DEPLOYMENT, name="clash", agent=None, model="greeter"),
        ],
        [REPLICA, replace(REPLICA, id="r2", deployment="greeter-south"), replace(REPLICA, id="r3", deployment="clash")],
    )
    assert [target.name for target in table.listed] == [
        "agent/greeter", "bare", "clash", "greeter", "greeter-south", "smol"
    ]  # fmt: skip
    assert set(table.targets) - {target.name for target in table.listed} == {"smol@1", "greeter@1"}
    assert [replica.id for replica in table.targets["agent/greeter"].replicas] == ["r1", "r2"]
    # Where a bare name is both, the deployment wins.
    assert [replica.id for replica in table.targets["greeter"].replicas] == ["r1"]
    assert table.near("gretter")[0] == "greeter"


@pytest.mark.parametrize(
    ("row", "ready", "state", "offline"),
    [
        (REPLICA, True, "starting", "not connected here"),
        (
            replace(REPLICA, ready=False, bytes_done=40, bytes_total=100),
            False,
            "downloading 40 %",
            "not connected here",
        ),
        (replace(REPLICA, ready=False, degraded=True), False, "degraded", "not connected here"),
        (replace(REPLICA, node_state="lost"), True, "starting", "lost"),
        (replace(REPLICA, node_state="drained"), False, "drained", "not connected here"),
    ],
)
def test_states(row: ReplicaRow, ready: bool, state: str, offline: str) -> None:
    replica = build([DEPLOYMENT], [row]).targets["greeter"].replicas[0]
    assert (replica.ready, replica.state, replica.offline) == (ready, state, offline)


def test_the_order_of_rows_does_not_matter() -> None:
    deployments = [replace(DEPLOYMENT, name=f"d{number}") for number in range(4)]
    replicas = [replace(REPLICA, id=f"r{number}", deployment=f"d{number % 4}") for number in range(8)]
    expected = build(deployments, replicas)
    for seed in range(5):
        random.Random(seed).shuffle(deployments)
        random.Random(seed).shuffle(replicas)
        assert build(deployments, replicas) == expected


@given(
    st.lists(st.sampled_from(["data: a\n\n", "data: b\r\n\r\n", ": note\n\n"])), st.lists(st.integers(1, 12)), st.data()
)
def test_events_pass_whole_however_they_are_cut(events: list[str], sizes: list[int], data: st.DataObject) -> None:
    stream = "".join(events).encode() + data.draw(st.sampled_from([b"", b"data: unfinished"]))
    guard = Events()
    out, position = b"", 0
    for size in [*sizes, len(stream)]:
        passed = guard.feed(stream[position : position + size])
        position += size
        assert not passed or passed.endswith((b"\n\n", b"\r\n\r\n"))
        out += passed
    assert out + guard.rest() == stream


def test_an_endless_event_is_not_held_for_ever() -> None:
    guard = Events()
    assert sum(len(guard.feed(b"x" * 65536)) for _ in range(64)) > 2 << 20


def test_an_error_event_is_one_event() -> None:
    event = error_event(ApiError(502, "link_lost", "gone\n\nand more"))
    assert event.count(b"\n\n") == 1
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "link_lost"


def test_tokens_are_found_and_text_is_not_mistaken_for_them() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens":3}}\n\n'
    assert tokens_in(usage) == {"prompt": 7, "completion": 3}
    text = json.dumps({"content": '"completion_tokens": 99'}).encode()
    assert tokens_in(text) == {}


def test_metrics_text() -> None:
    metrics = Metrics()
    metrics.requests[("greeter", "ok")] += 2
    metrics.retries["greeter"] += 1
    metrics.total_s.observe("greeter", 0.02)
    metrics.total_s.observe("greeter", 500)
    lines = metrics.text(outstanding=4).splitlines()
    assert 'slmfleet_gateway_requests_total{target="greeter",result="ok"} 2' in lines
    assert 'slmfleet_gateway_retries_total{target="greeter"} 1' in lines
    assert "slmfleet_gateway_outstanding 4" in lines
    assert 'slmfleet_gateway_seconds_bucket{target="greeter",le="0.025"} 1' in lines
    assert 'slmfleet_gateway_seconds_bucket{target="greeter",le="+Inf"} 2' in lines
    assert 'slmfleet_gateway_seconds_count{target="greeter"} 2' in lines
