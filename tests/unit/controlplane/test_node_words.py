"""What a node says, as rows; and whether its history and the server's fit."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.node_api import messages
from controlplane.node_api.history import Hold, Send, UpToDate, Version, compare
from slmfleet.v1 import session_pb2, state_pb2

A, B = b"a" * 32, b"b" * 32
SERVER = Version("t1", 5, A)


@pytest.mark.parametrize(
    ("node", "server", "expected"),
    [
        (Version(), None, UpToDate),
        (Version("t1", 5, A), None, UpToDate),
        (Version(), SERVER, Send),
        (Version("t1", 4, B), SERVER, Send),
        (Version("t1", 5, A), SERVER, UpToDate),
        (Version("t1", 5, B), SERVER, Hold),
        (Version("t1", 6, A), SERVER, Hold),
        # A database that was restored counts in a timeline of its own.
        (Version("t0", 4, B), SERVER, Send),
        (Version("t0", 5, A), SERVER, Send),
        (Version("t0", 9, A), SERVER, Send),
        (Version("t0", 5, B), SERVER, Hold),
        (Version("t0", 9, B), SERVER, Hold),
    ],
)
def test_histories(node: Version, server: Version | None, expected: type) -> None:
    assert isinstance(compare(node, server), expected)


versions = st.builds(Version, st.sampled_from(["t0", "t1"]), st.integers(0, 4), st.sampled_from([A, B]))


@given(versions, versions)
def test_after_sending_there_is_nothing_more_to_send(node: Version, server: Version) -> None:
    match compare(node, server):
        case Send(version):
            assert version == server
            assert compare(version, server) == UpToDate()
        case Hold(_, reason):
            assert reason
        case UpToDate():
            assert server.generation == 0 or node == server


def test_a_status_fits_its_columns_whatever_it_says() -> None:
    status = state_pb2.AssignmentStatus(id="a\0b", revision=2**64 - 1, bytes_total=2**64 - 1)
    condition = status.conditions.add(type="Ready", status=state_pb2.CONDITION_STATUS_TRUE, message="x\0" + "y" * 9000)
    condition.changed_at.seconds = 2**62
    row = messages.status_row("n", 1, status)
    assert (row.assignment_id, row.revision, row.bytes_total) == ("ab", 2**63 - 1, 2**63 - 1)
    assert (row.ready, row.staged) == (True, False)
    assert len(row.conditions[0]["message"]) <= 4000
    assert row.conditions[0]["changedAt"] is None
    assert "\\u0000" not in json.dumps(row.conditions)


@given(st.binary(max_size=50))
def test_a_result_is_json_that_postgres_takes(raw: bytes) -> None:
    value = messages.result_row("n", session_pb2.OperationResult(id="o", result_json=raw)).result
    text = json.dumps(value, allow_nan=False)
    assert "\\u0000" not in text


def test_results_that_are_json_stay_json() -> None:
    cases = [
        (b"", None),
        (b'{"a": [1, 2.5]}', {"a": [1, 2.5]}),
        (b"no json", "no json"),
        (b"NaN", "NaN"),
        (b"1e999", "1e999"),
        (b'"\\ud800"', '"\\ud800"'),
    ]
    for raw, expected in cases:
        assert messages.result_row("n", session_pb2.OperationResult(result_json=raw)).result == expected


def test_inventory_is_camel_case_json() -> None:
    inventory = state_pb2.Inventory(hostname="h\0", memory_bytes=2**64 - 1, formats=["gguf"])
    found = messages.inventory(inventory)
    assert (found["hostname"], found["memoryBytes"], found["formats"]) == ("h", 2**63 - 1, ["gguf"])
    assert found["cpuCount"] == 0
