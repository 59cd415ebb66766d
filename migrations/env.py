"""Alembic's entry point. ``controlplane.db.migrate`` hands the open connection over in ``config.attributes``."""

from __future__ import annotations

from alembic import context

from controlplane.db import tables

# Any number: it only has to be the same in every program that migrates one database.
_LOCK = 0x736C6D66


def run() -> None:
    """Run the asked-for migrations in one transaction, one program at a time."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=tables.metadata, compare_server_default=True)
    with context.begin_transaction():
        # Two replicas that start together would both see an empty database: the second waits here.
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        context.run_migrations()


run()
