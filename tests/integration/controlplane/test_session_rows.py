"""What nodes say, written to a real Postgres while others write there."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from controlplane.db import sessions
from controlplane.db.engine import make_engine

pytestmark = pytest.mark.postgres


def status(assignment: str) -> sessions.StatusRow:
    return sessions.StatusRow(
        node_id="n1", epoch=1, assignment_id=assignment, revision=1, observed_generation=1, staged=True, ready=True,
        warm=False, degraded=False, variant="", bytes_done=0, bytes_total=0, conditions=(),
    )  # fmt: skip


def test_a_status_of_a_replica_that_is_deleted_in_the_same_moment_takes_no_other_down(
    migrated_postgres_url: str,
) -> None:
    async def scenario() -> None:
        engine = make_engine(migrated_postgres_url)
        async with engine.begin() as connection:
            for statement in (
                "INSERT INTO nodes (id, name) VALUES ('n1', 'edge-1')",
                "INSERT INTO node_sessions (node_id, replica_id, epoch) VALUES ('n1', 'r', 1)",
                "INSERT INTO deployments (name, current_revision) VALUES ('one', 1), ('two', 1)",
                "INSERT INTO assignments (id, deployment, revision, node_id) VALUES ('a1', 'one', 1, 'n1'),"
                " ('a2', 'two', 1, 'n1')",
            ):
                await connection.execute(sa.text(statement))
        async with engine.connect() as deleting, engine.connect() as looking:
            await deleting.execute(sa.text("DELETE FROM assignments WHERE id = 'a1'"))

            async def write() -> None:
                async with engine.begin() as connection:
                    await sessions.record_statuses(connection, [status("a1"), status("a2")])

            writing = asyncio.create_task(write(), name="write")
            waits = sa.text(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            async with asyncio.timeout(20):
                while not (await looking.execute(waits)).first():
                    await looking.rollback()
            await deleting.commit()
            await asyncio.wait_for(writing, 20)
            stored = await looking.execute(sa.text("SELECT assignment_id FROM assignment_statuses"))
            assert stored.scalars().all() == ["a2"]
        await engine.dispose()

    asyncio.run(scenario())
