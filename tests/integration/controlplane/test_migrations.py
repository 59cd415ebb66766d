"""Migrations on a real PostgreSQL: up, held against the tables, down; newer and older schemas; two programs at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
from collections.abc import Callable
from typing import TypeVar

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from controlplane.db import migrate, tables
from controlplane.db.engine import make_engine
from slmfleet.errors import UsageError, UserError

pytestmark = pytest.mark.postgres
Value = TypeVar("Value")


def in_database(url: str, action: Callable[[sa.Connection], Value]) -> Value:
    async def run() -> Value:
        engine = make_engine(url)
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(action)
        finally:
            await engine.dispose()

    return asyncio.run(run())


def table_names(connection: sa.Connection) -> list[str]:
    return sa.inspect(connection).get_table_names()


def test_an_empty_database_comes_to_the_head(postgres_url: str) -> None:
    assert migrate.current(postgres_url) is None
    assert migrate.upgrade(postgres_url) == ""
    assert migrate.current(postgres_url) == migrate.head()
    migrate.check(postgres_url)
    assert migrate.upgrade(postgres_url) == migrate.head()


def test_the_head_is_what_the_tables_say(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)

    def difference(connection: sa.Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, tables.metadata))

    assert in_database(postgres_url, difference) == []


def test_a_new_database_has_a_timeline_of_its_own(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    query = sa.select(tables.settings.c.value).where(tables.settings.c.key == "timeline")
    first = in_database(postgres_url, lambda connection: connection.scalar(query))
    migrate.downgrade(postgres_url, "base")
    migrate.upgrade(postgres_url)
    second = in_database(postgres_url, lambda connection: connection.scalar(query))
    assert first is not None
    assert second is not None
    assert first != second


def test_down_to_base_leaves_nothing(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    migrate.downgrade(postgres_url, "base")
    assert in_database(postgres_url, table_names) == ["alembic_version"]
    assert migrate.current(postgres_url) is None


def test_a_newer_schema_is_refused_and_left_alone(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    in_database(
        postgres_url, lambda connection: connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    )
    for act in (migrate.upgrade, migrate.check):
        with pytest.raises(UsageError, match=r"schema 9999, which controlplane .* does not know") as refusal:
            act(postgres_url)
        assert refusal.value.exit_code == 2
    assert migrate.current(postgres_url) == "9999"


def test_an_older_schema_is_told_what_to_run(postgres_url: str) -> None:
    with pytest.raises(UserError, match="run `controlplane migrate`") as error:
        migrate.check(postgres_url)
    assert error.value.exit_code == 1


def test_programs_that_start_together_migrate_once(postgres_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        for outcome in [pool.submit(migrate.upgrade, postgres_url) for _ in range(3)]:
            outcome.result(timeout=60)
    assert migrate.current(postgres_url) == migrate.head()


def test_a_database_that_is_not_there_is_one_sentence(tmp_path: object) -> None:
    with pytest.raises(UserError, match="cannot reach the database at postgresql://someone:") as error:
        migrate.upgrade(f"postgresql://someone:hush@/nothing?host={tmp_path}")
    assert "hush" not in str(error.value)
    assert "\n" not in str(error.value)
