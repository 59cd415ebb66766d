"""However a connection is lost, it is one of the few errors that loops wait out."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import sqlalchemy as sa

from controlplane.db.engine import Hints, make_engine
from tests.support.processes import eventually

pytestmark = pytest.mark.postgres

AWAY = (OSError, sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)


async def cut_all(url: str) -> None:
    """End every other connection to the database, as a restart of Postgres does."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(30)", "SELECT 1"])
def test_a_connection_that_is_cut(postgres_url: str, statement: str) -> None:
    async def scenario() -> None:
        engine = make_engine(postgres_url)
        begun = asyncio.Event()

        async def work() -> None:
            async with engine.begin() as connection:
                await connection.execute(sa.text("SELECT 1"))
                begun.set()
                if statement == "SELECT 1":
                    await cut_all(postgres_url)
                await connection.execute(sa.text(statement))

        task = asyncio.ensure_future(work())
        await begun.wait()
        if statement != "SELECT 1":
            await asyncio.sleep(0)
            await cut_all(postgres_url)
        with pytest.raises(AWAY):
            await task
        async with engine.connect() as connection:
            assert await connection.scalar(sa.text("SELECT 2")) == 2
        await engine.dispose()

    asyncio.run(scenario())


def test_a_mistake_is_still_a_mistake(postgres_url: str) -> None:
    async def scenario() -> None:
        engine = make_engine(postgres_url)
        try:
            async with engine.connect() as connection:
                with pytest.raises(sa.exc.ProgrammingError):
                    await connection.execute(sa.text("SELECT nothing FROM nowhere"))
                await connection.rollback()
                await connection.execute(sa.text("SET statement_timeout = 50"))
                with pytest.raises(sa.exc.DBAPIError) as caught:
                    await connection.execute(sa.text("SELECT pg_sleep(30)"))
                assert not isinstance(caught.value, AWAY)
        finally:
            await engine.dispose()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "place", ["postgresql://x@/x?host=/nonexistent", "postgresql://x@127.0.0.1:1/x"], ids=["socket", "port"]
)
def test_a_server_that_is_not_there(place: str) -> None:
    async def scenario() -> None:
        with pytest.raises(AWAY):
            async with make_engine(place).connect():
                pass

    asyncio.run(scenario())


def test_a_database_that_does_not_exist(postgres_url: str) -> None:
    async def scenario() -> None:
        with pytest.raises(sa.exc.OperationalError, match="does not exist"):
            async with make_engine(sa.make_url(postgres_url).set(database="gone").render_as_string(False)).connect():
                pass

    asyncio.run(scenario())


def test_hints_come_again_after_a_cut(postgres_url: str) -> None:
    async def scenario() -> None:
        engine = make_engine(postgres_url)
        hints = Hints(engine, retry_s=0.05)
        topics: list[str] = []
        hints.subscribe(topics.append)
        task = asyncio.ensure_future(hints.run())
        try:
            await eventually(lambda: topics == [""], "it listens")
            await cut_all(postgres_url)
            await eventually(lambda: topics == ["", ""], "it listens again, and says that hints may have been missed")
            async with engine.begin() as connection:
                await connection.execute(sa.text("SELECT pg_notify('slmfleet', 'spec')"))
            await eventually(lambda: topics[-1] == "spec", "hints arrive")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await engine.dispose()

    asyncio.run(scenario())
