"""Histories that do not fit, and messages that nobody should have sent: told, counted, and harmless to the others."""

from __future__ import annotations

import asyncio
import re
import urllib.request
import zlib

import asyncpg
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from slmfleet.v1 import telemetry_pb2 as pb
from tests.reliability.counting import stored
from tests.reliability.forms import long_only
from tests.reliability.site import MODEL, Site, site
from tests.support.processes import wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt, pytest.mark.system, long_only]

STRANGER = "00000000-0000-4000-8000-000000000000"
EACH = 20


def test_what_does_not_fit_is_told_and_harms_nobody() -> None:
    with site() as fleet:
        node = fleet.add_node("edge-1")
        fleet.serve_model()
        fleet.await_agreement()
        _bad_messages(fleet)
        _restored_database(fleet)
        # The node's own rows went on all the while.
        found = fleet.await_rows(node)
        assert found.twice == []
        assert found.dropped == 0
        assert node.asker().ask(MODEL) == "w0 w1 w2 "


def _bad_messages(fleet: Site) -> None:
    """``EACH`` of every kind, as fast as they go; the log gets one line a node and minute."""
    node = fleet.nodes["edge-1"]
    before = node.numbered.look()
    [(_, epoch), last] = next(item for item in before.items() if item[0][0] == "events")
    kinds = {
        "malformed": (node.id, "metrics", b"\xff no protobuf"),
        "oversize": (node.id, "metrics", _bomb()),
        "mismatch": (node.id, "events", _batch("metrics", 1, 1, 1)),
        "unknown_node": (STRANGER, "metrics", _batch("metrics", 1, 1, 1)),
        # Rows that are committed under their epoch, with others: immutable batches never overlap.
        "overlap": (node.id, "events", _batch("events", epoch, 1, last + 1000)),
    }
    counted = _bad(fleet)
    user, password = fleet.broker.credentials_of_server()
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.username_pw_set(user, password)
    client.connect("127.0.0.1", fleet.broker.port)
    client.loop_start()
    try:
        for node_id, stream, payload in kinds.values():
            for _ in range(EACH):
                client.publish(f"slmfleet/v1/{node_id}/{stream}", payload, qos=1).wait_for_publish(10)
    finally:
        client.disconnect()
        client.loop_stop()
    for kind in kinds:
        wait_until(lambda kind=kind: _bad(fleet).get(kind, 0) > counted.get(kind, 0), f"{kind} is counted", 20)  # type: ignore[misc]
    assert fleet.server is not None
    assert fleet.server.process.poll() is None
    lines = [line for line in fleet.server.lines if "telemetry refused" in line]
    assert 1 <= len([line for line in lines if node.id in line]) <= 2
    assert 1 <= len([line for line in lines if STRANGER in line]) <= 2
    assert stored(fleet.postgres_url, node.id, node.name, {}).twice == []


def _batch(stream: str, epoch: int, first: int, last: int) -> bytes:
    return pb.Batch(stream=stream, epoch=epoch, first=first, last=last, dropped=last - first + 1).SerializeToString()


def _bomb() -> bytes:
    """Small on the wire, larger than anybody unpacks."""
    return pb.Batch(
        stream="metrics", epoch=1, first=1, last=1, payload=zlib.compress(bytes(64 << 20))
    ).SerializeToString()


def _bad(fleet: Site) -> dict[str, int]:
    """The counter of refused messages, by reason."""
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.ports['http']}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    found = re.findall(r'^slmfleet_ingest_\w*\{reason="(\w+)"\} (\d+)', page, re.MULTILINE)
    return {reason: int(count) for reason, count in found}


def _restored_database(fleet: Site) -> None:
    """An old desired state in the database, as a backup would bring it: the node holds still and says why."""
    node = fleet.nodes["edge-1"]
    held = node.status()["generation"]
    fleet.kill_server()

    async def restore() -> None:
        connection = await asyncpg.connect(fleet.postgres_url)
        try:
            # Another content under a generation that is long past; the timeline is the old one.
            await connection.execute(
                "UPDATE desired_states SET generation = 0, sha256 = '\\x00' WHERE node_id = $1", node.id
            )
        finally:
            await connection.close()

    asyncio.run(restore())
    fleet.start_server()
    wait_until(lambda: node.status()["conflict"], "the node says that histories do not fit", 60)
    status = node.status()
    assert status["generation"] == held, "never backwards"
    wait_until(lambda: "DesiredStateConflict" in _events(fleet, node.name), "the operator can read of it", 20)
    assert node.asker().ask(MODEL) == "w0 w1 w2 "


def _events(fleet: Site, name: str) -> list[str]:
    return [str(item["reason"]) for item in fleet.client.items(f"/nodes/{name}/events")]
