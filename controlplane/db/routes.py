"""What the gateway routes by: deployments with what they run, and their replicas with what their nodes last said."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """A deployment's current revision. ``agent`` None: the bare model."""

    name: str
    created_s: int
    agent: str | None
    model: str | None
    model_version: str | None
    exposed: bool


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """An assignment, its node, and the node's newest word on it (all false and 0 before the first)."""

    id: str
    deployment: str
    node_id: str
    node: str
    node_state: str
    ready: bool
    warm: bool
    degraded: bool
    bytes_done: int
    bytes_total: int


async def load(connection: AsyncConnection) -> tuple[list[DeploymentRow], list[ReplicaRow]]:
    """All of it, as of now.

    An agent is exposed as the version says that the deployment pins; one without the word is exposed (the default of a
    manifest), one whose version is missing is not.
    """
    deployments = await connection.execute(
        sa.text("""
            SELECT d.name, extract(epoch FROM d.created_at)::bigint AS created_s,
                r.pinned -> 'agent' ->> 'name' AS agent, r.pinned -> 'model' ->> 'name' AS model,
                r.pinned -> 'model' ->> 'version' AS model_version,
                CASE WHEN r.pinned -> 'agent' ->> 'name' IS NULL THEN true
                     WHEN v.agent IS NULL THEN false
                     ELSE coalesce(v.spec -> 'expose', '["gateway"]'::jsonb) @> '["gateway"]'::jsonb END AS exposed
            FROM deployments AS d
            JOIN revisions AS r ON r.deployment = d.name AND r.number = d.current_revision
            LEFT JOIN agent_versions AS v
                ON v.agent = r.pinned -> 'agent' ->> 'name' AND v.digest = r.pinned -> 'agent' ->> 'digest'
            ORDER BY d.name""")
    )
    replicas = await connection.execute(
        sa.text("""
            SELECT a.id, a.deployment, a.node_id, n.name AS node, n.state AS node_state,
                coalesce(t.ready, false) AS ready, coalesce(t.warm, false) AS warm,
                coalesce(t.degraded, false) AS degraded, coalesce(t.bytes_done, 0) AS bytes_done,
                coalesce(t.bytes_total, 0) AS bytes_total
            FROM assignments AS a
            JOIN nodes AS n ON n.id = a.node_id AND n.revoked_at IS NULL
            LEFT JOIN assignment_statuses AS t ON t.assignment_id = a.id
            ORDER BY a.id""")
    )
    return (
        [DeploymentRow(**row._mapping) for row in deployments],
        [ReplicaRow(**row._mapping) for row in replicas],
    )
