"""When *not* to replace: a storm that takes much of the fleet at once is a broken network far more often than that
many broken nodes, and moving everything makes it worse (Kubernetes slows eviction at the same 55 %).

The guard is a function of the present: it holds as long as the nodes of the storm stay down, and lifts by itself when
enough of them are back. An operator lifts it by draining or deleting the nodes that are known to be gone. It protects
the replicas of the storm's nodes alone: a node that dies on another day is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.domain.fleet import Node


@dataclass(frozen=True, slots=True)
class FailoverPolicy:
    """``storm_window_s``: nodes that fell silent within this span of each other count as one storm."""

    storm_fraction: float = 0.55
    storm_nodes: int = 3
    storm_window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Presence:
    """One node that has ever connected and is not drained. ``silent_since``: seconds since 1970; None = it is up."""

    silent_since: float | None


@dataclass(frozen=True, slots=True)
class Storm:
    """``down`` of the ``of`` nodes that were up when it began; they fell silent between ``began`` and ``ended``."""

    down: int
    of: int
    began: float
    ended: float

    def took(self, silent_since: float | None) -> bool:
        """Whether a node that has been silent since then is one of them."""
        return silent_since is not None and self.began <= silent_since <= self.ended

    @property
    def reason(self) -> str:
        """A sentence for people."""
        return (
            f"{self.down} of {self.of} nodes fell silent at about the same time: their replicas are not replaced until "
            "some of them are back, or an operator drains or deletes those that are gone for good"
        )


def find_storms(policy: FailoverPolicy, fleet: Iterable[Presence]) -> tuple[Storm, ...]:
    """The storms that last: at least ``storm_nodes`` nodes and ``storm_fraction`` of those that were up before it.

    Nodes that were gone already do not count as part of the fleet that a storm hit.
    """
    nodes = list(fleet)
    silent = sorted(node.silent_since for node in nodes if node.silent_since is not None)
    up = len(nodes) - len(silent)
    storms: list[Storm] = []
    after = 0
    for first, began in enumerate(silent):
        before = after
        while after < len(silent) and silent[after] - began <= policy.storm_window_s:
            after += 1
        down, of = after - first, up + len(silent) - first
        part_of_the_last = after == before and bool(storms) and storms[-1].ended == silent[after - 1]
        if down >= policy.storm_nodes and down / of >= policy.storm_fraction and not part_of_the_last:
            storms.append(Storm(down, of, began, silent[after - 1]))
    return tuple(storms)


def storms_of(nodes: Iterable[Node], policy: FailoverPolicy) -> tuple[Storm, ...]:
    """The storms that last among the nodes of a snapshot. Nodes that are drained may go away as they like."""
    fleet = [Presence(node.silent_since) for node in nodes if node.ever_connected and not node.drained]
    return find_storms(policy, fleet)
