"""The outbox: rows that must reach the control plane's database, once each.

A row gets a number within (stream, epoch). ``cut`` seals the next rows into a batch ``first..last`` that never changes
again, however often it is sent; ``acknowledge`` deletes batches that are committed in Postgres. Rows are dropped only
while they are in no batch (so a batch that was sent stays what it was), oldest metrics first; a hole that this
leaves is told by the batch around it as ``dropped``.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentd.store.database import Database, get_meta, set_meta

# What goes first when space runs out.
DROP_ORDER = ("metrics", "logs", "events", "audit")
ROWS_PER_BATCH = 100


@dataclass(frozen=True, slots=True)
class SealedBatch:
    """An immutable run of rows. ``payload`` is zlib over the rows as protobuf's repeated field 1 (MetricRows,
    EventRows); empty when all of them were dropped."""

    id: int
    stream: str
    epoch: int
    first: int
    last: int
    dropped: int
    boot_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class OutboxSize:
    """How full the outbox is, and how many rows were ever dropped from this store."""

    rows: int
    batches: int
    bytes: int
    dropped: int


class Outbox:
    """See the module. ``limit_bytes`` bounds the payloads on disk."""

    def __init__(self, database: Database, boot_id: str, limit_bytes: int) -> None:
        self._database = database
        self._boot_id = boot_id
        self._limit_bytes = limit_bytes

    async def append(self, stream: str, rows: Sequence[Callable[[int], bytes]]) -> None:
        """Add rows; each is a function from its sequence number to its serialized form. Durable when this returns."""
        await self._database.run(_append, stream, self._database.epoch, self._boot_id, rows, self._limit_bytes)

    async def cut(self, stream: str, max_rows: int = ROWS_PER_BATCH) -> SealedBatch | None:
        """Seal and store the next batch of a stream; None when no row waits."""
        return await self._database.run(_cut, stream, max_rows)

    async def unacknowledged(self, stream: str) -> list[SealedBatch]:
        """Sealed batches that are not yet known to be committed, oldest first."""
        return await self._database.run(_unacknowledged, stream)

    async def acknowledge(self, stream: str, epoch: int, ranges: Iterable[tuple[int, int]]) -> int:
        """Delete the batches that lie inside ``ranges`` (first, last); their number."""
        return await self._database.run(_acknowledge, stream, epoch, tuple(ranges))

    async def size(self) -> OutboxSize:
        """How full it is."""
        return await self._database.run(_size)


def _append(
    connection: sqlite3.Connection,
    stream: str,
    epoch: int,
    boot_id: str,
    rows: Sequence[Callable[[int], bytes]],
    limit_bytes: int,
) -> None:
    connection.execute("INSERT OR IGNORE INTO streams VALUES (?, ?, 1, 1)", (stream, epoch))
    (sequence,) = connection.execute(
        "UPDATE streams SET next_row = next_row + ? WHERE stream = ? AND epoch = ? RETURNING next_row - ?",
        (len(rows), stream, epoch, len(rows)),
    ).fetchone()
    connection.executemany(
        "INSERT INTO rows (stream, epoch, sequence, boot_id, payload) VALUES (?, ?, ?, ?, ?)",
        [(stream, epoch, number, boot_id, row(number)) for number, row in enumerate(rows, start=sequence)],
    )
    _shrink(connection, limit_bytes)


def _shrink(connection: sqlite3.Connection, limit_bytes: int) -> None:
    excess = _bytes(connection) - limit_bytes
    dropped = 0
    for stream in DROP_ORDER:
        while excess > 0:
            oldest = connection.execute(
                "SELECT id, length(payload) FROM rows WHERE stream = ? ORDER BY id LIMIT 100", (stream,)
            ).fetchall()
            if not oldest:
                break
            for row_id, size in oldest:
                connection.execute("DELETE FROM rows WHERE id = ?", (row_id,))
                dropped += 1
                excess -= size
                if excess <= 0:
                    break
    if dropped:
        set_meta(connection, "dropped_rows", str(int(get_meta(connection, "dropped_rows") or 0) + dropped))


def _cut(connection: sqlite3.Connection, stream: str, max_rows: int) -> SealedBatch | None:
    # Older epochs first: their rows are older. The order of the rows' ids is the order in which epochs began.
    waiting = connection.execute(
        "SELECT epoch, next_row, next_cut FROM streams AS s WHERE stream = ? AND next_cut < next_row ORDER BY "
        "(SELECT min(id) FROM rows WHERE rows.stream = s.stream AND rows.epoch = s.epoch) NULLS FIRST LIMIT 1",
        (stream,),
    ).fetchone()
    if waiting is None:
        return None
    epoch, next_row, first = waiting
    rows = connection.execute(
        "SELECT id, sequence, boot_id, payload FROM rows WHERE stream = ? AND epoch = ? ORDER BY sequence LIMIT ?",
        (stream, epoch, max_rows + 1),
    ).fetchall()
    chosen = [row for row in rows[:max_rows] if row[2] == rows[0][2]]
    # A hole behind the last row belongs to this batch only when no row follows that could carry it.
    last = chosen[-1][1] if len(chosen) < len(rows) else next_row - 1
    payload = zlib.compress(join_rows(row[3] for row in chosen)) if chosen else b""
    boot_id = chosen[0][2] if chosen else ""
    dropped = last - first + 1 - len(chosen)
    cursor = connection.execute(
        "INSERT INTO batches (stream, epoch, first, last, dropped, boot_id, payload) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (stream, epoch, first, last, dropped, boot_id, payload),
    )
    connection.executemany("DELETE FROM rows WHERE id = ?", [(row[0],) for row in chosen])
    connection.execute("UPDATE streams SET next_cut = ? WHERE stream = ? AND epoch = ?", (last + 1, stream, epoch))
    return SealedBatch(int(cursor.lastrowid or 0), stream, epoch, first, last, dropped, boot_id, payload)


def join_rows(rows: Iterable[bytes]) -> bytes:
    """The wire form of a message whose field 1 repeats these submessages (protobuf: tag 0x0A, varint length, bytes)."""
    return b"".join(b"\x0a" + _varint(len(row)) + row for row in rows)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _unacknowledged(connection: sqlite3.Connection, stream: str) -> list[SealedBatch]:
    found = connection.execute(
        "SELECT id, stream, epoch, first, last, dropped, boot_id, payload FROM batches WHERE stream = ? ORDER BY id",
        (stream,),
    )
    return [SealedBatch(*row) for row in found]


def _acknowledge(connection: sqlite3.Connection, stream: str, epoch: int, ranges: Sequence[tuple[int, int]]) -> int:
    deleted = 0
    for first, last in ranges:
        deleted += connection.execute(
            "DELETE FROM batches WHERE stream = ? AND epoch = ? AND first >= ? AND last <= ?",
            (stream, epoch, min(first, 2**63 - 1), min(last, 2**63 - 1)),
        ).rowcount
    # An old epoch that is all sent will never be used again.
    connection.execute(
        "DELETE FROM streams WHERE next_cut = next_row AND epoch != ? AND NOT EXISTS "
        "(SELECT 1 FROM batches WHERE batches.stream = streams.stream AND batches.epoch = streams.epoch)",
        (int(get_meta(connection, "epoch") or 0),),
    )
    return deleted


def _bytes(connection: sqlite3.Connection) -> int:
    (size,) = connection.execute(
        "SELECT (SELECT ifnull(sum(length(payload)), 0) FROM rows) + "
        "(SELECT ifnull(sum(length(payload)), 0) FROM batches)"
    ).fetchone()
    return int(size)


def _size(connection: sqlite3.Connection) -> OutboxSize:
    (rows,) = connection.execute("SELECT count(*) FROM rows").fetchone()
    (batches,) = connection.execute("SELECT count(*) FROM batches").fetchone()
    return OutboxSize(rows, batches, _bytes(connection), int(get_meta(connection, "dropped_rows") or 0))
