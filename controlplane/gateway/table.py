"""From rows to what a ``model`` in a request can name (pure).

Names: ``agent/<agent>`` (all deployments of that agent), a deployment's name, and of deployments of a bare model
``<model>`` and ``<model>@<version>``. Where a bare name is both a deployment and a model, the deployment wins. A model
that is in the fleet only for an agent's sake can't be called here: the agent's limits would not hold.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.db.routes import DeploymentRow, ReplicaRow

_DOWN = frozenset({"suspect", "disconnected", "lost"})
_NO_NEW_WORK = frozenset({"draining", "drained"})


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica as the database knows it; ``state`` says why it is not ready, ``offline`` why it can't be reached."""

    id: str
    deployment: str
    node_id: str
    node: str
    ready: bool
    warm: bool
    state: str
    offline: str


@dataclass(frozen=True, slots=True)
class Target:
    """Something that can be asked."""

    name: str
    created_s: int
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All targets by name. ``listed``: those that ``GET /v1/models`` shows, sorted."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    listed: tuple[Target, ...] = ()

    def near(self, name: str) -> list[str]:
        """Up to three known names that ``name`` may have been meant to be."""
        return difflib.get_close_matches(name, list(self.targets), n=3)


def build(deployments: Iterable[DeploymentRow], replicas: Iterable[ReplicaRow]) -> RoutingTable:
    """The table; the order of the rows does not matter."""
    by_deployment: dict[str, list[Replica]] = defaultdict(list)
    for replica in replicas:
        by_deployment[replica.deployment].append(_replica(replica))
    named: dict[str, list[DeploymentRow]] = defaultdict(list)
    hidden: dict[str, list[DeploymentRow]] = defaultdict(list)
    exposed = [row for row in deployments if row.exposed]
    for row in exposed:
        if row.agent is not None:
            named[f"agent/{row.agent}"].append(row)
        elif row.model is not None:
            named[row.model].append(row)
            hidden[f"{row.model}@{row.model_version}"].append(row)
    # Last, so that a deployment's name wins over a model's.
    named |= {row.name: [row] for row in exposed}
    listed = tuple(_target(name, named[name], by_deployment) for name in sorted(named))
    targets = {name: _target(name, rows, by_deployment) for name, rows in hidden.items()}
    return RoutingTable(targets | {target.name: target for target in listed}, listed)


def _target(name: str, rows: list[DeploymentRow], by_deployment: Mapping[str, list[Replica]]) -> Target:
    replicas = sorted((one for row in rows for one in by_deployment.get(row.name, ())), key=lambda one: one.id)
    return Target(name, min(row.created_s for row in rows), tuple(replicas))


def _replica(row: ReplicaRow) -> Replica:
    takes_work = row.node_state not in _NO_NEW_WORK
    return Replica(
        id=row.id,
        deployment=row.deployment,
        node_id=row.node_id,
        node=row.node,
        ready=row.ready and takes_work,
        warm=row.warm,
        state=_state(row) if takes_work else row.node_state,
        offline=row.node_state if row.node_state in _DOWN else "not connected here",
    )


def _state(row: ReplicaRow) -> str:
    if row.degraded:
        return "degraded"
    if row.bytes_total > row.bytes_done:
        return f"downloading {100 * row.bytes_done // row.bytes_total} %"
    return "starting"
