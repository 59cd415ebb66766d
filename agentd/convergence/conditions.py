"""What a node reports of each assignment: Staged, Ready, Warm, Degraded, each with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agentd.convergence.facts import (
    Actual,
    Failure,
)
from agentd.convergence.items import (
    Item,
    leaves_though_private,
)
from agentd.models.types import ModelState, ModelStatus
from slmfleet.v1 import state_pb2 as pb


def status_of(item: Item, generation: int, actual: Actual, failures: Mapping[str, Failure]) -> pb.AssignmentStatus:
    files = item.variant.files if item.variant else ()
    done = sum(
        file.size_bytes if file.sha256 in actual.verified else min(actual.partial.get(file.sha256, 0), file.size_bytes)
        for file in files
    )
    model = actual.models.get(item.key) if item.key else None
    staged = _staged(item, actual, failures)
    ready = _ready(item, staged, model, actual)
    return pb.AssignmentStatus(
        id=item.assignment.id,
        revision=item.assignment.revision,
        observed_generation=generation,
        phase=item.assignment.phase,
        conditions=(staged, ready, _warm(model), _degraded(staged, ready, model)),
        bytes_done=done,
        bytes_total=sum(file.size_bytes for file in files),
        variant=item.variant.name if item.variant else "",
    )


def _true(kind: str, reason: str, message: str) -> pb.Condition:
    return pb.Condition(type=kind, status=pb.CONDITION_STATUS_TRUE, reason=reason, message=message)


def _false(kind: str, reason: str, message: str) -> pb.Condition:
    return pb.Condition(type=kind, status=pb.CONDITION_STATUS_FALSE, reason=reason, message=message)


def _is_true(condition: pb.Condition) -> bool:
    return condition.status == pb.CONDITION_STATUS_TRUE


def _staged(item: Item, actual: Actual, failures: Mapping[str, Failure]) -> pb.Condition:
    if item.problem:
        return _false("Staged", item.problem.reason, item.problem.message)
    assert item.variant is not None
    missing = [file.sha256 for file in item.variant.files if file.sha256 not in actual.verified]
    if not missing:
        return _true("Staged", "Verified", "all files are on disk and verified")
    for digest in missing:
        if failure := failures.get(digest):
            return _false("Staged", failure.reason, failure.message)
    have = len(item.variant.files) - len(missing)
    if actual.busy_with in missing:
        if actual.busy_with in actual.unverified:
            return _false("Staged", "Verifying", "a file on disk is being verified again")
        return _false("Staged", "Downloading", f"{have} of {len(item.variant.files)} files are on disk")
    return _false("Staged", "Waiting", "its files wait for their turn to be fetched")


def _ready(item: Item, staged: pb.Condition, model: ModelStatus | None, actual: Actual) -> pb.Condition:
    if not _is_true(staged):
        reason = item.problem.reason if item.problem else "NotStaged"
        return _false("Ready", reason, staged.message)
    if item.assignment.lease_epoch:
        return _false("Ready", "NoLease", "this agentd does not hold the lease of this exclusive deployment")
    if item.assignment.phase == pb.ASSIGNMENT_PHASE_PREFETCH:
        return _false("Ready", "Prefetched", "its files are brought along; it is not to serve yet")
    if item.view not in actual.linked:
        return _false("Ready", "Preparing", "its folder is being made")
    if model is not None and model.state == ModelState.BACKING_OFF:
        return _false("Ready", "LoadFailed", model.reason or "the model failed to load and is tried again later")
    if leaves_though_private(item, actual):
        what = "what is said to it would leave this device, and the agent's privacy is not `any`"
        return _false("Ready", "PrivacyForbids", f"{what}: choose another model, or widen the privacy")
    assert item.variant is not None
    return _true("Ready", "Loadable", f"a backend here can load it; variant {item.variant.name}: {item.why}")


def _warm(model: ModelStatus | None) -> pb.Condition:
    if model is None:
        return _false("Warm", "NotOffered", "the model is not offered yet")
    if model.state == ModelState.READY:
        return _true("Warm", "Loaded", "the model is loaded")
    words = {
        ModelState.LOADING: ("Loading", "the model is being loaded"),
        ModelState.STOPPING: ("Unloading", "the model is being unloaded"),
        ModelState.BACKING_OFF: ("BackingOff", model.reason or "the model failed lately"),
    }
    return _false("Warm", *words.get(model.state, ("OnDemand", "the model is loaded by the next request")))


def _degraded(staged: pb.Condition, ready: pb.Condition, model: ModelStatus | None) -> pb.Condition:
    harmless = ("Downloading", "Verifying", "Waiting")
    if not _is_true(staged) and staged.reason not in harmless:
        return _true("Degraded", staged.reason, staged.message)
    if model is not None and model.degraded:
        said = "; ".join(model.log_lines)
        return _true("Degraded", "CrashLoop", f"{model.reason}; its last words: {said}" if said else model.reason)
    if model is not None and model.thrashing:
        return _true("Degraded", "Thrashing", model.thrashing)
    if model is not None and model.crashes and model.state != ModelState.READY:
        # One crash is no reason to look: it is tried again, and Ready says meanwhile that it can't serve.
        return _false("Degraded", "Retrying", model.reason)
    if model is not None and model.reason and model.state != ModelState.READY:
        return _true("Degraded", "ModelTrouble", model.reason)
    return _false("Degraded", "Healthy", "")


def stamp(
    previous: Mapping[str, pb.AssignmentStatus], current: Iterable[pb.AssignmentStatus], now_ms: int
) -> dict[str, pb.AssignmentStatus]:
    """The statuses by id with ``changed_at`` filled in: kept where status and reason stayed, else now."""
    stamped = {}
    for status in current:
        before = previous.get(status.id)
        known = {item.type: item for item in before.conditions} if before else {}
        result = pb.AssignmentStatus()
        result.CopyFrom(status)
        for condition in result.conditions:
            old = known.get(condition.type)
            if old is not None and (old.status, old.reason) == (condition.status, condition.reason):
                condition.changed_at.CopyFrom(old.changed_at)
            else:
                condition.changed_at.FromMilliseconds(now_ms)
        stamped[result.id] = result
    return stamped
