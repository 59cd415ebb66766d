"""The audit trail: one row for each write, in the transaction of the write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables


async def record(
    connection: AsyncConnection, actor: str, action: str, object_: str, detail: Mapping[str, Any] | None = None
) -> None:
    """``actor`` did ``action`` to ``object_`` (``deployment/greeter``). ``detail`` never holds secrets or content."""
    await connection.execute(
        sa.insert(tables.audit).values(actor=actor, action=action, object=object_, detail=dict(detail or {}))
    )
