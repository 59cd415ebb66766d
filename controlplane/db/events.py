"""What happened, for people: ``fleetctl describe`` shows the newest events of an object."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import tables


async def record(connection: AsyncConnection, severity: str, object_: str, reason: str, message: str) -> None:
    """An event of ``object_`` (``node/edge-1``). ``severity``: info, warning, error; ``reason`` is CamelCase;
    ``message`` a sentence, never a prompt or an answer."""
    await connection.execute(
        sa.insert(tables.events).values(severity=severity, object=object_, reason=reason, message=message)
    )
