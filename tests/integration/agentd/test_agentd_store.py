"""The SQLite store: what survives which end, and what is refused."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agentd.store.database import SCHEMA_VERSION, Database
from agentd.store.desired import DesiredStore, StoredState
from agentd.store.outbox import Outbox, SealedBatch
from slmfleet.errors import UserError
from slmfleet.v1 import telemetry_pb2

STATE = StoredState("t1", 3, b"\x01" * 32, b"document")


def row(text: str) -> Callable[[int], bytes]:
    return lambda sequence: telemetry_pb2.EventRow(sequence=sequence, message=text).SerializeToString()


def rows_of(batch: SealedBatch) -> list[tuple[int, str]]:
    if not batch.payload:
        return []
    rows = telemetry_pb2.EventRows.FromString(zlib.decompress(batch.payload)).rows
    return [(item.sequence, item.message) for item in rows]


def with_outbox(test: Callable[[Outbox], Awaitable[None]], path: Path, limit: int = 10**6, boot: str = "b1") -> int:
    """Run a test on an opened outbox; the epoch. Stops cleanly."""

    async def run() -> int:
        database = await Database.open(path)
        try:
            await test(Outbox(database, boot, limit))
        finally:
            await database.close()
        return database.epoch

    return asyncio.run(run())


async def nothing(_: Outbox) -> None:
    pass


def test_desired_state_survives_a_kill_at_any_time_after_save(tmp_path: Path) -> None:
    program = f"""
import asyncio, os, signal, sys
from pathlib import Path
from agentd.store.database import Database
from agentd.store.desired import DesiredStore, StoredState
async def main():
    store = DesiredStore(await Database.open(Path({str(tmp_path / "store.db")!r})))
    await store.save(StoredState("t1", 3, bytes([1]) * 32, b"document"))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9

    async def read() -> StoredState | None:
        database = await Database.open(tmp_path / "store.db")
        try:
            return await DesiredStore(database).load()
        finally:
            await database.close()

    assert asyncio.run(read()) == STATE


def test_a_failed_write_leaves_the_old_state(tmp_path: Path) -> None:
    async def test() -> None:
        database = await Database.open(tmp_path / "store.db")
        store = DesiredStore(database)
        await store.save(STATE)

        def broken(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM desired")
            raise ValueError("half way")

        with pytest.raises(ValueError, match="half way"):
            await database.run(broken)
        assert await store.load() == STATE
        await database.close()

    asyncio.run(test())


def test_the_epoch_stays_after_a_clean_stop_and_changes_after_another(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    first = with_outbox(nothing, path)
    assert 0 < first < 2**63
    assert with_outbox(nothing, path) == first

    async def crash() -> int:
        database = await Database.open(path)
        database._thread.shutdown()  # never closed: as after a crash
        return database.epoch

    assert asyncio.run(crash()) == first
    assert with_outbox(nothing, path) != first


def test_batches_are_immutable_survive_restarts_and_go_when_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def first(outbox: Outbox) -> None:
        await outbox.append("events", [row("a"), row("b"), row("c")])
        one = await outbox.cut("events", max_rows=2)
        assert one is not None
        assert (one.first, one.last, one.dropped, rows_of(one)) == (1, 2, 0, [(1, "a"), (2, "b")])
        assert await outbox.unacknowledged("events") == [one]

    async def second(outbox: Outbox) -> None:
        (one,) = await outbox.unacknowledged("events")
        await outbox.append("events", [row("d")])
        two = await outbox.cut("events")
        assert two is not None
        assert (two.first, two.last, rows_of(two)) == (3, 4, [(3, "c"), (4, "d")])
        assert await outbox.cut("events") is None
        assert await outbox.acknowledge("events", one.epoch + 1, [(1, 9)]) == 0
        assert await outbox.acknowledge("events", one.epoch, [(1, 3)]) == 1
        assert await outbox.unacknowledged("events") == [two]
        assert await outbox.acknowledge("events", one.epoch, [(0, 2**64 - 1)]) == 1
        size = await outbox.size()
        assert (size.rows, size.batches, size.bytes, size.dropped) == (0, 0, 0, 0)

    assert with_outbox(first, path) == with_outbox(second, path)


def test_rows_of_two_boots_never_share_a_batch(tmp_path: Path) -> None:
    async def fill(outbox: Outbox) -> None:
        await outbox.append("events", [row("a")])

    async def check(outbox: Outbox) -> None:
        await outbox.append("events", [row("b")])
        batches = [await outbox.cut("events"), await outbox.cut("events")]
        assert [batch and (batch.boot_id, batch.first, batch.last) for batch in batches] == [
            ("b1", 1, 1),
            ("b2", 2, 2),
        ]

    with_outbox(fill, tmp_path / "store.db")
    with_outbox(check, tmp_path / "store.db", boot="b2")


def test_rows_of_an_older_epoch_go_first_under_their_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    async def crash() -> int:
        database = await Database.open(path)
        await Outbox(database, "b1", 10**6).append("events", [row("old")])
        database._thread.shutdown()
        return database.epoch

    old = asyncio.run(crash())

    async def check(outbox: Outbox) -> None:
        await outbox.append("events", [row("new")])
        first, second = await outbox.cut("events"), await outbox.cut("events")
        assert first is not None
        assert second is not None
        assert (first.epoch, rows_of(first)) == (old, [(1, "old")])
        assert second.epoch != old
        assert rows_of(second) == [(1, "new")]

    with_outbox(check, path)


def test_space_is_bounded_by_dropping_the_oldest_metrics_and_the_holes_are_told(tmp_path: Path) -> None:
    async def test(outbox: Outbox) -> None:
        await outbox.append("events", [row("e" * 100)])
        for number in range(50):
            await outbox.append("metrics", [row(f"{number:03}" + "m" * 97)])
        size = await outbox.size()
        assert size.bytes <= 1000
        assert size.dropped > 0
        batch = await outbox.cut("metrics")
        assert batch is not None
        assert (batch.first, batch.last) == (1, 50)
        assert batch.dropped == size.dropped == 50 - len(rows_of(batch))
        assert rows_of(batch)[-1][0] == 50
        event = await outbox.cut("events")
        assert event is not None
        assert event.dropped == 0

    with_outbox(test, tmp_path / "store.db", limit=1000)


def test_a_sealed_batch_is_never_thinned(tmp_path: Path) -> None:
    async def test(outbox: Outbox) -> None:
        await outbox.append("metrics", [row("m" * 400)])
        sealed = await outbox.cut("metrics")
        for _ in range(20):
            await outbox.append("metrics", [row(os.urandom(200).hex())])
        assert await outbox.unacknowledged("metrics") == [sealed]

    with_outbox(test, tmp_path / "store.db", limit=500)


def test_when_all_rows_of_a_range_were_dropped_an_empty_batch_says_so(tmp_path: Path) -> None:
    async def test(outbox: Outbox) -> None:
        for _ in range(3):
            await outbox.append("metrics", [row("m" * 100)])
        batch = await outbox.cut("metrics")
        assert batch is not None
        assert (batch.first, batch.last, batch.dropped, batch.payload) == (1, 3, 3, b"")

    with_outbox(test, tmp_path / "store.db", limit=10)


def test_a_newer_schema_is_refused_with_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with_outbox(nothing, path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match="made by a newer agentd"):
        with_outbox(nothing, path)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is no database, but it may be somebody's file" * 50)
    with pytest.raises(UserError, match="move the file away"):
        with_outbox(nothing, path)
    assert path.read_bytes().startswith(b"this is no database")


def test_the_database_is_private_and_writes_through(tmp_path: Path) -> None:
    async def test() -> None:
        database = await Database.open(tmp_path / "store.db")
        assert (tmp_path / "store.db").stat().st_mode & 0o777 == 0o600
        pragmas = await database.run(
            lambda connection: [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in
                                ("journal_mode", "synchronous")]
        )  # fmt: skip
        assert pragmas == ["wal", 2]
        await database.close()

    asyncio.run(test())
