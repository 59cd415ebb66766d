"""The controllers over a real Postgres: election and fencing, place and replace with rows, desired states."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.artifacts.store import BlobStore
from controlplane.controllers import Controllers
from controlplane.controllers.leadership import Leadership
from controlplane.controllers.liveness import LivenessController
from controlplane.db import fleet, leaders
from controlplane.db.engine import Hints, hint, make_engine
from controlplane.domain.liveness import LivenessPolicy
from slmfleet.v1 import state_pb2

pytestmark = pytest.mark.postgres

# One TTL is 0.6 s: a node is lost after 3 s of silence, which no hiccup of a busy machine reaches.
FAST = LivenessPolicy(beat_s=0.2)
SLOW = LivenessPolicy(beat_s=20.0)
DIGEST = "ab" * 32


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@contextlib.asynccontextmanager
async def engine_for(url: str) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def controlplane(
    engine: AsyncEngine, tmp_path: Path, policy: LivenessPolicy = SLOW, replica_id: str = "cp-1"
) -> AsyncIterator[Controllers]:
    """The controllers of one control-plane process, with its hints."""
    hints = Hints(engine)
    made = Controllers(
        engine, hints, replica_id, policy, BlobStore(tmp_path / "blobs"), ca_pem=["CA"], cache=tmp_path / "cache"
    )
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(hints.run(), name="hints"), group.create_task(made.run(), name="controllers")]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()


async def execute(engine: AsyncEngine, *statements: str, topic: str | None = None, **values: object) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(sa.text(statement), values)
        if topic is not None:
            await hint(connection, topic)


async def rows(engine: AsyncEngine, query: str, **values: object) -> list[sa.Row[Any]]:
    async with engine.connect() as connection:
        return list(await connection.execute(sa.text(query), values))


async def until(check: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
    """What ``check`` says as soon as that is true. The database's state is the event that is waited for."""
    try:
        async with asyncio.timeout(seconds):
            while not (found := await check()):  # noqa: ASYNC110 (Postgres has no event for a row)
                await asyncio.sleep(0.02)
            return found
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {await check()!r}") from None


async def add_node(engine: AsyncEngine, name: str, replica_id: str = "cp-1", labels: str = "{}") -> None:
    inventory = {"formats": ["gguf"], "memoryBytes": 8 * 10**9, "diskFreeBytes": 50 * 10**9}
    await execute(
        engine,
        "INSERT INTO nodes (id, name, labels, inventory) VALUES (:name, :name, CAST(:labels AS jsonb),"
        " CAST(:inventory AS jsonb))",
        name=name,
        labels=labels,
        inventory=json.dumps(inventory),
    )
    await execute(
        engine,
        "INSERT INTO node_sessions (node_id, replica_id, epoch) VALUES (:name, :replica, 1)",
        topic=f"node:{name}",
        name=name,
        replica=replica_id,
    )


async def add_deployment(engine: AsyncEngine, replicas: int = 2) -> None:
    variants = [{"name": "q4", "format": "gguf", "quantization": "", "files": [
        {"sha256": DIGEST, "sizeBytes": 98_000_000, "name": "model.gguf"}]}]  # fmt: skip
    spec = {"agent": None, "model": "smollm2", "selector": "", "mode": "replicas", "replicas": replicas,
            "onDisconnect": "replace"}  # fmt: skip
    pinned = {"spec": spec, "agent": None, "model": {"name": "smollm2", "version": "1", "digest": "d1"}}
    await execute(
        engine,
        "INSERT INTO models (name, current_version) VALUES ('smollm2', '1')",
        "INSERT INTO model_versions (model, version, digest, phase, spec, variants) VALUES"
        " ('smollm2', '1', 'd1', 'ready', '{\"contextTokens\": 2048}', CAST(:variants AS jsonb))",
        "INSERT INTO deployments (name, spec, current_revision) VALUES ('greeter', CAST(:spec AS jsonb), 1)",
        "INSERT INTO revisions (deployment, number, pinned) VALUES ('greeter', 1, CAST(:pinned AS jsonb))",
        topic="spec",
        variants=json.dumps(variants),
        spec=json.dumps(spec),
        pinned=json.dumps(pinned),
    )


async def apply_all(engine: AsyncEngine, beating: set[str]) -> None:
    """Stand in for sessions and nodes: beats, "applied", and every replica ready."""
    while True:
        await execute(
            engine,
            "UPDATE node_sessions SET last_seen_at = clock_timestamp() WHERE node_id = ANY (CAST(:ids AS text[]))",
            "UPDATE desired_states SET applied_generation = generation WHERE node_id = ANY (CAST(:ids AS text[]))"
            " AND applied_generation <> generation",
            "INSERT INTO assignment_statuses (assignment_id, revision, observed_generation, staged, ready, warm,"
            " degraded) SELECT id, revision, 1, true, true, true, false FROM assignments"
            " WHERE node_id = ANY (CAST(:ids AS text[])) FOR KEY SHARE"
            " ON CONFLICT (assignment_id) DO UPDATE SET revision = excluded.revision",
            topic="spec",
            ids=sorted(beating),
        )
        await asyncio.sleep(0.05)


def test_what_a_node_is_and_runs_reaches_those_who_decide(migrated_postgres_url: str) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:
            await add_node(engine, "edge-1")
            await add_deployment(engine, 1)
            await execute(
                engine,
                "UPDATE nodes SET inventory = inventory || CAST(:more AS jsonb)",
                "INSERT INTO assignments (id, deployment, revision, node_id, reason)"
                " VALUES ('a1', 'greeter', 1, 'edge-1', '')",
                more=json.dumps({"cpuCount": 8, "accelerators": ["nvidia"]}),
            )

            async def replica() -> tuple[str, str]:
                async with engine.connect() as connection:
                    [found] = (snapshot := await fleet.load_fleet(connection)).replicas
                [node] = snapshot.nodes
                assert (node.cores, node.accelerators) == (8, {"nvidia"})
                return found.variant, found.variant_of

            assert await replica() == ("", "")
            await execute(
                engine,
                "INSERT INTO assignment_statuses (assignment_id, revision, observed_generation, staged, ready, warm,"
                " degraded, variant) VALUES ('a1', 1, 1, true, true, true, false, 'q4')",
            )
            assert await replica() == ("q4", "smollm2@1")

    run(scenario())


# --- leading -------------------------------------------------------------------------------------------------------


def test_one_leads_and_the_other_takes_over_when_the_lease_ends(migrated_postgres_url: str) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:

            async def acquire(holder: str, lease_s: float, renew: int | None = None) -> int | None:
                async with engine.begin() as connection:
                    return await leaders.acquire(connection, "placement", holder, lease_s, renew)

            assert await acquire("a", 60) == 1
            assert await acquire("b", 60) is None
            assert await acquire("a", 60, 1) == 1, "renewal keeps the epoch"
            assert await acquire("a", 0) == 2, "a process that starts fences the one of its name before it"
            assert await acquire("b", 60) == 3
            with pytest.raises(leaders.Deposed):
                async with leaders.fenced(engine, "placement", 2) as connection:
                    await connection.execute(sa.text("DELETE FROM settings"))
            async with leaders.fenced(engine, "placement", 3) as connection:
                await leaders.release(connection, "placement", 3)
            assert await acquire("a", 60) == 4

    run(scenario())


def test_an_election_waits_for_the_write_of_the_old_leader(migrated_postgres_url: str) -> None:
    """Without the row lock, the new leader could read before the old one's write and act on what is not so."""

    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:
            async with engine.begin() as connection:
                epoch = await leaders.acquire(connection, "placement", "old", 0)
            assert epoch == 1

            async def elect() -> int | None:
                async with engine.begin() as connection:
                    return await leaders.acquire(connection, "placement", "new", 60)

            async with leaders.fenced(engine, "placement", 1) as connection:
                await connection.execute(sa.text("INSERT INTO settings VALUES ('from', 'old')"))
                async with asyncio.TaskGroup() as group:
                    election = group.create_task(elect())
                    waiting = (
                        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ILIKE '%leaders%'"
                    )
                    await until(lambda: rows(engine, waiting))
                    assert not election.done()
                    await connection.commit()
            assert election.result() == 2
            assert await rows(engine, "SELECT 1 FROM settings WHERE value = 'old'")

    run(scenario())


def test_a_leader_that_was_replaced_changes_nothing_any_more(migrated_postgres_url: str) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:
            await add_node(engine, "edge-1", "gone")
            stale = LivenessController(engine, Leadership(engine, "liveness", "old", 60), FAST)
            async with engine.begin() as connection:
                old = await leaders.acquire(connection, "liveness", "old", 0)
                new = await leaders.acquire(connection, "liveness", "new", 60)
            assert (old, new) == (1, 2)
            with pytest.raises(leaders.Deposed):
                await stale.reconcile(1)
            assert (await rows(engine, "SELECT state FROM nodes"))[0].state == "disconnected"
            await LivenessController(engine, Leadership(engine, "liveness", "new", 60), FAST).reconcile(2)
            assert (await rows(engine, "SELECT state FROM nodes"))[0].state != "disconnected"

    run(scenario())


def test_a_clean_stop_hands_over_at_once(migrated_postgres_url: str, tmp_path: Path) -> None:
    """The lease is a minute here: only a release can make the second process lead in time."""

    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:
            leads = (
                "SELECT count(*) AS held FROM leaders WHERE holder = :id AND lease_until > now() HAVING count(*) = 4"
            )
            async with controlplane(engine, tmp_path, replica_id="cp-1"):
                await until(lambda: rows(engine, leads, id="cp-1"))
            async with controlplane(engine, tmp_path, replica_id="cp-2"):
                await until(lambda: rows(engine, leads, id="cp-2"), 10)
            assert len(await rows(engine, "SELECT value FROM settings WHERE key = 'timeline'")) == 1

    run(scenario())


def test_a_cancelled_query_stays_a_cancellation(migrated_postgres_url: str) -> None:
    """A loop that took it for a database that is away would never end."""

    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, asyncio.TaskGroup() as group:
            task = group.create_task(rows(engine, "SELECT pg_sleep(60)"))
            await until(lambda: rows(engine, "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(scenario())


# --- nodes ---------------------------------------------------------------------------------------------------------


def test_a_closed_stream_makes_a_node_suspect_at_once(migrated_postgres_url: str, tmp_path: Path) -> None:
    """No timer is near (one TTL is a minute): the hint alone must bring the verdict."""

    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, controlplane(engine, tmp_path):
            await add_node(engine, "edge-1")
            generation = "SELECT 1 FROM desired_states WHERE generation = 1"
            await until(lambda: rows(engine, generation))
            state = "SELECT state, state_reason FROM nodes WHERE state = :state"
            assert await until(lambda: rows(engine, state, state="reconciling"))
            await execute(engine, "UPDATE desired_states SET applied_generation = 1", topic="spec")
            assert await until(lambda: rows(engine, state, state="online"))
            await execute(
                engine,
                "UPDATE node_sessions SET disconnected_at = clock_timestamp(), disconnect_reason = 'reset by peer'",
                topic="node:edge-1",
            )
            [row] = await until(lambda: rows(engine, state, state="suspect"), 5)
            assert "reset by peer" in row.state_reason
            events = await rows(engine, "SELECT reason, severity FROM events WHERE object = 'node/edge-1' ORDER BY id")
            assert [(row.reason, row.severity) for row in events][-2:] == [
                ("NodeOnline", "info"),
                ("NodeSuspect", "warning"),
            ]

    run(scenario())


def test_a_restart_of_the_control_plane_loses_nobody(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine:
            await add_node(engine, "edge-1", "cp-0")
            await execute(
                engine,
                "UPDATE node_sessions SET last_seen_at = now() - interval '1 day'",
                "UPDATE nodes SET state = 'online'",
                "INSERT INTO replicas VALUES ('cp-0', now() - interval '2 days', now() - interval '1 day')",
            )
            async with controlplane(engine, tmp_path, FAST) as made:
                await until(lambda: _passes(made, "liveness"))
                states = await rows(engine, "SELECT state FROM nodes")
                assert states[0].state in ("online", "suspect")
                # It is still lost in the end: five TTLs after the start.
                await until(lambda: rows(engine, "SELECT 1 FROM nodes WHERE state = 'lost'"))
                started, lost = (
                    await rows(
                        engine,
                        "SELECT r.started_at, n.state_since FROM nodes AS n, replicas AS r WHERE r.replica_id = 'cp-1'",
                    )
                )[0]
                assert (lost - started).total_seconds() >= 5 * FAST.ttl_s

    run(scenario())


async def _passes(made: Controllers, name: str) -> bool:
    return name in made.counters and made.counters[name].passes > 0


# --- place and replace ---------------------------------------------------------------------------------------------


def test_replicas_are_placed_told_and_replaced(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, controlplane(engine, tmp_path, FAST) as made:
            await until(lambda: rows(engine, "SELECT 1 FROM replicas"))
            for name in ("edge-1", "edge-2", "edge-3"):
                await add_node(engine, name)
            await add_deployment(engine, replicas=2)
            beating = {"edge-1", "edge-2", "edge-3"}
            async with asyncio.TaskGroup() as group:
                nodes = group.create_task(apply_all(engine, beating))
                ready = "SELECT status FROM deployments WHERE status ->> 'ready' = '2' AND status ->> 'placed' = '2'"
                [row] = await until(lambda: rows(engine, ready))
                assert row.status == {
                    "revision": 1, "desired": 2, "placed": 2, "ready": 2, "warm": 2, "unplaced": [], "message": "",
                }  # fmt: skip
                held = {row.node_id for row in await rows(engine, "SELECT node_id FROM assignments")}
                assert held == {"edge-1", "edge-2"}
                await check_document(engine, "edge-1", 1)
                await check_document(engine, "edge-3", 0)

                # Silence: suspect, then lost, then a replacement, then the original goes.
                beating.discard("edge-1")
                moved = "SELECT 1 FROM assignments HAVING array_agg(node_id ORDER BY node_id) = '{edge-2,edge-3}'"
                await until(lambda: rows(engine, moved))
                assert await rows(engine, "SELECT 1 FROM nodes WHERE name = 'edge-1' AND state = 'lost'")
                await until(lambda: rows(engine, ready))
                replaced = "SELECT message FROM events WHERE reason = 'ReplicaPlaced' AND object = 'node/edge-3'"
                assert "edge-1 is lost" in (await rows(engine, replaced))[0].message

                # It comes back: it is told that it has nothing to do, and nothing moves again.
                beating.add("edge-1")
                await until(lambda: rows(engine, "SELECT 1 FROM nodes WHERE name = 'edge-1' AND state = 'online'"))
                await check_document(engine, "edge-1", 0)
                assert await rows(engine, moved)
                nodes.cancel()
            assert all(counters.failures == 0 for counters in made.counters.values())

    run(scenario())


async def check_document(engine: AsyncEngine, node: str, assignments: int) -> None:
    async def compiled() -> state_pb2.NodeDocument | None:
        [row] = await rows(engine, "SELECT document FROM desired_states WHERE node_id = :node", node=node)
        document = state_pb2.NodeDocument.FromString(row.document)
        return document if len(document.assignments) == assignments else None

    document = await until(compiled)
    assert list(document.trusted_ca_pem) == ["CA"]
    for assignment in document.assignments:
        assert assignment.model.variants[0].files[0].sha256 == DIGEST
        assert assignment.variant == "q4"
        assert assignment.warm


def test_what_cannot_be_placed_says_why_and_a_deleted_deployment_goes(
    migrated_postgres_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, controlplane(engine, tmp_path, FAST):
            await add_node(engine, "edge-1")
            await add_deployment(engine, replicas=3)
            async with asyncio.TaskGroup() as group:
                nodes = group.create_task(apply_all(engine, {"edge-1"}))
                partly = "SELECT status FROM deployments WHERE status ->> 'ready' = '1'"
                [row] = await until(lambda: rows(engine, partly))
                [unplaced] = row.status["unplaced"]
                assert unplaced["count"] == 2
                assert unplaced["reason"] == "1 of 1 node can't take another replica: 1 running it already"
                assert row.status["message"] == unplaced["reason"]
                assert await rows(engine, "SELECT 1 FROM events WHERE reason = 'Unplaced'")
                await execute(engine, "DELETE FROM deployments", topic="spec")
                await until(lambda: rows(engine, "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM assignments)"))
                nodes.cancel()

    run(scenario())


def test_a_storm_freezes_replacement_and_says_so(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, controlplane(engine, tmp_path, FAST):
            names = [f"edge-{number}" for number in range(1, 6)]
            for name in names:
                await add_node(engine, name)
            await add_deployment(engine, replicas=2)
            beating = set(names)
            async with asyncio.TaskGroup() as group:
                nodes = group.create_task(apply_all(engine, beating))
                await until(lambda: rows(engine, "SELECT 1 FROM deployments WHERE status ->> 'ready' = '2'"))
                before = {row.node_id for row in await rows(engine, "SELECT node_id FROM assignments")}
                beating.clear()
                beating.update({"edge-4", "edge-5"})
                lost = "SELECT 1 FROM nodes WHERE state = 'lost' HAVING count(*) = 3"
                await until(lambda: rows(engine, lost))
                await until(lambda: rows(engine, "SELECT 1 FROM events WHERE reason = 'ReplacementFrozen'"))
                frozen = (
                    "SELECT 1 FROM deployments WHERE status ->> 'message' LIKE '%fell silent at about the same time%'"
                )
                await until(lambda: rows(engine, frozen))
                assert {row.node_id for row in await rows(engine, "SELECT node_id FROM assignments")} == before
                # Enough of them are back: the rest is replaced.
                beating.update({"edge-2", "edge-3"})
                await until(
                    lambda: rows(
                        engine,
                        "SELECT 1 FROM deployments WHERE status ->> 'ready' = '2' AND status ->> 'message' = ''",
                    )
                )
                nodes.cancel()

    run(scenario())


def test_a_drained_node_is_told_and_then_drained(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_for(migrated_postgres_url) as engine, controlplane(engine, tmp_path, FAST):
            for name in ("edge-1", "edge-2"):
                await add_node(engine, name)
            await add_deployment(engine, replicas=1)
            async with asyncio.TaskGroup() as group:
                nodes = group.create_task(apply_all(engine, {"edge-1", "edge-2"}))
                await until(lambda: rows(engine, "SELECT 1 FROM assignments WHERE node_id = 'edge-1'"))
                await execute(engine, "UPDATE nodes SET drained = true WHERE id = 'edge-1'", topic="spec")
                await until(lambda: rows(engine, "SELECT 1 FROM nodes WHERE id = 'edge-1' AND state = 'drained'"))
                [row] = await rows(engine, "SELECT document FROM desired_states WHERE node_id = 'edge-1'")
                assert state_pb2.NodeDocument.FromString(row.document).settings.drained
                moved = "SELECT 1 FROM assignments HAVING array_agg(node_id) = '{edge-2}'"
                await until(lambda: rows(engine, moved))
                nodes.cancel()

    run(scenario())
