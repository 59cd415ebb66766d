"""The node's SQLite file, owned by one thread.

WAL with ``synchronous=FULL``: what was committed survives a power cut, which is what "stored durably, then
acknowledged" leans on. A commit waits for the disk, so nothing here runs on the event loop: ``run`` sends a function
to the thread that owns the connection and awaits its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from slmfleet.errors import UserError

SCHEMA_VERSION = 1
# One script per step from one schema version to the next; a step is never changed once it was released.
_STEPS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE desired (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        timeline TEXT NOT NULL, generation INTEGER NOT NULL, sha256 BLOB NOT NULL, document BLOB NOT NULL
    );
    -- Numbers of the rows of one stream: next_row is given to the next row, rows below next_cut are in batches.
    CREATE TABLE streams (
        stream TEXT NOT NULL, epoch INTEGER NOT NULL, next_row INTEGER NOT NULL, next_cut INTEGER NOT NULL,
        PRIMARY KEY (stream, epoch)
    ) WITHOUT ROWID;
    CREATE TABLE rows (
        id INTEGER PRIMARY KEY, stream TEXT NOT NULL, epoch INTEGER NOT NULL, sequence INTEGER NOT NULL,
        boot_id TEXT NOT NULL, payload BLOB NOT NULL
    );
    CREATE UNIQUE INDEX rows_by_sequence ON rows (stream, epoch, sequence);
    CREATE TABLE batches (
        id INTEGER PRIMARY KEY, stream TEXT NOT NULL, epoch INTEGER NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, dropped INTEGER NOT NULL, boot_id TEXT NOT NULL, payload BLOB NOT NULL
    );
    CREATE TABLE blobs (
        sha256 TEXT PRIMARY KEY, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        used_at INTEGER NOT NULL
    ) WITHOUT ROWID;
    """,
)

# A disk that is full, fails or went read-only. What was committed stays; whoever meets one tries again later.
STORAGE_ERRORS = (OSError, sqlite3.OperationalError)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Database:
    """The store. Open it with ``await Database.open(path)``, close it with ``await close()``.

    ``epoch`` is the outbox's epoch of this run: the stored one after a clean stop, else a new random one.
    """

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, epoch: int) -> None:
        self._connection = connection
        self._thread = thread
        self.epoch = epoch

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open or make the database. Raises UserError for a newer schema or a file that is no database."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        try:
            connection, epoch = await asyncio.get_running_loop().run_in_executor(thread, _open, path)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(connection, thread, epoch)

    async def run(
        self,
        function: Callable[Concatenate[sqlite3.Connection, Arguments], Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Call ``function(connection, ...)`` in one transaction on the owning thread; committed when this returns."""

        def call() -> Result:
            with transaction(self._connection):
                return function(self._connection, *arguments, **named)

        # Shielded: a cancelled caller must not leave the thread inside a transaction that nobody awaits.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))

    async def close(self) -> None:
        """Mark the stop as clean and close the file."""

        def finish() -> None:
            with transaction(self._connection):
                set_meta(self._connection, "clean_stop", "1")
            self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, finish)
        self._thread.shutdown(wait=True)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Any:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK when the body raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A COMMIT that found the disk full leaves the transaction open; after other errors SQLite has ended it itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def get_meta(connection: sqlite3.Connection, key: str) -> str | None:
    """One remembered fact."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Remember one fact."""
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))


def _open(path: Path) -> tuple[sqlite3.Connection, int]:
    try:
        # Used by the owning thread only; it is closed there too.
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    except sqlite3.Error as error:
        raise UserError(f"cannot open the database {path}: {error}; check the state folder") from error
    try:
        path.chmod(0o600)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        # The page cache is private memory of a daemon that counts it: 256 KiB do for a few rows at a time.
        connection.execute("PRAGMA cache_size=-256")
        _migrate(connection, path)
        return connection, _start_epoch(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise UserError(
            f"cannot read the database {path}: {error}; move the file away to start anew (the control plane sends "
            "the desired state again, unsent telemetry is lost)"
        ) from error
    except BaseException:
        connection.close()
        raise


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise UserError(
            f"the database {path} has schema {version}, made by a newer agentd; this one knows schemas up to "
            f"{SCHEMA_VERSION}: install the newer agentd again, or choose another --state-dir"
        )
    for number, script in enumerate(_STEPS[version:], start=version + 1):
        with transaction(connection):
            # Not executescript: that would commit our transaction first.
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number}")


def _statements(script: str) -> list[str]:
    statements, current = [], ""
    for line in script.splitlines():
        current += line + "\n"
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


def _start_epoch(connection: sqlite3.Connection) -> int:
    """The epoch of this run, and note that the store is in use (not cleanly stopped)."""
    with transaction(connection):
        stored = get_meta(connection, "epoch")
        clean = get_meta(connection, "clean_stop") == "1"
        epoch = int(stored) if stored and clean else secrets.randbelow(2**63 - 1) + 1
        set_meta(connection, "epoch", str(epoch))
        set_meta(connection, "clean_stop", "0")
    return epoch
