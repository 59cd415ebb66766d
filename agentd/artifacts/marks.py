"""Which blobs were verified, and when each was last needed: facts in the node's database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from agentd.artifacts.store import Blob
from agentd.store.database import Database


class Marks:
    """Remembered (inode, size, modification time) of verified blobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> dict[str, tuple[Blob, int]]:
        """Digest to (the blob as it was when it was verified, seconds since 1970 when it was last needed)."""
        return await self._database.run(_load)

    async def remember(self, blob: Blob, now_s: float) -> None:
        """This blob was verified just now."""
        await self._database.run(_remember, blob, int(now_s))

    async def touch(self, digests: Iterable[str], now_s: float) -> None:
        """These blobs are needed now."""
        await self._database.run(_touch, tuple(digests), int(now_s))

    async def forget(self, sha256: str) -> None:
        """This blob is gone."""
        await self._database.run(_forget, sha256)


def _load(connection: sqlite3.Connection) -> dict[str, tuple[Blob, int]]:
    rows = connection.execute("SELECT sha256, inode, size, mtime_ns, used_at FROM blobs")
    return {row[0]: (Blob(*row[:4]), row[4]) for row in rows}


def _remember(connection: sqlite3.Connection, blob: Blob, now_s: int) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO blobs (sha256, inode, size, mtime_ns, used_at) VALUES (?, ?, ?, ?, ?)",
        (blob.sha256, blob.inode, blob.size_bytes, blob.mtime_ns, now_s),
    )


def _touch(connection: sqlite3.Connection, digests: tuple[str, ...], now_s: int) -> None:
    connection.executemany("UPDATE blobs SET used_at = ? WHERE sha256 = ?", [(now_s, digest) for digest in digests])


def _forget(connection: sqlite3.Connection, sha256: str) -> None:
    connection.execute("DELETE FROM blobs WHERE sha256 = ?", (sha256,))
