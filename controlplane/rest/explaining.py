"""Why a deployment runs where it runs: the placement planner is asked now, on what is stored now."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import fleet
from controlplane.domain.explain import explain
from controlplane.domain.failover import FailoverPolicy, storms_of


class PlanExplainer:
    """Answers from a plan that is never carried out. ``policy`` and ``max_replicas`` as the placement controller has
    them."""

    def __init__(self, engine: AsyncEngine, policy: FailoverPolicy | None = None, max_replicas: int = 0) -> None:
        self._engine = engine
        self._policy = policy or FailoverPolicy()
        self._max_replicas = max_replicas

    async def explain(self, name: str) -> list[dict[str, Any]]:
        """``{node, chosen, reason, score}`` for each node, by name. Raises KeyError when there is no deployment."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            snapshot = await fleet.load_fleet(connection, self._max_replicas)
        storms = storms_of(snapshot.nodes, self._policy)
        # In a thread: planning for a large fleet takes long enough to be felt by others.
        found = await asyncio.to_thread(explain, name, snapshot, storms)
        return [dataclasses.asdict(item) for item in found]
