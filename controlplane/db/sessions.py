"""Sessions of nodes and what travels over them: beats, desired state, statuses, operations.

Writes that many sessions make at once come in batches: one statement for all, with arrays as arguments. A write that a
session makes is fenced by the session's epoch: once a newer session of the same node exists, nothing of the older one
reaches a table.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables
from controlplane.db.engine import CHANNEL, hint

desired = tables.desired_states
operations = tables.operations


@dataclass(frozen=True, slots=True)
class Beat:
    """The node was heard ``age_s`` seconds before now, in the session ``epoch``."""

    node_id: str
    epoch: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Closed:
    """The session ended."""

    node_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class AppliedRow:
    """The node stored (``refused`` = "") or refused this generation."""

    node_id: str
    epoch: int
    timeline: str
    generation: int
    refused: str


@dataclass(frozen=True, slots=True)
class StatusRow:
    """The newest status of one assignment, as its node tells it."""

    node_id: str
    epoch: int
    assignment_id: str
    revision: int
    observed_generation: int
    staged: bool
    ready: bool
    warm: bool
    degraded: bool
    variant: str
    bytes_done: int
    bytes_total: int
    conditions: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Inventoried:
    """All assignments that the node still has; statuses of others are out of date."""

    node_id: str
    epoch: int
    assignment_ids: Collection[str]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """How an operation went on the node."""

    node_id: str
    operation_id: str
    succeeded: bool
    message: str
    result: Any


@dataclass(frozen=True, slots=True)
class NodeHead:
    """Where the database stands with one node: what its session has to know."""

    node_id: str
    revoked: bool
    # None: no session was ever opened.
    epoch: int | None
    # None: no desired state was compiled yet.
    timeline: str | None
    generation: int | None
    sha256: bytes | None


@dataclass(frozen=True, slots=True)
class OperationRow:
    """An operation that waits for its node."""

    id: str
    node_id: str
    kind: str
    arguments: Mapping[str, Any]
    expires_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class DesiredRow:
    """A whole desired state; ``document`` is a serialized NodeDocument."""

    node_id: str
    timeline: str
    generation: int
    sha256: bytes
    document: bytes
    required_features: Sequence[str]


async def open_session(connection: AsyncConnection, node_id: str, replica_id: str) -> int:
    """Begin a session at this replica and fence all older ones; the new epoch."""
    epoch = await connection.scalar(
        sa.text("""
            INSERT INTO node_sessions AS s (node_id, replica_id, epoch)
            VALUES (:node_id, :replica_id, 1)
            ON CONFLICT (node_id) DO UPDATE SET
                replica_id = excluded.replica_id, epoch = s.epoch + 1, connected_at = clock_timestamp(),
                last_seen_at = clock_timestamp(), disconnected_at = NULL, disconnect_reason = ''
            RETURNING epoch"""),
        {"node_id": node_id, "replica_id": replica_id},
    )
    assert epoch is not None
    await hint(connection, f"node:{node_id}")
    return int(epoch)


async def record_beats(connection: AsyncConnection, beats: Sequence[Beat]) -> set[str]:
    """Move ``last_seen_at`` forward; the ids of nodes whose session is still that one."""
    rows = await connection.execute(
        sa.text("""
            UPDATE node_sessions AS s
            SET last_seen_at = greatest(s.last_seen_at, clock_timestamp() - make_interval(secs => b.age_s))
            FROM unnest(CAST(:nodes AS text[]), CAST(:epochs AS bigint[]), CAST(:ages AS float8[]))
                AS b (node_id, epoch, age_s)
            WHERE s.node_id = b.node_id AND s.epoch = b.epoch
            RETURNING s.node_id"""),
        {
            "nodes": [beat.node_id for beat in beats],
            "epochs": [beat.epoch for beat in beats],
            "ages": [beat.age_s for beat in beats],
        },
    )
    return {row.node_id for row in rows}


async def close_sessions(connection: AsyncConnection, closed: Sequence[Closed]) -> None:
    """Mark streams as gone and tell everybody who listens."""
    await connection.execute(
        sa.text("""
            WITH gone AS (
                UPDATE node_sessions AS s
                SET disconnected_at = clock_timestamp(), disconnect_reason = c.reason
                FROM unnest(CAST(:nodes AS text[]), CAST(:epochs AS bigint[]), CAST(:reasons AS text[]))
                    AS c (node_id, epoch, reason)
                WHERE s.node_id = c.node_id AND s.epoch = c.epoch AND s.disconnected_at IS NULL
                RETURNING s.node_id)
            SELECT pg_notify(:channel, 'node:' || node_id) FROM gone"""),
        {
            "nodes": [row.node_id for row in closed],
            "epochs": [row.epoch for row in closed],
            "reasons": [row.reason for row in closed],
            "channel": CHANNEL,
        },
    )


async def record_applied(connection: AsyncConnection, rows: Sequence[AppliedRow]) -> None:
    """Store what nodes said of their desired states; a refusal never moves ``applied_generation``."""
    await connection.execute(
        sa.text("""
            UPDATE desired_states AS d SET
                applied_generation = CASE WHEN a.refused = '' THEN a.generation ELSE d.applied_generation END,
                applied_at = CASE WHEN a.refused = '' THEN clock_timestamp() ELSE d.applied_at END,
                refused = a.refused
            FROM unnest(CAST(:nodes AS text[]), CAST(:epochs AS bigint[]), CAST(:timelines AS text[]),
                        CAST(:generations AS bigint[]), CAST(:refused AS text[]))
                AS a (node_id, epoch, timeline, generation, refused), node_sessions AS s
            WHERE d.node_id = a.node_id AND d.timeline = a.timeline AND d.generation >= a.generation
              AND s.node_id = a.node_id AND s.epoch = a.epoch
              AND (d.applied_generation, d.refused) IS DISTINCT FROM (a.generation, a.refused)"""),
        {
            "nodes": [row.node_id for row in rows],
            "epochs": [row.epoch for row in rows],
            "timelines": [row.timeline for row in rows],
            "generations": [row.generation for row in rows],
            "refused": [row.refused for row in rows],
        },
    )


async def record_statuses(connection: AsyncConnection, rows: Sequence[StatusRow]) -> None:
    """Store the newest statuses; one of an assignment that is not that node's (any more) is passed over.

    The assignments are locked against deletion: of one that goes in the same moment the foreign key would refuse the
    status, and with it all that was said in the same transaction.
    """
    await connection.execute(
        sa.text("""
            INSERT INTO assignment_statuses AS t (assignment_id, revision, observed_generation, staged, ready, warm,
                degraded, variant, bytes_done, bytes_total, conditions)
            SELECT n.id, n.revision, n.generation, n.staged, n.ready, n.warm, n.degraded, n.variant, n.done, n.total,
                n.conditions
            FROM unnest(CAST(:nodes AS text[]), CAST(:epochs AS bigint[]), CAST(:ids AS text[]),
                CAST(:revisions AS bigint[]), CAST(:generations AS bigint[]), CAST(:staged AS bool[]),
                CAST(:ready AS bool[]), CAST(:warm AS bool[]), CAST(:degraded AS bool[]), CAST(:variants AS text[]),
                CAST(:done AS bigint[]), CAST(:total AS bigint[]), CAST(CAST(:conditions AS text[]) AS jsonb[]))
                AS n (node_id, epoch, id, revision, generation, staged, ready, warm, degraded, variant, done, total,
                      conditions)
            JOIN assignments AS a ON a.id = n.id AND a.node_id = n.node_id
            JOIN node_sessions AS s ON s.node_id = n.node_id AND s.epoch = n.epoch
            FOR KEY SHARE OF a
            ON CONFLICT (assignment_id) DO UPDATE SET
                revision = excluded.revision, observed_generation = excluded.observed_generation,
                staged = excluded.staged, ready = excluded.ready, warm = excluded.warm, degraded = excluded.degraded,
                variant = excluded.variant, bytes_done = excluded.bytes_done, bytes_total = excluded.bytes_total,
                conditions = excluded.conditions, updated_at = clock_timestamp()"""),
        {
            "nodes": [row.node_id for row in rows],
            "epochs": [row.epoch for row in rows],
            "ids": [row.assignment_id for row in rows],
            "revisions": [row.revision for row in rows],
            "generations": [row.observed_generation for row in rows],
            "staged": [row.staged for row in rows],
            "ready": [row.ready for row in rows],
            "warm": [row.warm for row in rows],
            "degraded": [row.degraded for row in rows],
            "variants": [row.variant for row in rows],
            "done": [row.bytes_done for row in rows],
            "total": [row.bytes_total for row in rows],
            "conditions": [json.dumps(list(row.conditions)) for row in rows],
        },
    )


async def forget_other_statuses(connection: AsyncConnection, row: Inventoried) -> None:
    """Drop statuses of assignments that the node says it does not have."""
    await connection.execute(
        sa.text("""
            DELETE FROM assignment_statuses AS t USING assignments AS a, node_sessions AS s
            WHERE a.id = t.assignment_id AND a.node_id = :node_id AND s.node_id = a.node_id AND s.epoch = :epoch
              AND t.assignment_id <> ALL (CAST(:ids AS text[]))"""),
        {"node_id": row.node_id, "epoch": row.epoch, "ids": list(row.assignment_ids)},
    )


async def record_results(connection: AsyncConnection, rows: Sequence[ResultRow]) -> None:
    """Store results of operations; the first one counts, and only from the node that the operation was for."""
    await connection.execute(
        sa.text("""
            UPDATE operations AS o SET
                state = CASE WHEN r.succeeded THEN 'succeeded' ELSE 'failed' END,
                message = r.message, result = r.result, updated_at = clock_timestamp()
            FROM unnest(CAST(:nodes AS text[]), CAST(:ids AS text[]), CAST(:succeeded AS bool[]),
                        CAST(:messages AS text[]), CAST(CAST(:results AS text[]) AS jsonb[]))
                AS r (node_id, id, succeeded, message, result)
            WHERE o.id = r.id AND o.node_id = r.node_id AND o.state IN ('pending', 'expired')"""),
        {
            "nodes": [row.node_id for row in rows],
            "ids": [row.operation_id for row in rows],
            "succeeded": [row.succeeded for row in rows],
            "messages": [row.message for row in rows],
            "results": [None if row.result is None else json.dumps(row.result) for row in rows],
        },
    )


async def heads(connection: AsyncConnection, node_ids: Sequence[str]) -> dict[str, NodeHead]:
    """Where the database stands with these nodes, by id; a node that is missing was deleted."""
    rows = await connection.execute(
        sa.text("""
            SELECT n.id AS node_id, n.revoked_at IS NOT NULL AS revoked, s.epoch, d.timeline, d.generation, d.sha256
            FROM nodes AS n
            LEFT JOIN node_sessions AS s ON s.node_id = n.id
            LEFT JOIN desired_states AS d ON d.node_id = n.id
            WHERE n.id = ANY (CAST(:ids AS text[]))"""),
        {"ids": list(node_ids)},
    )
    return {row.node_id: NodeHead(**row._mapping) for row in rows}


async def pending_operations(connection: AsyncConnection, node_ids: Sequence[str]) -> list[OperationRow]:
    """Operations that wait for these nodes, oldest first."""
    query = (
        sa.select(
            operations.c.id, operations.c.node_id, operations.c.kind, operations.c.arguments, operations.c.expires_at
        )
        .where(
            operations.c.node_id == sa.any_(sa.bindparam("ids", list(node_ids), type_=sa.ARRAY(sa.Text))),
            operations.c.state == "pending",
            operations.c.expires_at > sa.func.clock_timestamp(),
        )
        .order_by(operations.c.created_at)
        .limit(1000)
    )
    return [OperationRow(**row._mapping) for row in await connection.execute(query)]


async def expire_operations(connection: AsyncConnection) -> None:
    """Mark operations whose time is over."""
    await connection.execute(
        sa.update(operations)
        .where(operations.c.state == "pending", operations.c.expires_at <= sa.func.clock_timestamp())
        .values(state="expired", updated_at=sa.func.clock_timestamp(), message="the node did not answer in time")
    )


async def documents(connection: AsyncConnection, node_ids: Sequence[str]) -> list[DesiredRow]:
    """The newest desired states of these nodes."""
    query = sa.select(
        desired.c.node_id,
        desired.c.timeline,
        desired.c.generation,
        desired.c.sha256,
        desired.c.document,
        desired.c.required_features,
    ).where(desired.c.node_id == sa.any_(sa.bindparam("ids", list(node_ids), type_=sa.ARRAY(sa.Text))))
    return [DesiredRow(**row._mapping) for row in await connection.execute(query)]
