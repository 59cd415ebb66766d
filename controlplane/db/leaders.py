"""Who may act: leases of control-plane processes, and of the controllers among them.

A controller's lease alone does not fence (its holder may sleep through the end of it); the epoch does. Each change of
holder makes a new epoch, and every write of a controller happens in a transaction that first locks the row with the
epoch it was elected with. A new leader's election waits for such a transaction, and the old one's next finds no row.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Deposed(Exception):
    """Another process leads by now: what was to be written is out of date and must be dropped."""


async def acquire(
    connection: AsyncConnection, name: str, holder: str, lease_s: float, renew: int | None = None
) -> int | None:
    """Take the lead of ``name`` for ``lease_s`` from now, or prolong it; the epoch, or None while another holds it.

    ``renew``: the epoch that the caller leads with. A process that starts has none, and gets a new one even where the
    row names it (as after a crash): what an earlier process of its name still has under way is fenced.
    """
    epoch = await connection.scalar(
        sa.text("""
            INSERT INTO leaders AS l (name, holder, epoch, lease_until)
            VALUES (:name, :holder, 1, clock_timestamp() + make_interval(secs => :lease_s))
            ON CONFLICT (name) DO UPDATE SET
                epoch = l.epoch + CASE WHEN l.epoch = CAST(:renew AS bigint) THEN 0 ELSE 1 END,
                holder = excluded.holder, lease_until = excluded.lease_until
            WHERE l.holder = excluded.holder OR l.lease_until < clock_timestamp()
            RETURNING epoch"""),
        {"name": name, "holder": holder, "lease_s": lease_s, "renew": renew},
    )
    return None if epoch is None else int(epoch)


async def release(connection: AsyncConnection, name: str, epoch: int) -> None:
    """End a lease early, so that another process need not wait for it."""
    await connection.execute(
        sa.text("UPDATE leaders SET lease_until = clock_timestamp() WHERE name = :name AND epoch = :epoch"),
        {"name": name, "epoch": epoch},
    )


@contextlib.asynccontextmanager
async def fenced(engine: AsyncEngine, name: str, epoch: int) -> AsyncIterator[AsyncConnection]:
    """A transaction that commits only if ``epoch`` still leads ``name``. Raises Deposed otherwise."""
    async with engine.begin() as connection:
        held = await connection.scalar(
            sa.text("SELECT 1 FROM leaders WHERE name = :name AND epoch = :epoch FOR SHARE"),
            {"name": name, "epoch": epoch},
        )
        if held is None:
            raise Deposed(f"another process leads {name} by now")
        yield connection


async def start_replica(connection: AsyncConnection, replica_id: str, lease_s: float) -> None:
    """Register this process, which starts now; and forget long dead ones, whose sessions were taken over or lost."""
    await connection.execute(sa.text("DELETE FROM replicas WHERE lease_until < now() - interval '1 day'"))
    await connection.execute(
        sa.text("""
            INSERT INTO replicas (replica_id, started_at, lease_until)
            VALUES (:id, clock_timestamp(), clock_timestamp() + make_interval(secs => :lease_s))
            ON CONFLICT (replica_id) DO UPDATE SET
                started_at = excluded.started_at, lease_until = excluded.lease_until"""),
        {"id": replica_id, "lease_s": lease_s},
    )


async def keep_replica(connection: AsyncConnection, replica_id: str, lease_s: float) -> None:
    """Prolong the lease of this process.

    One whose lease ran out begins anew: while it could not reach Postgres nothing was recorded, so that nodes must get
    their grace as after a start (``started_at`` says since when the silence of nodes means anything).
    """
    await connection.execute(
        sa.text("""
            UPDATE replicas SET
                started_at = CASE WHEN lease_until < clock_timestamp() THEN clock_timestamp() ELSE started_at END,
                lease_until = clock_timestamp() + make_interval(secs => :lease_s)
            WHERE replica_id = :id"""),
        {"id": replica_id, "lease_s": lease_s},
    )


async def end_replica(connection: AsyncConnection, replica_id: str) -> None:
    """This process ends in order."""
    await connection.execute(
        sa.text("UPDATE replicas SET lease_until = clock_timestamp() WHERE replica_id = :id"), {"id": replica_id}
    )


async def ensure_timeline(connection: AsyncConnection) -> str:
    """The id of the history that generations count in; made at the first start."""
    await connection.execute(
        sa.text("INSERT INTO settings (key, value) VALUES ('timeline', :value) ON CONFLICT (key) DO NOTHING"),
        {"value": str(uuid.uuid4())},
    )
    value = await connection.scalar(sa.text("SELECT value FROM settings WHERE key = 'timeline'"))
    assert value is not None
    return str(value)
