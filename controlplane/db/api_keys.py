"""API keys: ``slmfleet_<role>_<random>``. The database keeps the SHA-256 of the whole key: with 256 random bits in it,
a slow password hash would protect nothing and cost every request."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables

ROLES = ("admin", "gateway")
keys = tables.api_keys


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key that is good now. ``left_s``: seconds until it expires; None = never."""

    id: str
    name: str
    role: str
    secret_sha256: str
    left_s: float | None


def hash_secret(secret: str) -> str:
    """What ``api_keys.secret_sha256`` holds: lower-case hex SHA-256 of the whole key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


async def create(
    connection: AsyncConnection, name: str, role: str, ttl_s: float | None = None
) -> tuple[str, str] | None:
    """Make a key; its id and the key itself, which can't be read again. None when ``name`` is taken."""
    key_id, secret = str(uuid.uuid4()), _new_secret(role)
    statement = (
        insert(keys)
        .values(id=key_id, name=name, role=role, secret_sha256=hash_secret(secret), expires_at=_expiry(ttl_s))
        .on_conflict_do_nothing(index_elements=[keys.c.name])
        .returning(keys.c.id)
    )
    made = (await connection.execute(statement)).first()
    return (key_id, secret) if made else None


async def replace(connection: AsyncConnection, name: str, role: str) -> str:
    """Make the key ``name``, or give it a new secret: the old one, if lost or leaked, is good for nothing then."""
    secret = _new_secret(role)
    fresh = {"role": role, "secret_sha256": hash_secret(secret), "expires_at": None, "revoked_at": None}
    statement = insert(keys).values(id=str(uuid.uuid4()), name=name, **fresh)
    await connection.execute(statement.on_conflict_do_update(index_elements=[keys.c.name], set_=fresh))
    return secret


async def find(connection: AsyncConnection, secret_sha256: str) -> KeyRow | None:
    """The key with this hash, if it is neither revoked nor expired."""
    left = sa.extract("epoch", keys.c.expires_at - sa.func.clock_timestamp())
    query = sa.select(keys.c.id, keys.c.name, keys.c.role, keys.c.secret_sha256, left.label("left_s")).where(
        keys.c.secret_sha256 == secret_sha256,
        keys.c.revoked_at.is_(None),
        sa.or_(keys.c.expires_at.is_(None), keys.c.expires_at > sa.func.clock_timestamp()),
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    left_s = None if row.left_s is None else float(row.left_s)
    return KeyRow(row.id, row.name, row.role, row.secret_sha256, left_s)


async def revoke(connection: AsyncConnection, key_id: str) -> str | None:
    """Delete the key; its name, or None when there is none. The audit trail keeps who it was."""
    return (await connection.execute(sa.delete(keys).where(keys.c.id == key_id).returning(keys.c.name))).scalar()


def _new_secret(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"{role!r} is no role: it is one of {', '.join(ROLES)}")
    return f"slmfleet_{role}_{secrets.token_urlsafe(32)}"


def _expiry(ttl_s: float | None) -> sa.ColumnElement | None:
    return None if ttl_s is None else sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)
