"""Keeps the routing table fresh: loads it on hints, and each second whether hints come or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import routes
from controlplane.db.engine import Hints
from controlplane.gateway.table import RoutingTable, build
from slmfleet import logs

log = logs.get(__name__)

# Hints that arrive together cause one load.
_GATHER_S = 0.02


class Routes:
    """The newest table. While Postgres is away the last one stays in use: links are known without it."""

    def __init__(
        self, engine: AsyncEngine, hints: Hints, *, period_s: float, changed: Callable[[RoutingTable], None]
    ) -> None:
        self._engine = engine
        self._period_s = period_s
        self._changed = changed
        self._wake = asyncio.Event()
        # None until it was loaded for the first time.
        self.table: RoutingTable | None = None
        hints.subscribe(lambda _topic: self._wake.set())

    async def refresh(self) -> None:
        """Load the table now."""
        async with self._engine.connect() as connection:
            deployments, replicas = await routes.load(connection)
        self.table = build(deployments, replicas)
        self._changed(self.table)

    async def run(self) -> None:
        """Keep it fresh until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.refresh()
            except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
                log.warning("cannot load routes, the last ones stay in use", error=error)
            except Exception:
                # Edge of the loop: the gateway goes on with the table that it has.
                log.error("cannot load routes", exc_info=True)
            try:
                async with asyncio.timeout(self._period_s):
                    await self._wake.wait()
                await asyncio.sleep(_GATHER_S)
            except TimeoutError:
                pass
