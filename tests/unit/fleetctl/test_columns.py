"""What the cells of ``get`` say, from the objects of REST; half-filled objects must not break a table."""

import datetime

import pytest

from fleetctl import columns, kinds
from fleetctl.describe import Described, blocks
from fleetctl.kinds import Kind

NOW = datetime.datetime(2026, 11, 22, 12, 0, tzinfo=datetime.UTC)
NODE = {
    "metadata": {"name": "edge-1", "labels": {"tier": "demo"}, "createdAt": "2026-11-22T11:00:00Z"},
    "status": {
        "state": "online",
        "stateSince": "2026-11-22T11:50:00Z",
        "stateReason": "heard from 1 s ago",
        "connected": True,
        "lastSeenAt": "2026-11-22T11:59:57Z",
        "agentdVersion": "0.1.0",
        "localApi": "http://127.0.0.1:11535",
        "inventory": {"cpuCount": 2, "memoryBytes": "8200000000", "machine": "x86_64"},
        "desiredGeneration": 4,
        "appliedGeneration": 3,
        "assignments": [
            {
                "deployment": "greeter",
                "ready": True,
                "warm": True,
                "conditions": [{"type": "Ready", "status": "true", "reason": "Loaded", "message": "it fits"}],
            },
            {"deployment": "other", "ready": False, "bytesDone": 1, "bytesTotal": 4},
        ],
    },
}


def cells(kind: Kind, row: dict[str, object]) -> dict[str, str]:
    return {column.title: column.cell(row) for column in columns.columns(kind, NOW)}


def test_a_node_in_one_line() -> None:
    line = cells(kinds.NODE, NODE)
    assert line["STATE"] == "online"
    assert line["REPLICAS"] == "1/2"
    assert line["SEEN"] == "3s"
    assert line["HARDWARE"] == "2 CPU, 8.2 GB, x86_64"
    assert line["LABELS"] == "tier=demo"


def test_a_model_that_is_being_fetched_says_how_far() -> None:
    row = {
        "spec": {"variants": [{"name": "q4-1", "format": "gguf"}]},
        "status": {"version": "1", "phase": "fetching", "bytesDone": 49_000_000, "bytesTotal": 98_000_000},
    }
    line = cells(kinds.MODEL, row)
    assert (line["PHASE"], line["SIZE"], line["VARIANTS"]) == ("fetching 50%", "98.0 MB", "q4-1 (gguf)")


def test_a_deployment_says_why_it_is_not_whole() -> None:
    unplaced = [{"count": 1, "reason": "no node matches the selector"}]
    row = {"spec": {"agent": "greeter", "replicas": 2}, "status": {"desired": 2, "ready": 1, "unplaced": unplaced}}
    line = cells(kinds.DEPLOYMENT, row)
    assert (line["RUNS"], line["MODE"], line["READY"]) == ("agent/greeter", "2 replicas", "1/2")
    assert line["MESSAGE"] == "1 not placed: no node matches the selector"


@pytest.mark.parametrize(
    ("replica", "state"),
    [
        ({"warm": True, "ready": True, "staged": True}, "warm"),
        ({"ready": True, "staged": True}, "ready"),
        ({"staged": True}, "staged"),
        ({"bytesDone": 45, "bytesTotal": 100}, "fetching 45%"),
        ({}, "pending"),
        ({"degraded": True, "ready": True}, "degraded"),
    ],
)
def test_a_replica_is_as_far_as_its_last_condition(replica: dict[str, object], state: str) -> None:
    assert columns.replica_state(replica) == state


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.plural)
@pytest.mark.parametrize("row", [{}, {"metadata": None, "spec": None, "status": None}, {"status": {"inventory": None}}])
def test_what_the_server_left_out_leaves_a_cell_empty(kind: Kind, row: dict[str, object]) -> None:
    assert all(isinstance(cell, str) for cell in cells(kind, row).values())


@pytest.mark.parametrize("kind", kinds.KINDS[:5], ids=lambda kind: kind.plural)
def test_every_kind_can_be_described_even_when_bare(kind: Kind) -> None:
    assert blocks(Described(kind, {"metadata": {"name": "x"}}), NOW)[0].pairs[0] == ("Name", "x")


def test_describing_a_node_tells_state_hardware_and_conditions() -> None:
    page = {block.title: block for block in blocks(Described(kinds.NODE, NODE), NOW)}
    head = dict(page[""].pairs)
    assert head["State"] == "online for 10m: heard from 1 s ago"
    assert head["Desired state"] == "generation 4, waiting for the node, which holds 3"
    assert ("Memory", "8.2 GB") in page["Hardware"].pairs
    assert [row["owner"] for row in page["Conditions"].rows] == ["greeter"]
