"""Why a deployment runs where it runs: a sentence for each node. The answer to ``GET deployments/{name}/explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.domain.candidates import Fit, Ledger, reject_static
from controlplane.domain.failover import Storm
from controlplane.domain.fleet import Deployment, Fleet, Node, Replica, effective_revision
from controlplane.domain.placement import Keep, Place, Plan, Remove, Revise, plan


@dataclass(frozen=True, slots=True)
class Explanation:
    """``chosen``: the node holds a replica, or will with the next plan. ``score``: 0 to 1, None where it is no
    candidate."""

    node: str
    chosen: bool
    reason: str
    score: float | None = None


def explain(name: str, fleet: Fleet, storms: Sequence[Storm] = ()) -> tuple[Explanation, ...]:
    """All nodes by name. Raises KeyError when there is no deployment ``name``."""
    deployment = {item.name: item for item in fleet.deployments}[name]
    made = plan(fleet.deployments, fleet.nodes, fleet.replicas, fleet.now, storms)
    nodes = {node.id: node for node in fleet.nodes}
    ledger = Ledger({item.name: item for item in fleet.deployments}, nodes, fleet.replicas)
    held = {replica.node_id: replica for replica in fleet.replicas if replica.deployment == name}
    return tuple(
        _explain_node(deployment, node, made, ledger, held.get(node.id))
        for node in sorted(fleet.nodes, key=lambda node: node.name)
    )


def _explain_node(
    deployment: Deployment, node: Node, made: Plan, ledger: Ledger, replica: Replica | None
) -> Explanation:
    if replica is not None:
        return _explain_holder(node, made, replica)
    for action in made.actions:
        if isinstance(action, Place) and action.deployment == deployment.name and action.node_id == node.id:
            return Explanation(node.name, True, f"will be placed: {action.reason}")
    revision = effective_revision(deployment, node)
    if deployment.blocked or revision is None or revision.not_ready:
        reason = deployment.blocked or (revision.not_ready if revision else "it has no revision yet")
        return Explanation(node.name, False, f"nothing can be placed: {reason}")
    judged = reject_static(deployment, revision, node) or ledger.judge(deployment, revision, node)
    if isinstance(judged, Fit):
        return Explanation(
            node.name, False, f"could take a replica, and none is missing: {judged.sentence}", judged.score
        )
    return Explanation(node.name, False, judged.sentence)


def _explain_holder(node: Node, made: Plan, replica: Replica) -> Explanation:
    for action in made.actions:
        if isinstance(action, Keep | Remove | Revise) and action.replica_id == replica.id:
            chosen = not isinstance(action, Remove)
            verb = "will be removed: " if isinstance(action, Remove) else ""
            placed = f" (placed: {replica.reason})" if replica.reason else ""
            return Explanation(node.name, chosen, f"{verb}{action.reason}{placed}")
    return Explanation(node.name, True, replica.reason)
