"""API keys outside of REST: the first one of an installation, and those that an operator makes on the server."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane import datafolder
from controlplane.db import api_keys
from controlplane.db.engine import make_engine
from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)
ADMIN = "admin"


async def ensure_admin(engine: AsyncEngine, folder: Path, *, own_database: bool) -> Path | None:
    """See that there is a first API key; the file that holds it, or None when it was made elsewhere.

    A key that is in the file and good is left alone. With a database of our own (``own_database``) a lost file means a
    new secret; with a shared one the key may be another replica's, and is left to ``controlplane key admin``.
    """
    kept = datafolder.read_admin_token(folder)
    async with engine.begin() as connection:
        if kept and await api_keys.find(connection, api_keys.hash_secret(kept)) is not None:
            return folder / "admin.token"
        if own_database:
            secret = await api_keys.replace(connection, ADMIN, ADMIN)
        else:
            made = await api_keys.create(connection, ADMIN, ADMIN)
            if made is None:
                log.info("an admin key exists; `controlplane key admin` gives it a new secret")
                return None
            _, secret = made
        # Before the commit: a crash in between leaves a key that nobody accepts, and the next start makes another.
        datafolder.write_admin_token(folder, secret)
    return folder / "admin.token"


async def new_key(url: str, name: str, role: str) -> str:
    """Make the key ``name`` or give it a new secret; the secret. Raises UserError when the database can't be asked."""
    engine = make_engine(url, pool_size=1)
    try:
        async with engine.begin() as connection:
            return await api_keys.replace(connection, name, role)
    except (OSError, sa.exc.SQLAlchemyError, asyncpg.PostgresError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot make the key: the database does not answer ({reason}); start `controlplane dev`, "
            "or give --postgres-url"
        ) from None
    finally:
        await engine.dispose()
