"""Nodes over HTTP: what is shown, relabelling, draining, revoking, events and metrics."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.db import objects
from controlplane.db.engine import Hints, make_engine
from controlplane.domain.selectors import Operator, Requirement, Selector
from tests.support.rest import Api, run

pytestmark = pytest.mark.postgres


async def enrol(api: Api, *names: str, labels: str = '{"site": "lyon"}') -> None:
    for name in names:
        await api.query(
            """INSERT INTO nodes (id, name, labels, inventory)
               VALUES (:id, :name, CAST(:labels AS jsonb), '{"cpu_count": 2}')""",
            id=f"id-{name}",
            name=name,
            labels=labels,
        )


def test_a_node_shows_its_session_desired_state_and_replicas(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1", "edge-2")
        await api.query("INSERT INTO node_sessions (node_id, replica_id, epoch) VALUES ('id-edge-1', 'r1', 1)")
        await api.query(
            """INSERT INTO node_sessions (node_id, replica_id, epoch, disconnected_at)
               VALUES ('id-edge-2', 'r1', 1, now())"""
        )
        await api.query(
            """INSERT INTO desired_states (node_id, timeline, generation, sha256, document, applied_generation, refused)
               VALUES ('id-edge-1', 't', 4, '', '', 3, 'lacks exclusive')"""
        )
        await api.query(
            "INSERT INTO assignments (id, deployment, revision, node_id) VALUES ('a1', 'kiosks', 1, 'id-edge-1')"
        )
        one, two = (await api.call("GET", "/nodes"))["items"]
        assert one["kind"] == "Node"
        assert one["metadata"]["labels"] == {"site": "lyon"}
        status = one["status"]
        assert (
            status
            | {
                "state": "disconnected",
                "connected": True,
                "inventory": {"cpu_count": 2},
                "desiredGeneration": 4,
                "appliedGeneration": 3,
                "refused": "lacks exclusive",
            }
            == status
        )
        assert status["lastSeenAt"].endswith("Z")
        assert [(item["id"], item["deployment"], item["ready"]) for item in status["assignments"]] == [
            ("a1", "kiosks", False)
        ]
        assert two["status"]["connected"] is False
        assert two["status"]["desiredGeneration"] == 0
        assert two["status"]["assignments"] == []
        assert await api.call("GET", "/nodes/edge-1") == one
        assert "password" not in str(one)

    run(migrated_postgres_url, test)


def test_a_patch_merges_labels_and_drains(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1", labels='{"site": "lyon", "old": "1"}')
        heard: asyncio.Queue[str] = asyncio.Queue()
        hints = Hints(api.engine)
        hints.subscribe(heard.put_nowait)
        listening = asyncio.create_task(hints.run(), name="hints")
        assert await heard.get() == ""
        patched = await api.call("PATCH", "/nodes/edge-1", 200, {"labels": {"hw": "pi5", "old": None}, "drained": True})
        assert patched["metadata"]["labels"] == {"site": "lyon", "hw": "pi5"}
        assert patched["spec"] == {"drained": True}
        assert patched["metadata"]["resourceVersion"] == "2"
        assert {await asyncio.wait_for(heard.get(), 10) for _ in range(2)} == {"spec", "node:id-edge-1"}
        listening.cancel()
        again = await api.call("PATCH", "/nodes/edge-1", 200, {"labels": {"hw": "pi5"}})
        assert again == patched
        await api.call("PATCH", "/nodes/edge-1", 200, {})
        back = await api.call("PATCH", "/nodes/edge-1", 200, {"drained": False}, headers={"if-match": '"2"'})
        assert back["spec"] == {"drained": False}
        await api.call("PATCH", "/nodes/edge-1", 412, {"drained": True}, headers={"if-match": '"2"'})
        await api.call("PATCH", "/nodes/edge-9", 404, {"drained": True})
        events = (await api.call("GET", "/nodes/edge-1/events"))["items"]
        assert [item["reason"] for item in events] == ["Undrained", "Drained"]
        (drained,) = [item for item in (await api.call("GET", "/audit"))["items"] if item["detail"].get("labels")]
        assert drained["detail"] == {"labels": {"hw": "pi5", "old": None}, "drained": True}

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(
    ("patch", "pointer", "words"),
    [
        ({"label": {}}, "/label", "not known"),
        ({"labels": {"a b": "c"}}, "/labels/a b", "is no label key"),
        ({"labels": {"a": "c d"}}, "/labels/a", "is no label value"),
        ({"labels": {"a": 1}}, "/labels/a", "string"),
        ({"drained": "yes"}, "/drained", "boolean"),
        ({"labels": {f"l{number}": "x" for number in range(64)}}, "/labels", "at most 64"),
        ([], "", "object"),
        ("{", "", "object"),
        (None, "", "the body is missing"),
    ],
)
def test_bad_patches(migrated_postgres_url: str, patch: Any, pointer: str, words: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1")
        problem = await api.call("PATCH", "/nodes/edge-1", 422, patch)
        found = {item["pointer"].removesuffix("/[key]"): item["message"] for item in problem["errors"]}
        assert pointer in found, found
        assert words in found[pointer]

    run(migrated_postgres_url, test)


def test_a_deleted_node_is_gone_with_its_certificates(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1")
        await api.query(
            "INSERT INTO node_certificates (fingerprint_sha256, node_id, not_after) VALUES ('f', 'id-edge-1', now())"
        )
        await api.call("DELETE", "/nodes/edge-1", 204)
        assert await api.query("SELECT * FROM node_certificates") == []
        await api.call("GET", "/nodes/edge-1", 404)
        await api.call("DELETE", "/nodes/edge-1", 404)
        (entry,) = (await api.call("GET", "/audit"))["items"]
        assert (entry["action"], entry["object"], entry["detail"]) == ("delete", "node/edge-1", {"id": "id-edge-1"})

    run(migrated_postgres_url, test)


def test_a_revoked_node_is_not_shown(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1", "edge-2")
        await api.query("UPDATE nodes SET revoked_at = now() WHERE name = 'edge-1'")
        assert [item["metadata"]["name"] for item in (await api.call("GET", "/nodes"))["items"]] == ["edge-2"]
        await api.call("PATCH", "/nodes/edge-1", 404, {"drained": True})

    run(migrated_postgres_url, test)


def test_events_and_metrics_are_newest_first_and_paged(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await enrol(api, "edge-1", "edge-2")
        start = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
        for number in range(5):
            await api.query(
                """INSERT INTO events (severity, object, reason, message)
                   VALUES ('info', 'node/edge-1', 'R', :message)""",
                message=f"event {number}",
            )
            await api.query(
                """INSERT INTO node_metrics (node_id, epoch, sequence, at, boot_id, boottime_ms, cpu_fraction,
                   memory_used_bytes, in_flight, output_tokens, requests_ok, requests_failed, row)
                   VALUES ('id-edge-1', 1, :number, :at, 'b', 0, 0.5, 100, 0, 7, 1, 0, '')""",
                number=number,
                at=start + datetime.timedelta(seconds=number // 2),
            )
        for path, key, expected in (
            ("events", "message", [f"event {number}" for number in (4, 3, 2, 1, 0)]),
            ("metrics", "sequence", [4, 3, 2, 1, 0]),
        ):
            found: list[Any] = []
            cursor: dict[str, str] = {}
            while True:
                page = await api.call("GET", f"/nodes/edge-1/{path}", limit=2, **cursor)
                found += [item[key] for item in page["items"]]
                if page["nextCursor"] is None:
                    break
                cursor = {"cursor": page["nextCursor"]}
            assert found == expected
            assert (await api.call("GET", f"/nodes/edge-2/{path}"))["items"] == []
            await api.call("GET", f"/nodes/edge-9/{path}", 404)
        await api.call("GET", "/nodes/edge-1/events", 400, **cursor)

    run(migrated_postgres_url, test)


keys = st.sampled_from(["site", "hw", "a/b", "it's", "x"])
values = st.sampled_from(["", "lyon", "turin", "5"])
requirements = st.builds(
    lambda key, operator, chosen: Requirement(key, operator, tuple(sorted(chosen)) if "in" in operator else ()),
    keys,
    st.sampled_from(Operator),
    st.sets(values, min_size=1, max_size=3),
)


def test_selectors_mean_in_the_database_what_they_mean_in_python(migrated_postgres_url: str) -> None:
    column = sa.column("labels", objects.tables.nodes.c.labels.type)
    loop = asyncio.new_event_loop()
    engine = make_engine(migrated_postgres_url)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(requirements, max_size=3), st.dictionaries(keys, values, max_size=4))
    def check(wanted: list[Requirement], labels: dict[str, str]) -> None:
        selector = Selector(tuple(wanted))
        row = sa.select(sa.literal(labels, column.type).label("labels")).subquery()
        query = sa.select(objects.selected(row.c.labels, selector))

        async def ask() -> bool:
            async with engine.connect() as connection:
                return bool((await connection.execute(query)).scalar_one())

        assert loop.run_until_complete(ask()) == selector.matches(labels)

    try:
        check()
    finally:
        loop.run_until_complete(engine.dispose())
        loop.close()
