"""Alembic migrations of the control plane's database, run by ``controlplane.db.migrate`` (there is no alembic.ini)."""
