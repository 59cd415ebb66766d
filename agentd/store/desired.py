"""The desired state on disk: one row, replaced as a whole."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from agentd.store.database import Database


@dataclass(frozen=True, slots=True)
class StoredState:
    """The newest desired state that this node holds. ``document`` is a serialized NodeDocument."""

    timeline: str
    generation: int
    sha256: bytes
    document: bytes


class DesiredStore:
    """Reads and replaces the stored desired state."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> StoredState | None:
        """What is stored; None on a node that never got any."""
        return await self._database.run(_load)

    async def save(self, state: StoredState) -> None:
        """Durable when this returns."""
        await self._database.run(_save, state)


def _load(connection: sqlite3.Connection) -> StoredState | None:
    row = connection.execute("SELECT timeline, generation, sha256, document FROM desired").fetchone()
    return None if row is None else StoredState(*row)


def _save(connection: sqlite3.Connection, state: StoredState) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO desired (one, timeline, generation, sha256, document) VALUES (1, ?, ?, ?, ?)",
        (state.timeline, state.generation, state.sha256, state.document),
    )
