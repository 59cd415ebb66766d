"""What nodes report, into Postgres: rows by COPY, and the ranges that make a repeated batch count once.

Every function takes an open connection: a group of batches is one transaction, and ``lock_nodes`` comes first in it, so
that two replicas that got the same batch take turns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db.engine import CHANNEL

METRIC_COLUMNS = (
    "node_id",
    "epoch",
    "sequence",
    "at",
    "boot_id",
    "boottime_ms",
    "cpu_fraction",
    "memory_used_bytes",
    "in_flight",
    "output_tokens",
    "requests_ok",
    "requests_failed",
    "row",
)
EVENT_COLUMNS = ("at", "severity", "object", "reason", "message")

StreamKey = tuple[str, str, int]
Span = tuple[int, int, int]


async def lock_nodes(connection: AsyncConnection, node_ids: Collection[str]) -> dict[str, str]:
    """Name by id of those nodes that exist and are not revoked, locked against each other until the transaction ends.

    In the order of ids, so that two groups never wait for one another.
    """
    rows = await connection.execute(
        sa.text(
            "SELECT id, name FROM nodes WHERE id = ANY (CAST(:ids AS text[])) AND revoked_at IS NULL "
            "ORDER BY id FOR NO KEY UPDATE"
        ),
        {"ids": list(node_ids)},
    )
    return {row.id: row.name for row in rows}


async def committed_spans(connection: AsyncConnection, keys: Collection[StreamKey]) -> dict[StreamKey, list[Span]]:
    """(first, last, dropped) of what is committed of each (node, stream, epoch)."""
    rows = await connection.execute(
        sa.text("""
            SELECT r.node_id, r.stream, r.epoch, r.first, r.last, r.dropped
            FROM outbox_ranges AS r
            JOIN unnest(CAST(:nodes AS text[]), CAST(:streams AS text[]), CAST(:epochs AS bigint[]))
                AS k (node_id, stream, epoch) USING (node_id, stream, epoch)"""),
        _arrays(keys),
    )
    found: dict[StreamKey, list[Span]] = {}
    for row in rows:
        found.setdefault((row.node_id, row.stream, row.epoch), []).append((row.first, row.last, row.dropped))
    return found


async def write_spans(
    connection: AsyncConnection,
    written: Iterable[tuple[StreamKey, Span]],
    removed: Iterable[tuple[StreamKey, int]],
) -> None:
    """Change the table of ranges; ``removed`` names ranges by their first row."""
    if gone := list(removed):
        await connection.execute(
            sa.text("""
                DELETE FROM outbox_ranges AS r
                USING unnest(CAST(:nodes AS text[]), CAST(:streams AS text[]), CAST(:epochs AS bigint[]),
                    CAST(:firsts AS bigint[])) AS k (node_id, stream, epoch, first)
                WHERE (r.node_id, r.stream, r.epoch, r.first) = (k.node_id, k.stream, k.epoch, k.first)"""),
            {**_arrays([key for key, _ in gone]), "firsts": [first for _, first in gone]},
        )
    if made := list(written):
        await connection.execute(
            sa.text("""
                INSERT INTO outbox_ranges (node_id, stream, epoch, first, last, dropped)
                SELECT * FROM unnest(CAST(:nodes AS text[]), CAST(:streams AS text[]), CAST(:epochs AS bigint[]),
                    CAST(:firsts AS bigint[]), CAST(:lasts AS bigint[]), CAST(:dropped AS bigint[]))
                ON CONFLICT (node_id, stream, epoch, first) DO UPDATE
                SET last = excluded.last, dropped = excluded.dropped, received_at = now()"""),
            {
                **_arrays([key for key, _ in made]),
                "firsts": [span[0] for _, span in made],
                "lasts": [span[1] for _, span in made],
                "dropped": [span[2] for _, span in made],
            },
        )


async def copy_metrics(connection: AsyncConnection, records: Iterable[Sequence[Any]]) -> None:
    """Rows of ``node_metrics``, values in the order of METRIC_COLUMNS."""
    await _copy(connection, "node_metrics", METRIC_COLUMNS, records)


async def copy_events(connection: AsyncConnection, records: Iterable[Sequence[Any]]) -> None:
    """Rows of ``events``, values in the order of EVENT_COLUMNS."""
    await _copy(connection, "events", EVENT_COLUMNS, records)


async def touch(connection: AsyncConnection, node_ids: Collection[str]) -> None:
    """Telemetry of these nodes came in, now."""
    await connection.execute(
        sa.text("UPDATE nodes SET telemetry_at = now() WHERE id = ANY (CAST(:ids AS text[]))"), {"ids": list(node_ids)}
    )


async def record_presence(connection: AsyncConnection, node_id: str, online: bool, session_epoch: int) -> bool:
    """Store what the node's presence says and tell the controllers; False when nothing changed.

    A last will may arrive after the node is back: one that speaks of an older session than the newest is passed over.
    """
    changed = await connection.execute(
        sa.text("""
            WITH changed AS (
                UPDATE nodes AS n SET presence = :online
                WHERE n.id = :id AND n.presence IS DISTINCT FROM :online
                  AND (:online OR NOT EXISTS (
                      SELECT 1 FROM node_sessions AS s WHERE s.node_id = n.id AND s.epoch > :epoch))
                RETURNING n.id)
            SELECT pg_notify(:channel, 'node:' || id) FROM changed"""),
        {"id": node_id, "online": online, "epoch": session_epoch, "channel": CHANNEL},
    )
    return changed.first() is not None


async def _copy(
    connection: AsyncConnection, table: str, columns: Sequence[str], records: Iterable[Sequence[Any]]
) -> None:
    # The driver begins the transaction with its first statement: lock_nodes has run on this connection, so the COPY is
    # inside it.
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert driver is not None
    await driver.copy_records_to_table(table, columns=list(columns), records=records)


def _arrays(keys: Collection[StreamKey]) -> dict[str, list[Any]]:
    return {
        "nodes": [key[0] for key in keys],
        "streams": [key[1] for key in keys],
        "epochs": [key[2] for key in keys],
    }
