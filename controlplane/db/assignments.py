"""What the placement and desired-state controllers write: replicas, statuses of deployments, desired states."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db.engine import CHANNEL
from controlplane.domain.desired import Agent, Model
from controlplane.domain.placement import Place, Remove, Revise


async def place(connection: AsyncConnection, placements: Sequence[tuple[str, Place]]) -> None:
    """Make replicas, each with its new id. One whose node or deployment has gone meanwhile is passed over."""
    await connection.execute(
        sa.text("""
            INSERT INTO assignments (id, deployment, revision, node_id, reason)
            SELECT p.id, p.deployment, p.revision, p.node_id, p.reason
            FROM unnest(CAST(:ids AS text[]), CAST(:deployments AS text[]), CAST(:revisions AS bigint[]),
                CAST(:nodes AS text[]), CAST(:reasons AS text[])) AS p (id, deployment, revision, node_id, reason)
            JOIN nodes AS n ON n.id = p.node_id AND n.revoked_at IS NULL
            JOIN deployments AS d ON d.name = p.deployment
            ON CONFLICT (deployment, node_id) DO NOTHING"""),
        {
            "ids": [id_ for id_, _ in placements],
            "deployments": [action.deployment for _, action in placements],
            "revisions": [action.revision for _, action in placements],
            "nodes": [action.node_id for _, action in placements],
            "reasons": [action.reason for _, action in placements],
        },
    )


async def revise(connection: AsyncConnection, actions: Sequence[Revise]) -> None:
    """Move replicas to other revisions."""
    await connection.execute(
        sa.text("""
            UPDATE assignments AS a SET revision = r.revision
            FROM unnest(CAST(:ids AS text[]), CAST(:revisions AS bigint[])) AS r (id, revision) WHERE a.id = r.id"""),
        {
            "ids": [action.replica_id for action in actions],
            "revisions": [action.revision for action in actions],
        },
    )


async def remove(connection: AsyncConnection, actions: Sequence[Remove]) -> None:
    """Take replicas off, with their statuses."""
    await connection.execute(
        sa.text("DELETE FROM assignments WHERE id = ANY (CAST(:ids AS text[]))"),
        {"ids": [action.replica_id for action in actions]},
    )


async def statuses_of_deployments(connection: AsyncConnection) -> dict[str, dict[str, Any]]:
    """What ``deployments.status`` holds now, by name."""
    rows = await connection.execute(sa.text("SELECT name, status FROM deployments"))
    return {row.name: row.status for row in rows}


async def write_statuses_of_deployments(connection: AsyncConnection, statuses: Mapping[str, Mapping[str, Any]]) -> None:
    """Store statuses; they do not count as writes of the object (its ETag stays)."""
    await connection.execute(
        sa.text("""
            UPDATE deployments AS d SET status = s.status
            FROM unnest(CAST(:names AS text[]), CAST(CAST(:statuses AS text[]) AS jsonb[])) AS s (name, status)
            WHERE d.name = s.name"""),
        {"names": list(statuses), "statuses": [json.dumps(status) for status in statuses.values()]},
    )


async def record_events(connection: AsyncConnection, events: Iterable[tuple[str, str, str, str]]) -> None:
    """Events as (severity, object, reason, message)."""
    rows = list(events)
    if rows:
        await connection.execute(
            sa.text("""
                INSERT INTO events (severity, object, reason, message)
                SELECT * FROM unnest(CAST(:severities AS text[]), CAST(:objects AS text[]), CAST(:reasons AS text[]),
                    CAST(:messages AS text[]))"""),
            dict(
                zip(("severities", "objects", "reasons", "messages"), map(list, zip(*rows, strict=True)), strict=True)
            ),
        )


@dataclass(frozen=True, slots=True)
class Held:
    """The newest desired state of a node, without its document."""

    timeline: str
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Compiled:
    """A desired state to be stored."""

    node_id: str
    document: bytes
    sha256: bytes


async def held_states(connection: AsyncConnection) -> dict[str, Held]:
    """What each node's desired state is now, by node id."""
    rows = await connection.execute(sa.text("SELECT node_id, timeline, sha256 FROM desired_states"))
    return {row.node_id: Held(row.timeline, bytes(row.sha256)) for row in rows}


async def write_states(connection: AsyncConnection, timeline: str, states: Sequence[Compiled]) -> None:
    """Store desired states under the next generation and wake the sessions of their nodes. Equal ones stay."""
    await connection.execute(
        sa.text("""
            WITH told AS (
                INSERT INTO desired_states AS d (node_id, timeline, generation, sha256, document)
                SELECT c.node_id, CAST(:timeline AS text), 1, c.sha256, c.document
                FROM unnest(CAST(:nodes AS text[]), CAST(:digests AS bytea[]), CAST(:documents AS bytea[]))
                    AS c (node_id, sha256, document)
                JOIN nodes AS n ON n.id = c.node_id
                ON CONFLICT (node_id) DO UPDATE SET
                    timeline = excluded.timeline, generation = d.generation + 1, sha256 = excluded.sha256,
                    document = excluded.document, updated_at = clock_timestamp(), refused = ''
                WHERE (d.timeline, d.sha256) IS DISTINCT FROM (excluded.timeline, excluded.sha256)
                RETURNING node_id)
            SELECT pg_notify(:channel, 'node:' || node_id) FROM told"""),
        {
            "timeline": timeline,
            "nodes": [state.node_id for state in states],
            "digests": [state.sha256 for state in states],
            "documents": [state.document for state in states],
            "channel": CHANNEL,
        },
    )


async def load_models(connection: AsyncConnection) -> dict[tuple[str, str], Model]:
    """Every model version that can be handed out, by name and version."""
    rows = await connection.execute(
        sa.text("SELECT model, version, digest, spec, variants FROM model_versions WHERE phase = 'ready'")
    )
    return {
        (row.model, row.version): Model(
            name=row.model,
            version=row.version,
            digest=row.digest,
            variants=row.variants,
            context_tokens=int(row.spec.get("contextTokens") or 0),
            runtime=row.spec.get("runtime"),
            description=row.spec.get("description") or "",
        )
        for row in rows
    }


async def load_agents(connection: AsyncConnection) -> dict[tuple[str, str], Agent]:
    """Every agent version that a revision in use pins, by name and digest."""
    rows = await connection.execute(
        sa.text("""
            SELECT DISTINCT ON (g.agent, g.digest) g.agent, g.digest, g.spec
            FROM agent_versions AS g
            JOIN revisions AS v ON v.pinned #>> '{agent,name}' = g.agent AND v.pinned #>> '{agent,digest}' = g.digest
            JOIN deployments AS d ON d.name = v.deployment
            WHERE v.number = d.current_revision
               OR EXISTS (
                   SELECT 1 FROM assignments AS a WHERE a.deployment = v.deployment AND a.revision = v.number)""")
    )
    return {(row.agent, row.digest): Agent(row.agent, row.digest, row.spec) for row in rows}
