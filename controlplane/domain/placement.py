"""Which replica runs where: ``plan(deployments, nodes, replicas, now, storms) -> Plan``.

For ``replicas: N`` each existing replica is either a *stayer* or a *leaver*:

* a stayer's node matches the selector and can load the model, is not drained and not lost (or lost while
  ``onDisconnect: keep`` or a storm holds replacement back). Suspect and disconnected nodes keep their replicas.
* a leaver's replica is wanted elsewhere. If stayers are fewer than N, new replicas are placed; a leaver goes when its
  replacement serves, so that the count of serving replicas never falls for a move's sake. A lost node that comes back
  before that is a stayer again, and its half-made replacement goes (not-ready first); if the replacement serves by
  then, the original has been taken off already: the work does not move twice.

A leaver that must not serve (its labels no longer match, or it cannot load the model) stays only while a replacement
is on its way; where none can be placed it goes at once. Surplus stayers go in the order: not serving first, then those
on lost nodes, then the newest. Working replicas are never moved for a better score.

``every_node``: one replica on each node that matches and can load the model, whether it is here or away.

Applying a plan and planning again gives an empty plan, and so does any order of the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controlplane.domain.candidates import Filter, Fit, Ledger, Rejection, reject_static
from controlplane.domain.failover import Storm
from controlplane.domain.fleet import Deployment, Node, Replica, Revision, effective_revision
from controlplane.domain.liveness import NodeState


@dataclass(frozen=True, slots=True)
class Place:
    """Make a new replica."""

    deployment: str
    revision: int
    node_id: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Revise:
    """Move a replica to another revision where it is."""

    replica_id: str
    deployment: str
    revision: int
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Take a replica off."""

    replica_id: str
    deployment: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave a replica as it is."""

    replica_id: str
    deployment: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unplaced:
    """``count`` replicas of a deployment that can't be placed now, and why."""

    deployment: str
    count: int
    reason: str


Action = Place | Revise | Remove | Keep


@dataclass(frozen=True, slots=True)
class Plan:
    """``desired``: how many replicas each deployment should have (for every_node: the nodes that match)."""

    actions: tuple[Action, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    desired: tuple[tuple[str, int], ...] = ()

    @property
    def changes(self) -> tuple[Place | Revise | Remove, ...]:
        """The actions that do something. Removals first: they free what placements take."""
        order = {Remove: 0, Revise: 1, Place: 2}
        acts = [action for action in self.actions if not isinstance(action, Keep)]
        return tuple(sorted(acts, key=lambda action: order[type(action)]))


def plan(
    deployments: Iterable[Deployment],
    nodes: Iterable[Node],
    replicas: Iterable[Replica],
    now: float,
    storms: Sequence[Storm] = (),
) -> Plan:
    """What to do next. ``now``: seconds since 1970, for the reasons that tell how long something lasts."""
    by_name = {deployment.name: deployment for deployment in sorted(deployments, key=lambda item: item.name)}
    by_id = {node.id: node for node in sorted(nodes, key=lambda item: (item.name, item.id))}
    ordered = sorted(replicas, key=lambda item: (item.created_at, item.id))
    freed: frozenset[str] = frozenset()
    while True:
        # What a removal frees may be taken in the same plan, by whichever deployment comes first. `freed` only grows,
        # so this ends; mostly after one round, or two.
        ledger = Ledger(by_name, by_id, [replica for replica in ordered if replica.id not in freed])
        made = _Planner(by_name, by_id, ordered, ledger, now, storms).run()
        removed = {action.replica_id for action in made.actions if isinstance(action, Remove)}
        if removed <= freed:
            return made
        freed |= removed


class _Planner:
    """One run of ``plan``: the snapshot, and the plan as it grows."""

    def __init__(
        self,
        deployments: dict[str, Deployment],
        nodes: dict[str, Node],
        replicas: Sequence[Replica],
        ledger: Ledger,
        now: float,
        storms: Sequence[Storm],
    ) -> None:
        self._deployments, self._nodes, self._replicas = deployments, nodes, replicas
        self._ledger = ledger
        self._now, self._storms = now, storms
        self._actions: list[Action] = []
        self._unplaced: list[Unplaced] = []
        self._desired: list[tuple[str, int]] = []

    def run(self) -> Plan:
        """Plan each deployment by name, then what belongs to none."""
        for deployment in self._deployments.values():
            self._deployment(deployment)
        for replica in self._replicas:
            if replica.deployment not in self._deployments:
                self._remove(replica, "its deployment was deleted")
        return Plan(tuple(self._actions), tuple(self._unplaced), tuple(self._desired))

    def _deployment(self, deployment: Deployment) -> None:
        """One deployment: first its nodes that are gone, then by mode."""
        mine = [replica for replica in self._replicas if replica.deployment == deployment.name]
        for replica in mine:
            if replica.node_id not in self._nodes:
                self._remove(replica, "its node was removed from the fleet")
        present = [replica for replica in mine if replica.node_id in self._nodes]
        revision = effective_revision(deployment)
        if revision is None or deployment.blocked or revision.not_ready:
            self._hold(deployment, present, revision)
        elif deployment.mode == "every_node":
            self._every_node(deployment, revision, present)
        else:
            self._replicated(deployment, revision, present)

    def _hold(self, deployment: Deployment, present: list[Replica], revision: Revision | None) -> None:
        """Nothing can be placed: what runs goes on."""
        reason = deployment.blocked or (revision.not_ready if revision else "it has no revision yet")
        for replica in present:
            self._keep(replica, f"held as it is: {reason}")
        wanted = deployment.replicas if deployment.mode == "replicas" else len(self._matching(deployment))
        self._desired.append((deployment.name, wanted))
        if wanted > len(present):
            self._unplaced.append(Unplaced(deployment.name, wanted - len(present), reason))

    # --- replicas: N ---------------------------------------------------------------------------------------------

    def _replicated(self, deployment: Deployment, revision: Revision, present: list[Replica]) -> None:
        leaving = {replica.id: self._leave_reason(deployment, revision, replica) for replica in present}
        stayers = [replica for replica in present if leaving[replica.id] is None]
        leavers = [replica for replica in present if leaving[replica.id] is not None]
        self._desired.append((deployment.name, deployment.replicas))

        surplus = sorted(stayers, key=self._removal_order)[: max(len(stayers) - deployment.replicas, 0)]
        for replica in surplus:
            self._remove(replica, f"{deployment.replicas} replicas are wanted, and {len(stayers)} were there")
        stayers = [replica for replica in stayers if replica not in surplus]
        for replica in stayers:
            self._stay(deployment, replica)

        why = next((reason for reason in leaving.values() if reason is not None), None)
        placed = self._place_missing(
            deployment, revision, deployment.replicas - len(stayers), present, why.sentence if why else ""
        )
        serving = sum(self._serves(replica) for replica in stayers)
        pending = len(stayers) - serving + placed
        self._leavers(leavers, leaving, deployment.replicas - serving, pending)

    def _leave_reason(self, deployment: Deployment, revision: Revision, replica: Replica) -> Rejection | None:
        """Why the replica is wanted elsewhere; None: it stays."""
        node = self._nodes[replica.node_id]
        if static := reject_static(deployment, revision, node):
            return static
        if node.drained:
            return Rejection(Filter.DRAINED, f"{node.name} is drained")
        if node.state is NodeState.LOST and deployment.on_disconnect == "replace" and not self._storm(node):
            silent = f" (silent for {self._now - node.silent_since:.0f} s)" if node.silent_since else ""
            return Rejection(Filter.STATE, f"{node.name} is lost{silent}")
        return None

    def _leavers(self, leavers: list[Replica], leaving: dict[str, Rejection | None], places: int, pending: int) -> None:
        """Keep those that stand in until their replacements serve: at most ``places``; serving ones first, and of those
        the ones that may stay as long as it takes."""

        def may_wait(replica: Replica) -> bool:
            reason = leaving[replica.id]
            return reason is not None and reason.filter in (Filter.DRAINED, Filter.STATE)

        def order(replica: Replica) -> tuple[bool, bool, float, str]:
            return not self._serves(replica), not may_wait(replica), replica.created_at, replica.id

        for replica in sorted(leavers, key=order):
            reason = leaving[replica.id]
            assert reason is not None
            if places > 0 and (may_wait(replica) or pending > 0):
                places -= 1
                pending -= 1
                self._keep(replica, f"until a replacement serves: {reason.sentence}")
            else:
                self._remove(replica, f"no longer needed here: {reason.sentence}")

    def _place_missing(
        self, deployment: Deployment, revision: Revision, count: int, present: list[Replica], why: str
    ) -> int:
        """Place up to ``count`` replicas on the best nodes; returns how many could be placed."""
        if count <= 0:
            return 0
        # A node takes one replica of a deployment at most, so placing on one changes no other's score.
        fits, rejected = self._candidates(deployment, revision, {replica.node_id for replica in present})
        fits.sort(key=lambda item: (-item[1].score, item[0].name, item[0].id))
        because = f" to replace another: {why}" if why else ""
        for rank, (node, fit) in enumerate(fits[:count]):
            self._place(deployment, revision, node, fit, f"best of {len(fits) - rank}{because}; {fit.sentence}")
            rejected.append(Rejection(Filter.TAKEN, "it takes one in this plan"))
        if count > len(fits):
            reason = _count(rejected, len(self._nodes), "can't take another replica")
            self._unplaced.append(Unplaced(deployment.name, count - len(fits), reason))
        return min(count, len(fits))

    def _candidates(
        self, deployment: Deployment, revision: Revision, holders: set[str]
    ) -> tuple[list[tuple[Node, Fit]], list[Rejection]]:
        fits, rejected = [], []
        for node in self._nodes.values():
            if not deployment.matches(node.labels):
                rejected.append(Rejection(Filter.SELECTOR, "its labels do not match the selector"))
            elif node.id in holders:
                rejected.append(Rejection(Filter.TAKEN, "it runs a replica already"))
            elif isinstance(judged := self._ledger.judge(deployment, revision, node), Fit):
                fits.append((node, judged))
            else:
                rejected.append(judged)
        return fits, rejected

    def _removal_order(self, replica: Replica) -> tuple[bool, bool, float, str]:
        lost = self._nodes[replica.node_id].state is NodeState.LOST
        return self._serves(replica), not lost, -replica.created_at, replica.id

    def _storm(self, node: Node) -> Storm | None:
        return next((storm for storm in self._storms if storm.took(node.silent_since)), None)

    def _serves(self, replica: Replica) -> bool:
        return replica.serves(self._nodes[replica.node_id])

    # --- every_node ----------------------------------------------------------------------------------------------

    def _matching(self, deployment: Deployment) -> list[Node]:
        return [node for node in self._nodes.values() if deployment.matches(node.labels)]

    def _every_node(self, deployment: Deployment, revision: Revision, present: list[Replica]) -> None:
        held = {replica.node_id: replica for replica in present}
        self._desired.append((deployment.name, len(self._matching(deployment))))
        rejected = []
        for node in self._nodes.values():
            static = reject_static(deployment, revision, node)
            if replica := held.get(node.id):
                if static:
                    self._remove(replica, static.sentence)
                else:
                    self._stay(deployment, replica)
            elif not static:
                judged = self._ledger.judge(deployment, revision, node)
                if isinstance(judged, Fit):
                    self._place(deployment, revision, node, judged, "every matching node runs it")
                else:
                    rejected.append(judged)
            elif static.filter is not Filter.SELECTOR:
                rejected.append(static)
        if rejected:
            self._unplaced.append(
                Unplaced(
                    deployment.name, len(rejected), _count(rejected, len(self._matching(deployment)), "can't run it")
                )
            )

    # --- the actions ---------------------------------------------------------------------------------------------

    def _stay(self, deployment: Deployment, replica: Replica) -> None:
        node = self._nodes[replica.node_id]
        revision = effective_revision(deployment, node)
        if revision and revision.number != replica.revision:
            reason = f"revision {replica.revision} became {revision.number}"
            self._actions.append(Revise(replica.id, deployment.name, revision.number, node.name, reason))
            return
        if node.state is NodeState.LOST:
            storm = self._storm(node) if deployment.on_disconnect == "replace" else None
            why = storm.reason if storm else "onDisconnect is keep"
            self._keep(replica, f"its node is lost, and it stays: {why}")
        else:
            self._keep(replica, f"degraded: {replica.trouble}" if replica.trouble else "stays where it is")

    def _place(self, deployment: Deployment, revision: Revision, node: Node, fit: Fit, reason: str) -> None:
        self._ledger.take(deployment, revision, node, fit.variant, staged=False)
        self._actions.append(Place(deployment.name, revision.number, node.id, node.name, reason))

    def _remove(self, replica: Replica, reason: str) -> None:
        node = self._nodes.get(replica.node_id)
        self._actions.append(Remove(replica.id, replica.deployment, node.name if node else replica.node_id, reason))

    def _keep(self, replica: Replica, reason: str) -> None:
        self._actions.append(Keep(replica.id, replica.deployment, reason))


def _count(rejected: list[Rejection], of: int, verb: str) -> str:
    """``3 of 5 nodes can't run it: 2 not selected by its labels, 1 drained``."""
    if not of:
        return "no node is enrolled"
    counts = Counter(rejection.filter for rejection in rejected)
    parts = ", ".join(f"{counts[name]} {name.value}" for name in Filter if counts[name])
    return f"{len(rejected)} of {of} node{'' if of == 1 else 's'} {verb}: {parts}"
