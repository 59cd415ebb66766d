"""Snapshots of the fleet for those who decide, and the verdicts that they write back.

Times become seconds since 1970 by Postgres's clock. Run a snapshot in one transaction that does not move
(``engine.connect().execution_options(isolation_level="REPEATABLE READ")``), so that its parts fit each other.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db.engine import CHANNEL
from controlplane.domain.fleet import Deployment, Fleet, LabelMatcher, Node, Replica, Revision, Variant
from controlplane.domain.liveness import DOWN, Facts, NodeState, Session, Verdict
from controlplane.domain.selectors import SelectorError, parse_selector
from slmfleet.v1 import state_pb2


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What liveness knows of one node, and what it said last."""

    id: str
    name: str
    state: NodeState
    reason: str
    facts: Facts


async def load_liveness(connection: AsyncConnection) -> tuple[float, list[NodeFacts]]:
    """The database's time, and the facts about every node that is not revoked."""
    now, up_since = (
        await connection.execute(
            sa.text("""
                SELECT clock_timestamp(), coalesce(min(started_at), clock_timestamp()) FROM replicas
                WHERE lease_until > clock_timestamp()""")
        )
    ).one()
    rows = await connection.execute(
        sa.text("""
            SELECT n.id, n.name, n.state, n.state_reason, n.presence, n.telemetry_at, n.drained,
                s.node_id IS NOT NULL AS has_session, s.last_seen_at, s.disconnected_at, s.disconnect_reason,
                CASE WHEN r.lease_until > clock_timestamp() THEN NULL ELSE coalesce(r.lease_until, s.last_seen_at) END
                    AS owner_died_at,
                d.generation, d.applied_generation, d.refused,
                CASE WHEN n.drained THEN d.document END AS document
            FROM nodes AS n
            LEFT JOIN node_sessions AS s ON s.node_id = n.id
            LEFT JOIN replicas AS r ON r.replica_id = s.replica_id
            LEFT JOIN desired_states AS d ON d.node_id = n.id
            WHERE n.revoked_at IS NULL""")
    )
    return _seconds(now), [_node_facts(row, _seconds(up_since)) for row in rows]


def _node_facts(row: sa.Row[Any], up_since: float) -> NodeFacts:
    session = None
    if row.has_session:
        open_ = row.disconnected_at is None
        died = _seconds(row.owner_died_at) if open_ and row.owner_died_at is not None else None
        session = Session(open_, _seconds(row.last_seen_at), died, row.disconnect_reason)
    current = bool(row.generation) and row.applied_generation == row.generation and not row.refused
    facts = Facts(
        previous=_state(row.state),
        session=session,
        up_since=up_since,
        presence=row.presence,
        telemetry_at=None if row.telemetry_at is None else _seconds(row.telemetry_at),
        drain_wished=row.drained,
        drain_applied=current and bool(row.document) and _says_drained(row.document),
        current=current,
    )
    return NodeFacts(row.id, row.name, _state(row.state), row.state_reason, facts)


def _says_drained(document: bytes) -> bool:
    return state_pb2.NodeDocument.FromString(document).settings.drained


async def write_verdicts(connection: AsyncConnection, verdicts: Sequence[tuple[NodeFacts, Verdict]]) -> None:
    """Store new states and reasons, an event for each change of state, and wake whoever follows those nodes."""
    changed = [(node, verdict) for node, verdict in verdicts if node.state is not verdict.state]
    await connection.execute(
        sa.text("""
            UPDATE nodes AS n SET
                state_since = CASE WHEN n.state = v.state THEN n.state_since ELSE clock_timestamp() END,
                state = v.state, state_reason = v.reason
            FROM unnest(CAST(:ids AS text[]), CAST(:states AS text[]), CAST(:reasons AS text[]))
                AS v (id, state, reason)
            WHERE n.id = v.id"""),
        {
            "ids": [node.id for node, _ in verdicts],
            "states": [verdict.state.value for _, verdict in verdicts],
            "reasons": [verdict.reason for _, verdict in verdicts],
        },
    )
    if not changed:
        return
    await connection.execute(
        sa.text("""
            INSERT INTO events (severity, object, reason, message)
            SELECT * FROM unnest(CAST(:severities AS text[]), CAST(:objects AS text[]), CAST(:reasons AS text[]),
                CAST(:messages AS text[]))"""),
        {
            "severities": [_severity(verdict.state) for _, verdict in changed],
            "objects": [f"node/{node.name}" for node, _ in changed],
            "reasons": [f"Node{verdict.state.capitalize()}" for _, verdict in changed],
            "messages": [f"{node.state} became {verdict.state}: {verdict.reason}" for node, verdict in changed],
        },
    )
    await connection.execute(
        sa.text("SELECT pg_notify(:channel, 'node:' || id) FROM unnest(CAST(:ids AS text[])) AS changed (id)"),
        {"channel": CHANNEL, "ids": [node.id for node, _ in changed]},
    )


def _severity(state: NodeState) -> str:
    return "error" if state is NodeState.LOST else "warning" if state in DOWN else "info"


async def load_fleet(connection: AsyncConnection, max_replicas: int = 0) -> Fleet:
    """Everything that placement and desired state look at. ``max_replicas``: most deployments a node may hold."""
    now = await connection.scalar(sa.text("SELECT clock_timestamp()"))
    assert now is not None
    return Fleet(
        deployments=await _deployments(connection),
        nodes=await _nodes(connection, max_replicas),
        replicas=await _replicas(connection),
        now=_seconds(now),
    )


async def _nodes(connection: AsyncConnection, max_replicas: int) -> list[Node]:
    rows = await connection.execute(
        sa.text("""
            SELECT n.id, n.name, n.labels, n.inventory, n.artifacts, n.state, n.drained, s.last_seen_at
            FROM nodes AS n LEFT JOIN node_sessions AS s ON s.node_id = n.id WHERE n.revoked_at IS NULL""")
    )
    return [
        Node(
            id=row.id,
            name=row.name,
            labels=row.labels,
            state=_state(row.state),
            drained=row.drained,
            formats=frozenset(row.inventory.get("formats", ())),
            memory_bytes=int(row.inventory.get("memoryBytes", 0)),
            disk_free_bytes=int(row.inventory.get("diskFreeBytes", 0)) if row.inventory.get("diskBytes") else None,
            cores=int(row.inventory.get("cpuCount", 0)),
            accelerators=frozenset(row.inventory.get("accelerators", ())),
            on_disk=frozenset(row.artifacts),
            max_replicas=max_replicas,
            silent_since=_seconds(row.last_seen_at) if row.last_seen_at and _state(row.state) in DOWN else None,
            ever_connected=row.last_seen_at is not None,
        )
        for row in rows
    ]


async def _replicas(connection: AsyncConnection) -> list[Replica]:
    rows = await connection.execute(
        sa.text("""
            SELECT a.id, a.deployment, a.revision, a.node_id, a.reason, a.created_at,
                coalesce(t.variant, '') AS variant,
                coalesce((v.pinned #>> '{model,name}') || '@' || (v.pinned #>> '{model,version}'), '') AS variant_of,
                t.revision AS observed_revision,
                coalesce(t.staged, false) AS staged, coalesce(t.ready, false) AS ready, coalesce(t.warm, false) AS warm,
                coalesce(t.degraded, false) AS degraded, t.conditions
            FROM assignments AS a
            LEFT JOIN assignment_statuses AS t ON t.assignment_id = a.id
            LEFT JOIN revisions AS v ON v.deployment = a.deployment AND v.number = t.revision""")
    )
    return [
        Replica(
            id=row.id,
            deployment=row.deployment,
            revision=row.revision,
            node_id=row.node_id,
            created_at=_seconds(row.created_at),
            staged=row.staged,
            ready=row.ready,
            warm=row.warm,
            observed_revision=row.observed_revision or 0,
            reason=row.reason,
            variant=row.variant,
            variant_of=row.variant_of,
            trouble=_trouble(row.conditions or ()) if row.degraded else "",
        )
        for row in rows
    ]


def _trouble(conditions: Sequence[Mapping[str, Any]]) -> str:
    degraded = next((item for item in conditions if item.get("type") == "Degraded"), {})
    return str(degraded.get("message") or degraded.get("reason") or "its node says that it is degraded")


async def _deployments(connection: AsyncConnection) -> list[Deployment]:
    groups = {row.name: row.selector for row in await connection.execute(sa.text("SELECT name, selector FROM groups"))}
    revisions: dict[str, list[Revision]] = {}
    rows = await connection.execute(
        sa.text("""
            SELECT v.deployment, v.number, v.pinned, m.digest, m.phase, m.message, m.variants
            FROM revisions AS v
            JOIN deployments AS d ON d.name = v.deployment
            LEFT JOIN model_versions AS m
                ON m.model = v.pinned #>> '{model,name}' AND m.version = v.pinned #>> '{model,version}'
            WHERE v.number = d.current_revision
               OR EXISTS (SELECT 1 FROM assignments AS a WHERE a.deployment = v.deployment AND a.revision = v.number)
            ORDER BY v.deployment, v.number""")
    )
    for row in rows:
        revisions.setdefault(row.deployment, []).append(_revision(row))
    rows = await connection.execute(sa.text("SELECT name, spec, current_revision FROM deployments ORDER BY name"))
    return [
        _deployment(row.name, row.spec, row.current_revision, tuple(revisions.get(row.name, ())), groups)
        for row in rows
    ]


def _deployment(
    name: str, spec: Mapping[str, Any], current: int, revisions: tuple[Revision, ...], groups: Mapping[str, str]
) -> Deployment:
    blocked = ""
    selectors: list[LabelMatcher] = []
    try:
        selectors.append(parse_selector(spec.get("selector") or ""))
        if group := spec.get("group"):
            if group in groups:
                selectors.append(parse_selector(groups[group]))
            else:
                blocked = f"group {group} does not exist: apply it, or take it out of the deployment"
    except SelectorError as error:
        blocked = str(error)
    mode = spec.get("mode") or "replicas"
    warm, replicas = spec.get("warm"), spec.get("replicas")
    return Deployment(
        name=name,
        current_revision=current,
        revisions=revisions,
        selectors=tuple(selectors),
        mode=mode,
        replicas=1 if replicas is None else int(replicas),
        warm=None if warm is None else int(warm),
        on_disconnect=spec.get("onDisconnect") or ("keep" if mode == "every_node" else "replace"),
        blocked=blocked,
    )


def _revision(row: sa.Row[Any]) -> Revision:
    model, agent = row.pinned["model"], row.pinned.get("agent")
    title = f"model {model['name']}@{model['version']}"
    match row.phase:
        case "ready" if row.digest == model["digest"]:
            not_ready = ""
        case "ready":
            not_ready = f"{title} was replaced by other content: apply the deployment again"
        case None:
            not_ready = f"{title} does not exist: apply it again"
        case "failed":
            not_ready = f"{title} could not be had: {row.message}"
        case phase:
            waits = "is being fetched" if phase == "fetching" else "waits to be fetched"
            not_ready = f"{title} {waits}" + (f": {row.message}" if row.message else "")
    return Revision(
        number=row.number,
        model=model["name"],
        model_version=model["version"],
        variants=tuple(
            Variant(
                variant["name"],
                variant["format"],
                {file["sha256"]: int(file["sizeBytes"]) for file in variant["files"]},
                variant.get("quantization") or "",
            )
            for variant in row.variants or ()
        ),
        not_ready=not_ready,
        agent=agent["name"] if agent else None,
        agent_digest=agent["digest"] if agent else None,
    )


def _state(text: str) -> NodeState:
    return NodeState(text)


def _seconds(moment: datetime.datetime) -> float:
    return moment.timestamp()
