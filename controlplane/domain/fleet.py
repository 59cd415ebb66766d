"""The plain values that placement, failover and desired state decide over: a snapshot of the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controlplane.domain.liveness import CONNECTED, NodeState


class LabelMatcher(Protocol):
    """A parsed label selector."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether something with ``labels`` is selected."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One format of a model version. ``files``: its files, digest to size in bytes."""

    name: str
    format: str
    files: Mapping[str, int] = field(default_factory=dict)
    # As its makers write it; "" = unknown.
    quantization: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True, slots=True)
class Revision:
    """What one revision of a deployment pins: a model version, and an agent by digest (None: the bare model)."""

    number: int
    model: str
    model_version: str
    variants: tuple[Variant, ...] = ()
    # Why the model can't be handed out yet ("it is being fetched"); "" = it can.
    not_ready: str = ""
    agent: str | None = None
    agent_digest: str | None = None

    @property
    def title(self) -> str:
        """``model@version``."""
        return f"{self.model}@{self.model_version}"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment as it is wished now. ``revisions``: the current one and those that still run, by number."""

    name: str
    current_revision: int
    revisions: tuple[Revision, ...]
    selectors: tuple[LabelMatcher, ...] = ()
    # "replicas" or "every_node".
    mode: str = "replicas"
    replicas: int = 1
    # How many replicas keep the model loaded; None = all of them.
    warm: int | None = None
    # What to do about a lost node: "replace" or "keep".
    on_disconnect: str = "replace"
    # A reason that makes the whole deployment impossible to place ("group shops does not exist"); "" = none.
    blocked: str = ""

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether every selector matches."""
        return all(selector.matches(labels) for selector in self.selectors)


@dataclass(frozen=True, slots=True)
class Node:
    """One enrolled, unrevoked node. 0 bytes of memory, None of disk = not known."""

    id: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    state: NodeState = NodeState.ONLINE
    drained: bool = False
    formats: frozenset[str] = frozenset()
    memory_bytes: int = 0
    disk_free_bytes: int | None = None
    cores: int = 0
    # As inventories name them: "nvidia", "amd", "npu", "gpu".
    accelerators: frozenset[str] = frozenset()
    # Digests of the files that it had when its session began; what it fetched since is known by its staged replicas.
    on_disk: frozenset[str] = frozenset()
    # Deployments that the node may hold; 0 = no limit.
    max_replicas: int = 0
    # Since when it is silent, seconds since 1970; None = it is not, or it has never connected.
    silent_since: float | None = None
    ever_connected: bool = True


@dataclass(frozen=True, slots=True)
class Replica:
    """An assignment with what its node last said of it. ``created_at``: seconds since 1970."""

    id: str
    deployment: str
    revision: int
    node_id: str
    created_at: float
    staged: bool = False
    ready: bool = False
    warm: bool = False
    # The revision that the node spoke of.
    observed_revision: int = 0
    # Why it was placed here.
    reason: str = ""
    # What is wrong with it, in the node's words; "" = nothing.
    trouble: str = ""

    # The variant that the node said it runs, and the model that it is one of, as ``model@version``; "" = not known.
    variant: str = ""
    variant_of: str = ""

    def serves(self, node: Node) -> bool:
        """Whether requests can reach it now."""
        return self.ready and node.state in CONNECTED


@dataclass(frozen=True, slots=True)
class Fleet:
    """Everything at one moment."""

    deployments: Sequence[Deployment]
    nodes: Sequence[Node]
    replicas: Sequence[Replica]
    # Seconds since 1970 by Postgres's clock.
    now: float


def running_variants(replicas: Iterable[Replica]) -> dict[tuple[str, str], str]:
    """Names of the variants that nodes run, by node id and ``model@version``. One worker serves all replicas of a model
    on a node, so where they differ the oldest one's counts."""
    found: dict[tuple[str, str], str] = {}
    for replica in sorted(replicas, key=lambda item: (item.created_at, item.id)):
        if replica.variant and replica.variant_of:
            found.setdefault((replica.node_id, replica.variant_of), replica.variant)
    return found


def effective_revision(deployment: Deployment, node: Node | None = None) -> Revision | None:
    """The revision that ``node`` runs: the one place that decides it. None: there is nothing that it could run.

    Every node moves to the current revision as soon as its model can be handed out; until then the newest earlier
    one that still runs stays.
    """
    known = sorted(deployment.revisions, key=lambda revision: -revision.number)
    current = [revision for revision in known if revision.number == deployment.current_revision]
    earlier = [revision for revision in known if revision.number < deployment.current_revision]
    for revision in (*current, *earlier):
        if not revision.not_ready:
            return revision
    return current[0] if current else None
