"""Nodes, their enrolment tokens and their certificates.

Every function takes an open connection: the caller decides what one transaction is.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables
from controlplane.db.engine import hint

nodes = tables.nodes
tokens = tables.enrollment_tokens
certificates = tables.node_certificates


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token as stored, and the database's time at which it was read."""

    secret_sha256: str
    labels: Mapping[str, str]
    uses_left: int
    expires_at: datetime.datetime
    revoked: bool
    now: datetime.datetime


@dataclass(frozen=True, slots=True)
class NewNode:
    """A row of ``nodes`` to be made."""

    id: str
    name: str
    labels: Mapping[str, str]
    inventory: Mapping[str, Any]
    agentd_version: str
    mqtt_password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What the node services need of a node."""

    id: str
    name: str
    revoked: bool
    mqtt_password: str | None = field(repr=False)


async def lock_token(connection: AsyncConnection, token_id: str) -> TokenRow | None:
    """The token, locked until the transaction ends: two nodes can't both take its last use."""
    columns = (
        tokens.c.secret_sha256,
        tokens.c.labels,
        tokens.c.uses_left,
        tokens.c.expires_at,
        tokens.c.revoked_at.isnot(None).label("revoked"),
        sa.func.clock_timestamp().label("now"),
    )
    row = (await connection.execute(sa.select(*columns).where(tokens.c.id == token_id).with_for_update())).one_or_none()
    return TokenRow(**row._mapping) if row else None


async def use_token(connection: AsyncConnection, token_id: str) -> None:
    """Count the token down by one; the caller holds its lock."""
    await connection.execute(sa.update(tokens).where(tokens.c.id == token_id).values(uses_left=tokens.c.uses_left - 1))


async def create(connection: AsyncConnection, node: NewNode) -> bool:
    """Make the node and tell the controllers; False when its name is taken."""
    statement = (
        insert(nodes)
        .values(
            id=node.id,
            name=node.name,
            labels=dict(node.labels),
            inventory=dict(node.inventory),
            agentd_version=node.agentd_version,
            mqtt_password=node.mqtt_password,
            state="disconnected",
            state_reason="enrolled, has not connected yet",
        )
        .on_conflict_do_nothing(index_elements=[nodes.c.name])
        .returning(nodes.c.id)
    )
    if (await connection.execute(statement)).first() is None:
        return False
    await add_event(connection, "info", node.name, "Enrolled", "The node enrolled.")
    await hint(connection, f"node:{node.id}")
    await hint(connection, "spec")
    return True


async def add_certificate(
    connection: AsyncConnection, node_id: str, fingerprint: str, key_sha256: str, not_after: datetime.datetime
) -> None:
    """Remember a certificate that was signed for the node."""
    row = {"fingerprint_sha256": fingerprint, "node_id": node_id, "key_sha256": key_sha256, "not_after": not_after}
    await connection.execute(sa.insert(certificates).values(row))


async def find_by_key(connection: AsyncConnection, name: str, key_sha256: str) -> str | None:
    """Id of the node ``name``, if it is not revoked and once had a certificate for that key."""
    query = (
        sa.select(nodes.c.id)
        .join(certificates, certificates.c.node_id == nodes.c.id)
        .where(nodes.c.name == name, nodes.c.revoked_at.is_(None), certificates.c.key_sha256 == key_sha256)
        .limit(1)
        .with_for_update(read=True, key_share=True, of=nodes)
    )
    found: str | None = await connection.scalar(query)
    return found


async def holds_certificate(connection: AsyncConnection, node_id: str, fingerprint: str) -> bool:
    """Whether that certificate was once signed for that node."""
    query = sa.select(sa.literal(1)).where(
        certificates.c.fingerprint_sha256 == fingerprint, certificates.c.node_id == node_id
    )
    return (await connection.execute(query)).first() is not None


async def find(connection: AsyncConnection, node_id: str, *, lock: bool = False) -> NodeRow | None:
    """The node; None when there is none (any more). ``lock``: keep others from deleting it in this transaction."""
    query = sa.select(
        nodes.c.id, nodes.c.name, nodes.c.revoked_at.isnot(None).label("revoked"), nodes.c.mqtt_password
    ).where(nodes.c.id == node_id)
    if lock:
        query = query.with_for_update(read=True, key_share=True)
    row = (await connection.execute(query)).one_or_none()
    return NodeRow(**row._mapping) if row else None


async def introduce(
    connection: AsyncConnection,
    node_id: str,
    *,
    boot_id: str,
    agentd_version: str,
    local_api: str,
    inventory: Mapping[str, Any],
    features: Sequence[str],
    artifacts: Sequence[str],
) -> None:
    """Store what the node said of itself in its Hello.

    Leaves ``resource_version`` alone: that one counts what operators write, and a reconnecting node must not break
    their If-Match.
    """
    await connection.execute(
        sa.update(nodes)
        .where(nodes.c.id == node_id)
        .values(
            boot_id=boot_id,
            agentd_version=agentd_version,
            local_api=local_api,
            inventory=dict(inventory),
            features=list(features),
            artifacts=list(artifacts),
            updated_at=sa.func.now(),
        )
    )


async def add_event(connection: AsyncConnection, severity: str, name: str, reason: str, message: str) -> None:
    """An event of the node ``name``, for people."""
    await connection.execute(
        sa.insert(tables.events).values(severity=severity, object=f"node/{name}", reason=reason, message=message)
    )
