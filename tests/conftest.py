"""Fixtures for the whole suite: real servers, started when the first test asks, stopped after the last."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support import mqtt as mqtt_support
from tests.support import postgres as postgres_support
from tests.support.mqtt import Mqtt
from tests.support.postgres import Databases

# Read when gRPC starts. Tests fork children while a gRPC server runs here; with fork support the child would first
# wake that server's event engine, which now and then ends it before exec.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

POSTGRES = pytest.StashKey[postgres_support.Source]()
MQTT = pytest.StashKey[mqtt_support.Source]()


def pytest_configure(config: pytest.Config) -> None:
    """Choose the servers once, before anything runs."""
    config.stash[POSTGRES] = postgres_support.choose()
    config.stash[MQTT] = mqtt_support.choose()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which servers the suite will use."""
    return [f"postgres: {config.stash[POSTGRES].description}", f"mqtt: {config.stash[MQTT].description}"]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a program's ``main`` did to the root logger: its handler writes to a stream that ends with its test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder for an embedded PostgreSQL, whose user (under root) must be able to cross all parents.

    Not ``tmp_path``: every start of pytest closes the folder above it to others, also for tests that run elsewhere.
    """
    with tempfile.TemporaryDirectory(prefix="slmfleet-test-", ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config) -> Iterator[Databases]:
    """The session's PostgreSQL server."""
    with pytestconfig.stash[POSTGRES].run() as admin_url:
        yield Databases(admin_url)


@pytest.fixture
def postgres_url(databases: Databases) -> Iterator[str]:
    """``postgresql://`` URL of a fresh, empty database."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture(scope="session")
def migrated_template(databases: Databases) -> Iterator[str]:
    """Name of a database at migration head, to copy."""
    from controlplane.db.migrate import upgrade

    url = databases.create()
    upgrade(url)
    name = sa.make_url(url).database
    assert name is not None
    yield name
    databases.drop(url)


@pytest.fixture
def migrated_postgres_url(databases: Databases, migrated_template: str) -> Iterator[str]:
    """``postgresql://`` URL of a fresh database at migration head."""
    url = databases.create(migrated_template)
    yield url
    databases.drop(url)


@pytest.fixture(scope="session")
def mqtt(pytestconfig: pytest.Config) -> Iterator[Mqtt]:
    """The session's broker. Retained messages outlive a test: use a node id of your own."""
    with pytestconfig.stash[MQTT].run() as broker:
        yield broker
