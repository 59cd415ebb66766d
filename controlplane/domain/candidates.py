"""Which nodes can take a replica, why the others cannot, and which is best.

Filters are asked in order; the first that says no gives the node's reason. Scores are a weighted sum of fractions, so
that 1.0 is the best of all worlds; the weights are below. Equal scores go to the first name.

Memory: a worker needs its weights and some more (see ``slmfleet/variants.py``, which also says which variant suits a
node best). At most 80 % of a node's memory is given out. Models that stay loaded add up; of those that are loaded on
demand only the largest counts, because the node swaps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controlplane.domain.fleet import (
    Deployment,
    Node,
    Replica,
    Revision,
    Variant,
    effective_revision,
    running_variants,
)
from controlplane.domain.liveness import NodeState
from slmfleet import variants as rule
from slmfleet.units import format_size

MEMORY_SHARE = 0.8
DISK_RESERVE_BYTES = 256 * 2**20
WEIGHT_ON_DISK, WEIGHT_MEMORY, WEIGHT_LOAD = 0.4, 0.3, 0.3


class Filter(StrEnum):
    """What can speak against a node; the value is the word for counts ("2 are drained")."""

    SELECTOR = "not selected by its labels"
    TAKEN = "running it already"
    DRAINED = "drained"
    STATE = "not online"
    FORMAT = "without a backend for its formats"
    MEMORY = "short of memory"
    LIMIT = "at their limit of replicas"
    DISK = "short of disk"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a node cannot take the replica: the filter and a sentence about this node."""

    filter: Filter
    sentence: str


@dataclass(frozen=True, slots=True)
class Fit:
    """The node can take it. ``score`` 0 to 1; ``sentence`` says what it is made of."""

    score: float
    sentence: str
    variant: Variant


def memory_need(variant: Variant) -> int:
    """Bytes that a loaded worker needs; see the module's text."""
    return rule.memory_need(_candidate(variant))


def choose_variant(node: Node, variants: Sequence[Variant], running: str = "") -> Variant | Rejection:
    """The variant that suits the node best, of those that a backend of it can load and that fit its memory alone.

    ``running``: the one that the node runs already; it stays while it fits, since no gain is worth a download. A node
    whose inventory is unknown is not judged.
    """
    fitting = _fitting(node, variants)
    if isinstance(fitting, Rejection):
        return fitting
    kept = next((variant for variant in fitting if variant.name == running), None)
    if kept is not None or len(fitting) == 1:
        return kept or fitting[0]
    formats = frozenset(variant.format for variant in fitting)
    choice = rule.choose_variant([_candidate(variant) for variant in fitting], formats, _hardware(node))
    # All of them can be loaded and fit, so there is always a choice.
    assert isinstance(choice, rule.Choice), choice.reason
    return next(variant for variant in fitting if variant.name == choice.name)


def _fitting(node: Node, variants: Sequence[Variant]) -> Sequence[Variant] | Rejection:
    """Those that a backend of the node can load and that fit its memory alone."""
    loadable = [variant for variant in variants if not node.formats or variant.format in node.formats]
    if not loadable:
        offered = ", ".join(sorted({variant.format for variant in variants})) or "no format"
        has = ", ".join(sorted(node.formats)) or "none"
        return Rejection(Filter.FORMAT, f"the model comes as {offered}, and its backends load {has}")
    limit = node.memory_bytes * MEMORY_SHARE
    fitting = [variant for variant in loadable if not node.memory_bytes or memory_need(variant) <= limit]
    if fitting:
        return fitting
    least = min(map(memory_need, loadable))
    return Rejection(
        Filter.MEMORY,
        f"the model needs {format_size(least)} of memory, and {format_size(limit)} of its "
        f"{format_size(node.memory_bytes)} may be used",
    )


def _candidate(variant: Variant) -> rule.Candidate:
    return rule.Candidate(variant.name, variant.format, variant.quantization, variant.size_bytes)


def _hardware(node: Node) -> rule.Hardware:
    return rule.Hardware(int(node.memory_bytes * MEMORY_SHARE), node.cores, node.accelerators)


@dataclass(slots=True)
class _Use:
    """What one node has taken on: models by what they need, files that are or will be on disk."""

    replicas: int = 0
    warm: dict[str, int] = field(default_factory=dict)
    cold: dict[str, int] = field(default_factory=dict)
    on_disk: set[str] = field(default_factory=set)
    to_fetch: dict[str, int] = field(default_factory=dict)

    def memory(self) -> int:
        cold = [need for model, need in self.cold.items() if model not in self.warm]
        return sum(self.warm.values()) + max(cold, default=0)


class Ledger:
    """What all nodes have taken on; a planner's scratch paper, so that two placements do not spend one free byte."""

    def __init__(
        self, deployments: Mapping[str, Deployment], nodes: Mapping[str, Node], replicas: Iterable[Replica]
    ) -> None:
        self._use: dict[str, _Use] = {node_id: _Use(on_disk=set(node.on_disk)) for node_id, node in nodes.items()}
        held = list(replicas)
        self._running = running_variants(held)
        for replica in held:
            node, deployment = nodes.get(replica.node_id), deployments.get(replica.deployment)
            revision = effective_revision(deployment, node) if deployment and node else None
            if node is None or deployment is None or revision is None:
                continue
            variant = self._choose(revision, node)
            if isinstance(variant, Variant):
                self.take(deployment, revision, node, variant, staged=replica.staged)
            else:
                self._use[node.id].replicas += 1

    def _choose(self, revision: Revision, node: Node) -> Variant | Rejection:
        return choose_variant(node, revision.variants, self._running.get((node.id, revision.title), ""))

    def take(self, deployment: Deployment, revision: Revision, node: Node, variant: Variant, *, staged: bool) -> None:
        """Count a replica of ``revision`` on ``node``."""
        use = self._use[node.id]
        use.replicas += 1
        (use.cold if deployment.warm == 0 else use.warm)[_model(revision, variant)] = memory_need(variant)
        if staged:
            use.on_disk |= set(variant.files)
        else:
            use.to_fetch |= variant.files

    def judge(self, deployment: Deployment, revision: Revision, node: Node) -> Fit | Rejection:
        """The filters from ``state`` on, then the score."""
        if node.drained:
            return Rejection(Filter.DRAINED, "it is drained")
        if node.state is not NodeState.ONLINE:
            return Rejection(Filter.STATE, f"it is {node.state}")
        variant = self._choose(revision, node)
        if isinstance(variant, Rejection):
            return variant
        use = self._use[node.id]
        if node.max_replicas and use.replicas >= node.max_replicas:
            return Rejection(Filter.LIMIT, f"it holds {use.replicas} replicas, and its limit is {node.max_replicas}")
        after = self._memory_after(deployment, revision, node, variant)
        limit = node.memory_bytes * MEMORY_SHARE
        if node.memory_bytes and after > limit:
            return Rejection(
                Filter.MEMORY,
                f"with its other models it would need {format_size(after)} of memory, and {format_size(limit)} of its "
                f"{format_size(node.memory_bytes)} may be used",
            )
        missing = {digest: size for digest, size in variant.files.items() if digest not in use.on_disk}
        queued = sum((use.to_fetch | missing).values())
        free = node.disk_free_bytes
        if free is not None and missing and queued + DISK_RESERVE_BYTES > free:
            return Rejection(
                Filter.DISK,
                f"its disk has {format_size(free)} free, too little for {format_size(queued)} of models to fetch and "
                f"{format_size(DISK_RESERVE_BYTES)} that stay free: make room there",
            )
        return _score(node, use, after, missing, variant)

    def _memory_after(self, deployment: Deployment, revision: Revision, node: Node, variant: Variant) -> int:
        use = self._use[node.id]
        model = {_model(revision, variant): memory_need(variant)}
        after = (
            _Use(warm=use.warm, cold=use.cold | model)
            if deployment.warm == 0
            else _Use(warm=use.warm | model, cold=use.cold)
        )
        return after.memory()


def _score(node: Node, use: _Use, memory_after: int, missing: Mapping[str, int], variant: Variant) -> Fit:
    on_disk = 1 - sum(missing.values()) / variant.size_bytes if variant.size_bytes else 1.0
    headroom = 1 - memory_after / node.memory_bytes if node.memory_bytes else 0.5
    load = 1 / (1 + use.replicas)
    # Rounded, so that equal nodes are equal whatever the order of floating-point sums.
    score = round(WEIGHT_ON_DISK * on_disk + WEIGHT_MEMORY * max(headroom, 0.0) + WEIGHT_LOAD * load, 6)
    sentence = (
        f"{on_disk:.0%} of the model is on its disk, {max(headroom, 0.0):.0%} of its memory stays free, "
        f"{use.replicas} other replica{'' if use.replicas == 1 else 's'}"
    )
    return Fit(score, sentence, variant)


def _model(revision: Revision, variant: Variant) -> str:
    # One worker per model version and variant, whoever uses it.
    return f"{revision.title}/{variant.name}"


def reject_static(deployment: Deployment, revision: Revision, node: Node) -> Rejection | None:
    """What speaks against a replica on ``node`` for good, however the fleet is doing: labels, formats, memory."""
    if not deployment.matches(node.labels):
        return Rejection(Filter.SELECTOR, "its labels do not match the selector")
    fitting = _fitting(node, revision.variants)
    return fitting if isinstance(fitting, Rejection) else None
