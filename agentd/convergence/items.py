"""Each assignment with the variant that runs it here, or the reason why none does."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import PurePosixPath

from agentd.convergence.facts import (
    Actual,
    Limits,
)
from agentd.models.types import ModelKey
from slmfleet import variants
from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


@dataclass(frozen=True, slots=True)
class NoVariant:
    """Why no variant can run here."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Item:
    """An assignment with its variant, or the reason why it has none."""

    assignment: pb.Assignment
    variant: pb.Variant | None
    key: ModelKey | None
    problem: NoVariant | None
    # Why this variant.
    why: str = ""

    @property
    def view(self) -> tuple[str, str]:
        return (self.assignment.model.digest, self.variant.name if self.variant else "")


def choose_variant(
    model: pb.ModelManifest, wanted: str, formats: Set[str], hardware: Hardware | None = None, profile: str = "balanced"
) -> tuple[pb.Variant, str] | NoVariant:
    """The variant ``wanted``, or with "" the one that suits the device best (see slmfleet/variants.py); and why."""
    named = [variant for variant in model.variants if variant.name == wanted or not wanted]
    if wanted and not named:
        names = ", ".join(variant.name for variant in model.variants) or "none"
        return NoVariant("NoSuchVariant", f"{model.name}@{model.version} has no variant {wanted!r}, only: {names}")
    # One that was named has been weighed by whoever named it; the host still refuses what does not fit.
    weighed = Hardware() if wanted or hardware is None else hardware
    choice = variants.choose_variant([_candidate(variant) for variant in named], formats, weighed, profile)
    if isinstance(choice, variants.NoChoice):
        return NoVariant("NoBackend" if choice.lacks == "backend" else "NoMemory", choice.reason)
    chosen = next(variant for variant in named if variant.name == choice.name)
    return chosen, "the control plane chose it" if wanted else choice.reason


def _candidate(variant: pb.Variant) -> variants.Candidate:
    size = sum(file.size_bytes for file in variant.files)
    return variants.Candidate(variant.name, variant.format, variant.quantization, size)


def manifest_problem(assignment: pb.Assignment) -> str:
    """Why an assignment can't be acted upon at all, "" when it can. Names and digests become paths: all are checked."""
    model = assignment.model
    if not assignment.id or not model.name or not model.version:
        return "the assignment lacks an id, a model or a version"
    if not _SHA256.fullmatch(model.digest):
        return f"{model.digest!r} is no digest of a model version"
    for variant in model.variants:
        if not _SEGMENT.fullmatch(variant.name):
            return f"{variant.name!r} is no name of a variant"
        if not variant.files:
            return f"the variant {variant.name!r} has no files"
        for file in variant.files:
            if not _SHA256.fullmatch(file.sha256):
                return f"{file.sha256!r} is no SHA-256 of a file"
            path = PurePosixPath(file.name)
            if not file.name or path.is_absolute() or ".." in path.parts or str(path) != file.name:
                return f"{file.name!r} is no path inside a model's folder"
    return ""


def items_of(document: pb.NodeDocument, limits: Limits) -> list[Item]:
    items: list[Item] = []
    digests: dict[ModelKey, str] = {}
    for assignment in document.assignments:
        problem = manifest_problem(assignment)
        if problem:
            items.append(Item(assignment, None, None, NoVariant("BadManifest", problem)))
            continue
        choice = choose_variant(assignment.model, assignment.variant, limits.formats, limits.hardware, limits.profile)
        if isinstance(choice, NoVariant):
            items.append(Item(assignment, None, None, choice))
            continue
        variant, why = choice
        key = ModelKey(assignment.model.name, assignment.model.version, variant.name)
        if digests.setdefault(key, assignment.model.digest) != assignment.model.digest:
            other = NoVariant("VersionConflict", f"two different contents are called {key}: give one a new version")
            items.append(Item(assignment, None, None, other))
            continue
        items.append(Item(assignment, variant, key, None, why))
    return items


def is_staged(item: Item, actual: Actual) -> bool:
    return item.variant is not None and all(file.sha256 in actual.verified for file in item.variant.files)


def is_linked(item: Item, actual: Actual) -> bool:
    return is_staged(item, actual) and item.view in actual.linked


def may_serve(item: Item) -> bool:
    return item.assignment.phase != pb.ASSIGNMENT_PHASE_PREFETCH and not item.assignment.lease_epoch


def leaves_though_private(item: Item, actual: Actual) -> bool:
    """True if the model is on another device, and the agent's words may not go there. A bare model has no words of its
    own to protect: whoever calls it by its name chose it."""
    return item.view in actual.away and has_agent(item) and item.assignment.agent.privacy != pb.PRIVACY_ANY


def has_agent(item: Item) -> bool:
    return item.assignment.HasField("agent")
