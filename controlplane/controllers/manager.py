"""All controllers of one control-plane process, and the lease that says that the process lives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.artifacts.sources import default_cache
from controlplane.artifacts.store import BlobStore
from controlplane.controllers.base import Controller, Counters
from controlplane.controllers.desired_state import DesiredStateController
from controlplane.controllers.leadership import DATABASE_AWAY, Leadership
from controlplane.controllers.liveness import LivenessController
from controlplane.controllers.models import ModelImportController
from controlplane.controllers.placement import PlacementController
from controlplane.db import leaders
from controlplane.db.engine import Hints
from controlplane.domain.failover import FailoverPolicy
from controlplane.domain.liveness import LivenessPolicy
from slmfleet import logs
from slmfleet.v1 import state_pb2

log = logs.get(__name__)


class Controllers:
    """Runs every controller; each leads, or waits until it may.

    ``prepare`` must have ended before nodes are let in: sessions name a replica that has to be known. ``settings`` are
    the fleet's node settings; ``ca_pem`` the authorities that nodes are told to trust.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        hints: Hints,
        replica_id: str,
        policy: LivenessPolicy,
        blob_store: BlobStore,
        *,
        ca_pem: Sequence[str] = (),
        cache: Path | None = None,
        settings: state_pb2.NodeSettings | None = None,
        failover: FailoverPolicy | None = None,
        max_replicas_per_node: int = 0,
    ) -> None:
        self._engine = engine
        self._hints = hints
        self._replica_id = replica_id
        self._policy = policy
        self._store = blob_store
        self._ca_pem = ca_pem
        self._cache = default_cache() if cache is None else cache
        self._settings = settings or state_pb2.NodeSettings()
        self._failover = failover or FailoverPolicy()
        self._max_replicas = max_replicas_per_node
        self._controllers: tuple[Controller, ...] = ()
        self._timeline: str | None = None

    @property
    def counters(self) -> Mapping[str, Counters]:
        """How the loops fare, by controller."""
        return {controller.name: controller.counters for controller in self._controllers}

    async def prepare(self) -> str:
        """Register this process and make sure that the fleet has a timeline; returns the timeline. Once a process."""
        if not self._timeline:
            async with self._engine.begin() as connection:
                await leaders.start_replica(connection, self._replica_id, self._policy.ttl_s)
                self._timeline = await leaders.ensure_timeline(connection)
        return self._timeline

    async def run(self) -> None:
        """Control until cancelled."""
        timeline = await self.prepare()
        self._controllers = self._make(timeline)
        for controller in self._controllers:
            self._hints.subscribe(controller.on_hint)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_lease(), name="replica-lease")
                for controller in self._controllers:
                    group.create_task(controller.run(), name=f"controller-{controller.name}")
        finally:
            with contextlib.suppress(TimeoutError, *DATABASE_AWAY):
                async with asyncio.timeout(2.0), self._engine.begin() as connection:
                    await leaders.end_replica(connection, self._replica_id)

    def _make(self, timeline: str) -> tuple[Controller, ...]:
        def lead(controller: type[Controller]) -> Leadership:
            return Leadership(self._engine, controller.name, self._replica_id, self._policy.ttl_s)

        return (
            LivenessController(self._engine, lead(LivenessController), self._policy),
            PlacementController(self._engine, lead(PlacementController), self._failover, self._max_replicas),
            DesiredStateController(self._engine, lead(DesiredStateController), timeline, self._settings, self._ca_pem),
            ModelImportController(self._engine, lead(ModelImportController), self._store, self._cache),
        )

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._policy.ttl_s / 3)
            try:
                async with self._engine.begin() as connection:
                    await leaders.keep_replica(connection, self._replica_id, self._policy.ttl_s)
            except DATABASE_AWAY as error:
                log.warning("cannot renew the lease of this process", error=error)
