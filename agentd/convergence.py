"""What a node does next to become what its desired state says: a pure plan from (document, actual, now).

Files are fetched or re-verified one at a time; views are linked once all files of a variant are verified; models are
offered to the host once their view stands; what is needed no more goes last. Any prefix of a plan leaves the node safe,
and planning again after applying a plan leads on from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from agentd.artifacts.quota import Room, prune, refusal
from agentd.models.types import LoadableModel, ModelKey, ModelState, ModelStatus, RuntimeOptions
from slmfleet import variants
from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
GGUF = "gguf"


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


@dataclass(frozen=True, slots=True)
class NoVariant:
    """Why no variant can run here."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Item:
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


def plan(document: pb.NodeDocument | None, generation: int, actual: Actual, limits: Limits, now_s: float) -> Plan:
    """See the module. ``document`` None: the node was never told anything, and nothing is touched."""
    if document is None:
        return Plan((), (), (), {}, frozenset(), frozenset(), None)
    items = _items(document, limits)
    files = _files(items)
    room = Room(
        document.settings.model_cache_bytes or limits.room.cache_bytes,
        limits.room.free_bytes,
        limits.room.reserve_bytes,
    )
    job, failures = _job(files, actual, room, now_s)
    loadable = [
        item for item in items
        if _is_linked(item, actual) and _may_serve(item) and not _leaves_though_private(item, actual)
    ]  # fmt: skip
    statuses = tuple(_status(item, generation, actual, failures) for item in items)
    ready = frozenset(
        status.id for status in statuses for condition in status.conditions
        if condition.type == "Ready" and condition.status == pb.CONDITION_STATUS_TRUE
    )  # fmt: skip
    retries = [failure.retry_at_s for digest, failure in failures.items() if digest in files]
    return Plan(
        steps=(
            *_links(items, actual),
            *_removals(items, files, actual, room),
            *job,
        ),
        models=_models(loadable, document.settings, limits),
        statuses=statuses,
        chosen={item.assignment.id: item.key for item in items if item.key is not None},
        ready=ready,
        needed=frozenset(files),
        wake_at_s=min(retries, default=None),
    )


def _items(document: pb.NodeDocument, limits: Limits) -> list[_Item]:
    items: list[_Item] = []
    digests: dict[ModelKey, str] = {}
    for assignment in document.assignments:
        problem = manifest_problem(assignment)
        if problem:
            items.append(_Item(assignment, None, None, NoVariant("BadManifest", problem)))
            continue
        choice = choose_variant(assignment.model, assignment.variant, limits.formats, limits.hardware, limits.profile)
        if isinstance(choice, NoVariant):
            items.append(_Item(assignment, None, None, choice))
            continue
        variant, why = choice
        key = ModelKey(assignment.model.name, assignment.model.version, variant.name)
        if digests.setdefault(key, assignment.model.digest) != assignment.model.digest:
            other = NoVariant("VersionConflict", f"two different contents are called {key}: give one a new version")
            items.append(_Item(assignment, None, None, other))
            continue
        items.append(_Item(assignment, variant, key, None, why))
    return items


def _files(items: Iterable[_Item]) -> dict[str, pb.FileRef]:
    """Every file that is needed, once; those that must serve before those that are only brought along."""
    ordered = sorted(items, key=lambda item: item.assignment.phase == pb.ASSIGNMENT_PHASE_PREFETCH)
    return {file.sha256: file for item in ordered if item.variant for file in item.variant.files}


def _job(
    files: Mapping[str, pb.FileRef], actual: Actual, room: Room, now_s: float
) -> tuple[list[Verify | Fetch], dict[str, Failure]]:
    """At most one long task, hashing before downloading, and all reasons why files are not coming."""
    failures = {digest: failure for digest, failure in actual.failures.items() if digest in files}
    missing = [file for digest, file in files.items() if digest not in actual.verified]
    if actual.busy_with:
        return [], failures
    for digest in files:
        if digest in actual.unverified:
            return [Verify(digest, "its mark is missing or old")], failures
    needed = sum(file.size_bytes for file in files.values())
    for file in missing:
        failure = actual.failures.get(file.sha256)
        if failure and failure.retry_at_s > now_s:
            continue
        incoming = file.size_bytes - min(actual.partial.get(file.sha256, 0), file.size_bytes)
        refused = refusal(needed, incoming, room)
        if refused is None:
            return [Fetch(file.sha256, file.size_bytes, "the desired state needs it")], failures
        failures[file.sha256] = Failure(*refused, retry_at_s=now_s + 15.0, attempts=0)
    return [], failures


def _is_staged(item: _Item, actual: Actual) -> bool:
    return item.variant is not None and all(file.sha256 in actual.verified for file in item.variant.files)


def _is_linked(item: _Item, actual: Actual) -> bool:
    return _is_staged(item, actual) and item.view in actual.linked


def _may_serve(item: _Item) -> bool:
    return item.assignment.phase != pb.ASSIGNMENT_PHASE_PREFETCH and not item.assignment.lease_epoch


def _leaves_though_private(item: _Item, actual: Actual) -> bool:
    """True if the model is on another device, and the agent's words may not go there. A bare model has no words of its
    own to protect: whoever calls it by its name chose it."""
    return item.view in actual.away and _has_agent(item) and item.assignment.agent.privacy != pb.PRIVACY_ANY


def _links(items: Sequence[_Item], actual: Actual) -> list[Link]:
    links: dict[tuple[str, str], Link] = {}
    for item in items:
        if item.variant and _is_staged(item, actual) and item.view not in actual.linked:
            pairs = tuple((file.name, file.sha256) for file in item.variant.files)
            links[item.view] = Link(*item.view, pairs, "all its files are verified")
    return list(links.values())


def _removals(
    items: Sequence[_Item], files: Mapping[str, pb.FileRef], actual: Actual, room: Room
) -> list[RemoveView | RemoveBlob | RemovePartial]:
    views = {item.view for item in items if item.variant}
    steps: list[RemoveView | RemoveBlob | RemovePartial] = [
        RemoveView(*view, "nothing desired uses it") for view in sorted(actual.views - views)
    ]
    steps += [
        RemovePartial(digest, "it is not needed any more")
        for digest in sorted(actual.partial)
        if digest not in files and digest != actual.busy_with
    ]
    on_disk = {**actual.verified, **actual.unverified}
    incoming = sum(
        file.size_bytes - min(actual.partial.get(digest, 0), file.size_bytes)
        for digest, file in files.items()
        if digest not in on_disk
    )
    victims = prune(on_disk, actual.used_at, frozenset(files), incoming, room)
    return steps + [RemoveBlob(digest, "room is needed, and nothing desired uses it") for digest in victims]


def _models(items: Iterable[_Item], settings: pb.NodeSettings, limits: Limits) -> tuple[LoadableModel, ...]:
    """One model per key; assignments that share it get the longest keep-alive and the highest priority among them."""
    grouped: dict[ModelKey, list[_Item]] = {}
    for item in items:
        if item.key is not None:
            grouped.setdefault(item.key, []).append(item)
    default = settings.keep_alive_s if settings.HasField("keep_alive_s") else limits.keep_alive_s
    models = []
    for key, sharers in sorted(grouped.items()):
        variant = sharers[0].variant
        assert variant is not None
        view = limits.views_root / sharers[0].assignment.model.digest / variant.name
        models.append(
            LoadableModel(
                key=key,
                format=variant.format,
                entry=_entry(view, variant),
                size_bytes=sum(file.size_bytes for file in variant.files),
                context_tokens=sharers[0].assignment.model.context_tokens or limits.context_tokens,
                warm=any(item.assignment.warm for item in sharers),
                warm_prompts=_warm_prompts(sharers),
                runtime=_runtime(sharers[0].assignment.model.runtime),
                keep_alive_s=_longest(_keep_alive(item.assignment, default) for item in sharers),
                priority=max(item.assignment.agent.priority if _has_agent(item) else 50 for item in sharers),
            )
        )
    return tuple(models)


def _warm_prompts(sharers: Iterable[_Item]) -> tuple[str, ...]:
    """Instructions of the agents that keep the model loaded, each once, the most important agent's first."""
    agents = [item.assignment.agent for item in sharers if item.assignment.warm and _has_agent(item)]
    agents.sort(key=lambda agent: (-agent.priority, agent.name))
    return tuple(dict.fromkeys(agent.instructions for agent in agents if agent.instructions))


def _runtime(told: pb.RuntimeSettings) -> RuntimeOptions:
    """As the host wants it; values that no host could use are as if they were not there."""
    return RuntimeOptions(
        threads=min(told.threads, 1024),
        slots=min(told.slots, 256),
        batch_tokens=min(told.batch_tokens, 2048),
        gpu_layers=max(-1, told.gpu_layers) if told.HasField("gpu_layers") else None,
        lock_memory=told.lock_memory if told.HasField("lock_memory") else None,
        kv_type=told.kv_type,
        numa=told.numa if told.numa in ("distribute", "isolate") else "",
    )


def _has_agent(item: _Item) -> bool:
    return item.assignment.HasField("agent")


def _keep_alive(assignment: pb.Assignment, default: float) -> float:
    agent = assignment.agent
    return agent.keep_alive_s if assignment.HasField("agent") and agent.HasField("keep_alive_s") else default


def _longest(values: Iterable[float]) -> float:
    found = list(values)
    return -1.0 if any(value < 0 for value in found) else max(found)


def _entry(view: Path, variant: pb.Variant) -> Path:
    """What a runtime opens: the (first) GGUF file, or the folder."""
    if variant.format != GGUF:
        return view
    names = sorted(file.name for file in variant.files)
    return view / next((name for name in names if name.endswith(".gguf")), names[0])


def _status(item: _Item, generation: int, actual: Actual, failures: Mapping[str, Failure]) -> pb.AssignmentStatus:
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


def _staged(item: _Item, actual: Actual, failures: Mapping[str, Failure]) -> pb.Condition:
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


def _ready(item: _Item, staged: pb.Condition, model: ModelStatus | None, actual: Actual) -> pb.Condition:
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
    if _leaves_though_private(item, actual):
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


def retry_delay_s(attempts: int, chance: float) -> float:
    """Back-off between attempts at one file: 2 s doubling to 5 min, half of it by chance (``chance`` in [0, 1))."""
    return float(min(300.0, 2.0 * 2 ** min(attempts - 1, 10))) * (0.5 + 0.5 * chance)
