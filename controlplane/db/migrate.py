"""The schema's way up: Alembic, driven from here, with the migrations that came with the program.

A database whose schema is newer than this program is refused before anything is changed: an older program would
write rows that the newer one can't read.

The functions that take a URL run an event loop of their own: call them before the program's loop starts, or with
``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TypeVar

import asyncpg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection

import slmfleet
from controlplane.db.engine import make_engine
from slmfleet import logs
from slmfleet.errors import UsageError, UserError

log = logs.get(__name__)
Value = TypeVar("Value")
# Seconds to wait for the first connection.
CONNECT_TIMEOUT_S = 10.0


def config() -> Config:
    """Alembic's configuration, pointing at the migrations beside this installation."""
    made = Config()
    made.set_main_option("script_location", str(resources.files("migrations")).replace("%", "%%"))
    return made


def head() -> str:
    """The newest schema that this program knows."""
    found = ScriptDirectory.from_config(config()).get_current_head()
    assert found is not None
    return found


def current(url: str) -> str | None:
    """The schema that the database at ``url`` has; None before the first migration.

    Raises UserError when the database can't be reached.
    """
    return asyncio.run(_connected(url, current_of))


def upgrade(url: str) -> str:
    """Bring the database at ``url`` to ``head()`` in one transaction, and return the schema that it had before ("" for
    none). Safe to run in several programs at once.

    Raises UsageError when the database's schema is newer than this program, UserError when it can't be reached.
    """

    async def act(connection: AsyncConnection) -> str:
        before = await current_of(connection)
        _refuse_newer(before)
        await connection.run_sync(_alembic(lambda alembic: command.upgrade(alembic, "head")))
        return before or ""

    before = asyncio.run(_connected(url, act))
    if before != head():
        log.info("schema migrated", before=before or "none", now=head())
    return before


def downgrade(url: str, revision: str) -> None:
    """Take the database at ``url`` back to ``revision`` ("base": nothing is left). For tests and emergencies."""

    async def act(connection: AsyncConnection) -> None:
        await connection.run_sync(_alembic(lambda alembic: command.downgrade(alembic, revision)))

    asyncio.run(_connected(url, act))


def check(url: str) -> None:
    """Return when the database at ``url`` has exactly this program's schema.

    Raises UsageError (exit code 2) when it is newer, UserError when it is older or can't be reached.
    """
    verdict(current(url))


def verdict(found: str | None) -> None:
    """Judge a schema: return for ``head()``; UsageError for a newer one, UserError for an older one."""
    _refuse_newer(found)
    if found != head():
        raise UserError(
            f"the database has schema {found or 'none'} and this program needs {head()}: run `controlplane migrate`"
        )


async def current_of(connection: AsyncConnection) -> str | None:
    """The schema of an open connection's database."""
    return await connection.run_sync(
        lambda sync_connection: MigrationContext.configure(sync_connection).get_current_revision()
    )


def _refuse_newer(found: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if found is not None and found not in known:
        raise UsageError(
            f"the database has schema {found}, which controlplane {slmfleet.__version__} does not know (its newest is "
            f"{head()}): it was made by a newer version; install that version, or use another database"
        )


def _alembic(action: Callable[[Config], None]) -> Callable[[sa.Connection], None]:
    def run(connection: sa.Connection) -> None:
        alembic = config()
        alembic.attributes["connection"] = connection
        action(alembic)

    return run


async def _connected(url: str, action: Callable[[AsyncConnection], Awaitable[Value]]) -> Value:
    engine = make_engine(url, pool_size=1)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await engine.connect()
    except (OSError, TimeoutError, sa.exc.SQLAlchemyError, asyncpg.PostgresError) as error:
        await engine.dispose()
        place = sa.make_url(url).render_as_string(hide_password=True)
        reason = str(error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig else error) or "no answer"
        raise UserError(f"cannot reach the database at {place}: {reason.splitlines()[0]}") from error
    try:
        async with connection.begin():
            return await action(connection)
    finally:
        await connection.close()
        await engine.dispose()
