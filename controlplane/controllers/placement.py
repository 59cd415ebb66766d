"""Carries out the placement plan: replicas, ``deployments.status``, events."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from controlplane.controllers.base import Controller
from controlplane.controllers.leadership import Leadership
from controlplane.db import assignments, fleet, leaders
from controlplane.db.engine import hint
from controlplane.domain.failover import FailoverPolicy, Storm, storms_of
from controlplane.domain.fleet import Deployment, Fleet
from controlplane.domain.liveness import NodeState
from controlplane.domain.placement import Keep, Place, Plan, Remove, Revise, plan
from slmfleet import logs

log = logs.get(__name__)


class PlacementController(Controller):
    """See ``controlplane/domain/placement.py`` for what it decides."""

    name = "placement"

    def __init__(
        self, engine: AsyncEngine, leadership: Leadership, policy: FailoverPolicy, max_replicas: int = 0
    ) -> None:
        super().__init__(engine, leadership)
        self._policy = policy
        self._max_replicas = max_replicas
        # Those that were told; a new leader tells them once more.
        self._storms: set[Storm] = set()

    async def reconcile(self, epoch: int) -> float | None:
        """One plan, applied in one transaction."""
        snapshot, old = await self._load()
        storms = storms_of(snapshot.nodes, self._policy)
        # In a thread, so that sessions go on while a large fleet is planned.
        made = await asyncio.to_thread(
            plan, snapshot.deployments, snapshot.nodes, snapshot.replicas, snapshot.now, storms
        )
        statuses = {
            deployment.name: status
            for deployment in snapshot.deployments
            if (status := status_of(deployment, snapshot, made)) != old.get(deployment.name)
        }
        alarms = [storm for storm in storms if storm not in self._storms and _holds_back(storm, snapshot)]
        if made.changes or statuses or alarms:
            async with leaders.fenced(self._engine, self.name, epoch) as connection:
                await _apply(connection, made)
                await assignments.write_statuses_of_deployments(connection, statuses)
                events = [*_change_events(made), *_unplaced_events(statuses, old)]
                events += [("error", "fleet", "ReplacementFrozen", storm.reason) for storm in alarms]
                await assignments.record_events(connection, events)
        self._storms = {storm for storm in storms if storm in self._storms or storm in alarms}
        if made.changes:
            log.info(
                "placement plan applied",
                placed=sum(isinstance(action, Place) for action in made.changes),
                removed=sum(isinstance(action, Remove) for action in made.changes),
                revised=sum(isinstance(action, Revise) for action in made.changes),
                unplaced=sum(item.count for item in made.unplaced),
            )
        return None

    async def _load(self) -> tuple[Fleet, dict[str, dict[str, Any]]]:
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            snapshot = await fleet.load_fleet(connection, self._max_replicas)
            return snapshot, await assignments.statuses_of_deployments(connection)


def _holds_back(storm: Storm, snapshot: Fleet) -> bool:
    """Whether a node of the storm would be replaced by now. Until then it may be our own restart."""
    return any(node.state is NodeState.LOST and storm.took(node.silent_since) for node in snapshot.nodes)


_VERBS = {Place: "Placed", Remove: "Removed", Revise: "Revised"}


async def _apply(connection: AsyncConnection, made: Plan) -> None:
    removals = [action for action in made.changes if isinstance(action, Remove)]
    revisions = [action for action in made.changes if isinstance(action, Revise)]
    placements = [(str(uuid.uuid4()), action) for action in made.changes if isinstance(action, Place)]
    if removals:
        await assignments.remove(connection, removals)
    if revisions:
        await assignments.revise(connection, revisions)
    if placements:
        await assignments.place(connection, placements)
    if made.changes:
        await hint(connection, "spec")


def status_of(deployment: Deployment, snapshot: Fleet, made: Plan) -> dict[str, Any]:
    """``deployments.status``: how the deployment stands after the plan. Counts are of replicas that can be reached."""
    nodes = {node.id: node for node in snapshot.nodes}
    mine = [replica for replica in snapshot.replicas if replica.deployment == deployment.name]
    acts = [action for action in made.actions if action.deployment == deployment.name]
    removed = {action.replica_id for action in acts if isinstance(action, Remove)}
    placed = len(mine) - len(removed) + sum(isinstance(action, Place) for action in acts)
    up = [replica for replica in mine if replica.node_id in nodes and replica.serves(nodes[replica.node_id])]
    current = [replica for replica in up if replica.id not in removed and replica.observed_revision == replica.revision]
    troubled = [
        f"{nodes[item.node_id].name}: {item.trouble}" for item in mine if item.trouble and item.node_id in nodes
    ]
    unplaced = [
        {"count": item.count, "reason": item.reason} for item in made.unplaced if item.deployment == deployment.name
    ]
    desired = dict(made.desired).get(deployment.name, 0)
    return {
        "revision": deployment.current_revision,
        "desired": desired,
        "placed": placed,
        "ready": len(current),
        "warm": sum(replica.warm for replica in current),
        "unplaced": unplaced,
        "message": _message(desired, len(current), [str(item["reason"]) for item in unplaced], acts, sorted(troubled)),
    }


def _message(desired: int, ready: int, unplaced: list[str], acts: list[Any], troubled: list[str]) -> str:
    waiting = [action.reason for action in acts if isinstance(action, Keep) and "it stays:" in action.reason]
    count = [f"{ready} of {desired} replicas are ready"] if ready < desired else []
    more = f" (and {len(troubled) - 1} more like it)" if len(troubled) > 1 else ""
    return "; ".join([*(unplaced or waiting or count)[:1], *(f"{text}{more}" for text in troubled[:1])])


def _change_events(made: Plan) -> list[tuple[str, str, str, str]]:
    events = []
    for action in made.changes:
        verb = _VERBS[type(action)]
        message = f"{verb.lower()} on {action.node}: {action.reason}"
        if isinstance(action, Revise):
            message = f"revised on {action.node}: {action.reason}"
        events.append(("info", f"deployment/{action.deployment}", f"Replica{verb}", message))
        events.append(("info", f"node/{action.node}", f"Replica{verb}", f"deployment {action.deployment}: {message}"))
    return events


def _unplaced_events(
    statuses: Mapping[str, Mapping[str, Any]], old: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, str, str]]:
    """One event when what can't be placed, or why, has changed."""
    return [
        ("warning", f"deployment/{name}", "Unplaced", f"{item['count']} could not be placed: {item['reason']}")
        for name, status in statuses.items()
        if status["unplaced"] != old.get(name, {}).get("unplaced", [])
        for item in status["unplaced"]
    ]
