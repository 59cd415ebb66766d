"""Whether a node is to be sent its desired state, left alone or told to hold still (pure).

Generations count within a timeline; a restored database starts another one. A node's history and the server's fit when
the server can only be ahead of the node. They do not fit when the node is ahead, or holds other content under the
server's own number: then somebody restored a backup or two servers wrote, and only an operator can know what is right.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Version:
    """Names one desired state; generation 0 = none."""

    timeline: str = ""
    generation: int = 0
    sha256: bytes = b""


@dataclass(frozen=True, slots=True)
class UpToDate:
    """Nothing to send."""


@dataclass(frozen=True, slots=True)
class Send:
    """The node lacks this version."""

    version: Version


@dataclass(frozen=True, slots=True)
class Hold:
    """The histories do not fit: tell the node to hold still, and the operator why."""

    version: Version
    reason: str


def compare(node: Version, server: Version | None) -> UpToDate | Send | Hold:
    """What to do for a node that holds ``node`` when the server holds ``server`` (None: nothing compiled yet)."""
    if server is None or server.generation == 0:
        # A node of another timeline may wait for its first document here; one of ours can't be ahead of nothing, but
        # without a timeline to compare with, waiting is the safe answer.
        return UpToDate()
    if node.generation == 0:
        return Send(server)
    if node == server:
        return UpToDate()
    same_timeline = node.timeline == server.timeline
    if node.generation > server.generation:
        if not same_timeline and node.sha256 == server.sha256:
            return Send(server)
        return Hold(
            server,
            f"the node holds generation {node.generation}, the control plane only {server.generation}: "
            "was its database restored from a backup?",
        )
    if node.generation == server.generation and node.sha256 != server.sha256:
        return Hold(server, f"the node holds other content under the same generation {node.generation}")
    return Send(server)
