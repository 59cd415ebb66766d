"""What a plan is made of: what is on the node, its bounds, and the steps."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from agentd.artifacts.quota import Room
from agentd.models.types import LoadableModel, ModelKey, ModelStatus
from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware


@dataclass(frozen=True, slots=True)
class Failure:
    """The last attempt to get a file failed; not before ``retry_at_s`` again (CLOCK_BOOTTIME)."""

    reason: str
    message: str
    retry_at_s: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Actual:
    """What is on this node now."""

    # Sizes of the blobs that were verified and have not changed since, and of the others.
    verified: Mapping[str, int] = field(default_factory=dict)
    unverified: Mapping[str, int] = field(default_factory=dict)
    # Bytes of unfinished downloads.
    partial: Mapping[str, int] = field(default_factory=dict)
    used_at: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    # The file that is being downloaded or hashed now; "" when none is.
    busy_with: str = ""
    views: Set[tuple[str, str]] = frozenset()
    # Views that were made or checked since agentd started.
    linked: Set[tuple[str, str]] = frozenset()
    # Views of upstream models that are not on this device.
    away: Set[tuple[str, str]] = frozenset()
    models: Mapping[ModelKey, ModelStatus] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """The node's own bounds and abilities. ``formats``: those that a backend installed here can load."""

    formats: Set[str]
    room: Room
    views_root: Path
    keep_alive_s: float
    context_tokens: int
    # What the choice of a variant depends on. The profile is the configured one: the one of the moment changes with
    # every plug that is pulled, and each change of variant is a download.
    hardware: Hardware = field(default_factory=Hardware)
    profile: str = "balanced"


@dataclass(frozen=True, slots=True)
class Verify:
    """Hash a file that is there without a valid mark, unless a file is being downloaded or hashed."""

    sha256: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Download a file (resuming), unless a file is being downloaded or hashed."""

    sha256: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Link:
    """Make the folder in which a runtime finds a variant: (name, sha256) pairs."""

    digest: str
    variant: str
    files: tuple[tuple[str, str], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveView:
    """Unlink a variant that is desired no more."""

    digest: str
    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class RemoveBlob:
    """Delete a file to make room."""

    sha256: str
    reason: str


@dataclass(frozen=True, slots=True)
class RemovePartial:
    """Forget an unfinished download that is desired no more."""

    sha256: str
    reason: str


Step = Verify | Fetch | Link | RemoveView | RemoveBlob | RemovePartial


@dataclass(frozen=True, slots=True)
class Plan:
    """``steps`` in a safe order, the full set of models to offer to the host before any removal, and what to report.

    ``chosen``: the model of each assignment that can run here; ``ready``: ids of those that can serve after a load;
    ``wake_at_s``: when to plan again at the latest (None: when something changes).
    """

    steps: tuple[Step, ...]
    models: tuple[LoadableModel, ...]
    statuses: tuple[pb.AssignmentStatus, ...]
    chosen: Mapping[str, ModelKey]
    ready: Set[str]
    needed: Set[str]
    wake_at_s: float | None
