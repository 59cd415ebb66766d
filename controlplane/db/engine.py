"""The way to Postgres: one engine a process, and the hints that wake loops early.

A hint is a ``NOTIFY slmfleet, '<topic>'`` sent inside the transaction that changed something. It may be lost; every
loop that listens also has a timer (DESIGN: timers are the truth).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from slmfleet import logs

CHANNEL = "slmfleet"
log = logs.get(__name__)


def make_engine(url: str, pool_size: int = 10) -> AsyncEngine:
    """An engine for ``postgresql://...`` or ``postgresql+asyncpg://...``; connects on first use. What stands behind the
    ``?`` means what it means to libpq (``sslmode=verify-full&sslrootcert=...``, ``application_name``, ...); the driver
    takes what it does not know for a setting of the server.

    A database that is away, goes away or restarts is always one of OSError, ``sa.exc.OperationalError``,
    ``sa.exc.InterfaceError`` and ``sa.exc.TimeoutError``; the driver alone would raise several more, some of them the
    base class of all database errors.
    """
    parsed = sa.make_url(url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(parsed, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True)
    sa.event.listen(engine.sync_engine, "do_connect", partial(_connect, parsed.set(drivername="postgresql")))
    sa.event.listen(engine.sync_engine, "handle_error", _name_lost_connection, retval=True)
    return engine


_AWAY = (
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.InterfaceError,
    # "cannot switch to state ...": what a connection says that is lost while it closes.
    asyncpg.InternalClientError,
)


def _connect(
    url: sa.URL, dialect: sa.Dialect, _record: Any, _arguments: tuple[Any, ...], _options: dict[str, Any]
) -> Any:
    """What Postgres says instead of letting us in (it starts, it stops, it is full) has no class of its own.

    The driver reads the URL by itself: SQLAlchemy would hand it each parameter as an argument, and it has none called
    ``sslmode``."""
    dsn = url.render_as_string(hide_password=False)
    try:
        return dialect.connect(async_creator_fn=partial(asyncpg.connect, dsn))
    except (dialect.loaded_dbapi.Error, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise sa.exc.OperationalError(None, None, error, connection_invalidated=True) from error


def _name_lost_connection(context: ExceptionContext) -> BaseException | None:
    """A connection that breaks in the middle of a statement is a bare DBAPIError otherwise."""
    original = context.original_exception
    if not isinstance(original, Exception):
        # A cancelled task breaks its connection as well; that must stay a cancellation.
        return None
    cause = original if isinstance(original, _AWAY) else original.__cause__
    away = isinstance(cause, _AWAY) and not isinstance(cause, asyncpg.QueryCanceledError)
    named = isinstance(context.sqlalchemy_exception, (sa.exc.OperationalError, sa.exc.InterfaceError))
    if named or not (away or context.is_disconnect):
        return None
    return sa.exc.OperationalError(context.statement, None, original, connection_invalidated=True)


async def hint(connection: AsyncConnection, topic: str) -> None:
    """Wake the loops that listen to ``topic`` (``spec``, ``node:<id>``) when this transaction commits."""
    await connection.execute(sa.text("SELECT pg_notify(:channel, :topic)"), {"channel": CHANNEL, "topic": topic})


class Hints:
    """Hands each hint that arrives to the callbacks; connects again by itself when the connection breaks."""

    def __init__(self, engine: AsyncEngine, retry_s: float = 1.0) -> None:
        self._engine = engine
        self._retry_s = retry_s
        self._callbacks: list[Callable[[str], None]] = []

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(topic)`` for each hint, and ``callback("")`` (anything may have changed) after a gap."""
        self._callbacks.append(callback)

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            try:
                await self._listen()
            except (OSError, sa.exc.SQLAlchemyError, asyncpg.PostgresError, *_AWAY) as error:
                log.warning("hints interrupted", error=error)
            await asyncio.sleep(self._retry_s)

    async def _listen(self) -> None:
        closed = asyncio.Event()
        async with self._engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver = raw.driver_connection
            assert driver is not None
            driver.add_termination_listener(lambda *_: closed.set())
            await driver.add_listener(CHANNEL, lambda _c, _p, _ch, payload: self._tell(payload))
            self._tell("")
            try:
                await closed.wait()
            finally:
                with contextlib.suppress(OSError, sa.exc.SQLAlchemyError):
                    await connection.invalidate()

    def _tell(self, topic: str) -> None:
        for callback in self._callbacks:
            callback(topic)
