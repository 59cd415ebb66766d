"""Reads for people and programs: pages of rows in a stable order, filtered by label selector in the database."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables
from controlplane.domain.selectors import Operator, Requirement, Selector

Key = tuple[str | int | datetime.datetime, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """By which columns a list is ordered; together they name one row. Either all ascend or all descend."""

    columns: tuple[sa.ColumnElement, ...]
    descending: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Rows, and the key after which the next page begins (None: this is the last one)."""

    rows: Sequence[sa.Row[Any]]
    next_key: Key | None


async def page(connection: AsyncConnection, query: sa.Select[Any], order: Order, after: Key | None, limit: int) -> Page:
    """Up to ``limit`` rows after the key ``after``. Each page costs the same, however far in the list it is (keyset,
    no OFFSET), and rows that are made or removed meanwhile shift nothing."""
    named = [column.label(f"page_key_{index}") for index, column in enumerate(order.columns)]
    if after is not None:
        row, key = sa.tuple_(*order.columns), sa.tuple_(*map(sa.literal, after))
        query = query.where(row < key if order.descending else row > key)
    ordered = [column.desc() if order.descending else column.asc() for column in order.columns]
    found = (await connection.execute(query.add_columns(*named).order_by(*ordered).limit(limit + 1))).all()
    rows = found[:limit]
    if len(found) <= limit:
        return Page(rows, None)
    return Page(rows, tuple(rows[-1]._mapping[column.name] for column in named))


def selected(labels: sa.ColumnElement, selector: Selector) -> sa.ColumnElement[bool]:
    """The condition that a JSONB column of labels matches; the same as ``selector.matches`` in Python."""
    return sa.and_(sa.true(), *(_required(labels, requirement) for requirement in selector.requirements))


def _required(labels: sa.ColumnElement, requirement: Requirement) -> sa.ColumnElement[bool]:
    value = labels[requirement.key].astext  # NULL where the label is missing
    match requirement.operator:
        case Operator.IN:
            return sa.func.coalesce(value.in_(requirement.values), sa.false())
        case Operator.NOT_IN:
            return sa.func.coalesce(value.not_in(requirement.values), sa.true())
        case Operator.EXISTS:
            return value.is_not(None)
        case Operator.MISSING:
            return value.is_(None)


def models() -> sa.Select[Any]:
    """Models with their current version as ``version_*`` columns."""
    models, versions = tables.models, tables.model_versions
    same = sa.and_(versions.c.model == models.c.name, versions.c.version == models.c.current_version)
    columns = ("digest", "spec", "variants", "phase", "message", "bytes_done", "bytes_total")
    return sa.select(models, *(versions.c[name].label(f"version_{name}") for name in columns)).join(versions, same)


def agents() -> sa.Select[Any]:
    """Agents with ``spec`` and ``number`` of their current version."""
    agents, versions = tables.agents, tables.agent_versions
    same = sa.and_(versions.c.agent == agents.c.name, versions.c.digest == agents.c.current_digest)
    return sa.select(agents, versions.c.spec, versions.c.number).join(versions, same)


def nodes() -> sa.Select[Any]:
    """Nodes that are not revoked, with ``connected``, ``last_seen_at``, ``desired_generation``,
    ``applied_generation`` and ``refused``."""
    nodes, sessions, desired = tables.nodes, tables.node_sessions, tables.desired_states
    connected = sa.and_(sessions.c.node_id.is_not(None), sessions.c.disconnected_at.is_(None))
    return (
        sa.select(
            nodes,
            connected.label("connected"),
            sessions.c.last_seen_at,
            sa.func.coalesce(desired.c.generation, 0).label("desired_generation"),
            sa.func.coalesce(desired.c.applied_generation, 0).label("applied_generation"),
            sa.func.coalesce(desired.c.refused, "").label("refused"),
        )
        .join(sessions, sessions.c.node_id == nodes.c.id, isouter=True)
        .join(desired, desired.c.node_id == nodes.c.id, isouter=True)
        .where(nodes.c.revoked_at.is_(None))
    )


def replicas() -> sa.Select[Any]:
    """Assignments with the node's name and what it last said of them (columns are NULL where it said nothing)."""
    assignments, statuses, nodes = tables.assignments, tables.assignment_statuses, tables.nodes
    said = ("staged", "ready", "warm", "degraded", "conditions", "variant", "bytes_done", "bytes_total")
    return (
        sa.select(
            assignments,
            nodes.c.name.label("node"),
            statuses.c.revision.label("observed_revision"),
            *(statuses.c[name] for name in said),
        )
        .join(nodes, nodes.c.id == assignments.c.node_id)
        .join(statuses, statuses.c.assignment_id == assignments.c.id, isouter=True)
    )


async def replicas_of_nodes(connection: AsyncConnection, node_ids: Iterable[str]) -> dict[str, list[sa.Row[Any]]]:
    """The replicas of each of some nodes, by node id."""
    ids = list(node_ids)
    found: dict[str, list[sa.Row[Any]]] = {node_id: [] for node_id in ids}
    query = replicas().where(tables.assignments.c.node_id.in_(ids)).order_by(tables.assignments.c.deployment)
    for row in await connection.execute(query):
        found[row.node_id].append(row)
    return found


async def timeline(connection: AsyncConnection) -> str:
    """The history that generations count in; "" before it was named."""
    query = sa.select(tables.settings.c.value).where(tables.settings.c.key == "timeline")
    return (await connection.execute(query)).scalar() or ""
