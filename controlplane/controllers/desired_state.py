"""Keeps ``desired_states`` in step with assignments, models, agents, labels and settings of each node."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.controllers.base import Controller
from controlplane.controllers.leadership import Leadership
from controlplane.db import assignments, fleet, leaders
from controlplane.domain.desired import (
    Agent,
    Model,
    assignments_of,
    compile_document,
    serialize,
    warm_replicas,
)
from controlplane.domain.fleet import Fleet, Replica
from slmfleet import logs
from slmfleet.v1 import state_pb2

log = logs.get(__name__)
# Documents a transaction: a change that touches the whole fleet must not hold one for long.
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Ground:
    """All that the documents are made of."""

    fleet: Fleet
    models: Mapping[tuple[str, str], Model]
    agents: Mapping[tuple[str, str], Agent]
    settings: state_pb2.NodeSettings
    ca_pem: Sequence[str]


class DesiredStateController(Controller):
    """See ``controlplane/domain/desired.py`` for what a document holds."""

    name = "desired-state"

    def __init__(
        self,
        engine: AsyncEngine,
        leadership: Leadership,
        timeline: str,
        settings: state_pb2.NodeSettings,
        ca_pem: Sequence[str],
    ) -> None:
        super().__init__(engine, leadership)
        self._timeline = timeline
        self._settings = settings
        self._ca_pem = ca_pem

    async def reconcile(self, epoch: int) -> float | None:
        """Compile every node's document, and store those that differ from what the node was told."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            ground = Ground(
                fleet=await fleet.load_fleet(connection),
                models=await assignments.load_models(connection),
                agents=await assignments.load_agents(connection),
                settings=self._settings,
                ca_pem=self._ca_pem,
            )
            held = await assignments.held_states(connection)
        compiled = await asyncio.to_thread(compile_all, ground)
        changed = [
            state for state in compiled if held.get(state.node_id) != assignments.Held(self._timeline, state.sha256)
        ]
        for start in range(0, len(changed), _AT_ONCE):
            async with leaders.fenced(self._engine, self.name, epoch) as connection:
                await assignments.write_states(connection, self._timeline, changed[start : start + _AT_ONCE])
        if changed:
            log.info("desired states changed", nodes=len(changed))
        return None


def compile_all(ground: Ground) -> list[assignments.Compiled]:
    """The document of every node."""
    snapshot = ground.fleet
    nodes = {node.id: node for node in snapshot.nodes}
    deployments = {deployment.name: deployment for deployment in snapshot.deployments}
    of_node: dict[str, list[Replica]] = {}
    of_deployment: dict[str, list[Replica]] = {}
    for replica in snapshot.replicas:
        of_node.setdefault(replica.node_id, []).append(replica)
        of_deployment.setdefault(replica.deployment, []).append(replica)
    warm = frozenset[str]().union(
        *(warm_replicas(item, of_deployment.get(item.name, ()), nodes) for item in deployments.values())
    )
    compiled = []
    for node in snapshot.nodes:
        mine = assignments_of(node, of_node.get(node.id, ()), deployments, ground.models, warm)
        document = compile_document(node, mine, ground.models, ground.agents, ground.settings, ground.ca_pem)
        data, digest = serialize(document)
        compiled.append(assignments.Compiled(node.id, data, digest))
    return compiled
