"""What a node does next to become what its desired state says: a pure plan from (document, actual, now).

Files are fetched or re-verified one at a time; views are linked once all files of a variant are verified; models are
offered to the host once their view stands; what is needed no more goes last. Any prefix of a plan leaves the node safe,
and planning again after applying a plan leads on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from agentd.artifacts.quota import Room, prune, refusal
from agentd.convergence.conditions import status_of
from agentd.convergence.facts import (
    Actual,
    Failure,
    Fetch,
    Limits,
    Link,
    Plan,
    RemoveBlob,
    RemovePartial,
    RemoveView,
    Verify,
)
from agentd.convergence.items import (
    Item,
    is_linked,
    is_staged,
    items_of,
    leaves_though_private,
    may_serve,
)
from agentd.convergence.offers import offers
from slmfleet.v1 import state_pb2 as pb


def plan(document: pb.NodeDocument | None, generation: int, actual: Actual, limits: Limits, now_s: float) -> Plan:
    """See the module. ``document`` None: the node was never told anything, and nothing is touched."""
    if document is None:
        return Plan((), (), (), {}, frozenset(), frozenset(), None)
    items = items_of(document, limits)
    files = _files(items)
    room = Room(
        document.settings.model_cache_bytes or limits.room.cache_bytes,
        limits.room.free_bytes,
        limits.room.reserve_bytes,
    )
    job, failures = _job(files, actual, room, now_s)
    loadable = [
        item for item in items
        if is_linked(item, actual) and may_serve(item) and not leaves_though_private(item, actual)
    ]  # fmt: skip
    statuses = tuple(status_of(item, generation, actual, failures) for item in items)
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
        models=offers(loadable, document.settings, limits),
        statuses=statuses,
        chosen={item.assignment.id: item.key for item in items if item.key is not None},
        ready=ready,
        needed=frozenset(files),
        wake_at_s=min(retries, default=None),
    )


def _files(items: Iterable[Item]) -> dict[str, pb.FileRef]:
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


def _links(items: Sequence[Item], actual: Actual) -> list[Link]:
    links: dict[tuple[str, str], Link] = {}
    for item in items:
        if item.variant and is_staged(item, actual) and item.view not in actual.linked:
            pairs = tuple((file.name, file.sha256) for file in item.variant.files)
            links[item.view] = Link(*item.view, pairs, "all its files are verified")
    return list(links.values())


def _removals(
    items: Sequence[Item], files: Mapping[str, pb.FileRef], actual: Actual, room: Room
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


def retry_delay_s(attempts: int, chance: float) -> float:
    """Back-off between attempts at one file: 2 s doubling to 5 min, half of it by chance (``chance`` in [0, 1))."""
    return float(min(300.0, 2.0 * 2 ** min(attempts - 1, 10))) * (0.5 + 0.5 * chance)
