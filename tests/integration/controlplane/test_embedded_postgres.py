"""The PostgreSQL out of the wheel: finds its data again, and neither a crash nor a leftover stops the next start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from controlplane.embedded.postgres import EmbeddedPostgres
from slmfleet.errors import UserError
from tests.support.processes import Child, assert_gone, nothing_left_behind

pytestmark = pytest.mark.postgres

PARENT = """
import sys, signal
from pathlib import Path
from controlplane.embedded.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print("pid", server.pid, server.url(), flush=True)
signal.pause()
"""


def fetch(url: str, statement: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def test_a_second_start_finds_the_data(folder: Path) -> None:
    with nothing_left_behind():
        first = EmbeddedPostgres(folder / "postgres")
        first.start()
        fetch(first.url(), "CREATE TABLE kept AS SELECT 42 AS x")
        first.stop()
        second = EmbeddedPostgres(folder / "postgres")
        second.start()
        try:
            assert fetch(second.url(), "SELECT x FROM kept") == 42
        finally:
            second.stop()
    assert not (folder / "postgres" / "postmaster.pid").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone changes anything")
def test_what_a_start_as_root_changes_on_the_machine_is_told_once(folder: Path) -> None:
    folder.chmod(0o700)
    (folder / "closed").mkdir(mode=0o700)
    for expected in (True, False):
        server = EmbeddedPostgres(folder / "closed" / "postgres")
        server.start()
        try:
            told = " ".join(server.changes)
        finally:
            server.stop()
        assert (f"let every user pass through {folder}, {folder}/closed (o+x, not to read)" in told) == expected
    assert folder.stat().st_mode & 0o777 == 0o701


def test_a_path_too_long_for_a_socket_works(folder: Path) -> None:
    server = EmbeddedPostgres(folder / ("d" * 100) / "postgres")
    server.start()
    try:
        assert fetch(server.url(), "SELECT 1") == 1
        sockets = server._sockets
        assert sockets.stat().st_mode & 0o077 == 0
    finally:
        server.stop()
    assert not sockets.exists()


def test_it_ends_with_its_parent_and_starts_again_with_what_was_committed(folder: Path) -> None:
    folder = folder / "postgres"
    with Child([sys.executable, "-c", PARENT, folder]) as parent:
        found = parent.wait_for_line(r"pid (\d+) (\S+)")
        fetch(found[2], "CREATE TABLE kept AS SELECT 7 AS x")
        server = psutil.Process(int(found[1]))
        os.kill(parent.pid, signal.SIGKILL)
        assert_gone([server], 20)
    again = EmbeddedPostgres(folder)
    again.start()
    try:
        assert fetch(again.url(), "SELECT x FROM kept") == 7
    finally:
        again.stop()


def test_a_leftover_server_is_ended_first(folder: Path) -> None:
    folder = folder / "postgres"
    leftover = EmbeddedPostgres(folder)
    leftover.start()
    old = psutil.Process(leftover.pid)
    assert leftover._process is not None
    server = EmbeddedPostgres(folder)
    server.start()
    try:
        leftover._process.wait(10)
        assert not old.is_running()
        assert server.pid != old.pid
        assert fetch(server.url(), "SELECT 1") == 1
    finally:
        server.stop()


def test_a_pid_file_of_a_process_that_is_none_of_ours_is_stale(folder: Path) -> None:
    data = folder / "postgres"
    first = EmbeddedPostgres(data)
    first.start()
    server = first._process
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    server.wait(10)
    # The pid was given to another program since, even one that works in that folder.
    program = "import signal; print('up', flush=True); signal.pause()"
    with Child([sys.executable, "-c", program], cwd=data) as stranger:
        stranger.wait_for_line("up")
        for lock in (data / "postmaster.pid", data / ".s.PGSQL.5432.lock"):
            lock.write_text("\n".join([str(stranger.pid), *lock.read_text().split("\n")[1:]]))
        second = EmbeddedPostgres(data)
        second.start()
        try:
            assert fetch(second.url(), "SELECT 1") == 1
            assert stranger.process.poll() is None
        finally:
            second.stop()


def test_a_session_that_outlived_its_server_is_ended_first(folder: Path) -> None:
    """A session in a long calculation does not look up when its server is killed."""
    data = folder / "postgres"
    first = EmbeddedPostgres(data)
    first.start()
    server = first._process
    assert server is not None
    busy = "SELECT pg_backend_pid(), (SELECT count(*) FROM generate_series(1, 10000000000))"

    async def kill_while_it_calculates() -> psutil.Process:
        connection = await asyncpg.connect(first.url())
        session = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
        task = asyncio.create_task(connection.fetchval(busy), name="busy")
        watcher = await asyncpg.connect(first.url())
        query = "SELECT state FROM pg_stat_activity WHERE pid = $1"
        while await watcher.fetchval(query, session.pid) != "active":  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.01)
        # Stopped, it cannot even see that it should end.
        session.suspend()
        os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return session

    session = asyncio.run(kill_while_it_calculates())
    assert session.is_running()
    second = EmbeddedPostgres(data)
    second.start()
    try:
        assert_gone([session], 5)
        assert fetch(second.url(), "SELECT 1") == 1
    finally:
        second.stop()


def test_a_foreign_folder_and_a_foreign_version_are_refused_and_left_alone(folder: Path) -> None:
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        EmbeddedPostgres(foreign).start()
    assert (foreign / "letter.txt").read_text() == "mine"
    old = folder / "old"
    old.mkdir()
    (old / "PG_VERSION").write_text("9\n")
    with pytest.raises(UserError, match="made by PostgreSQL 9"):
        EmbeddedPostgres(old).start()
