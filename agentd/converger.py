"""The loop around the plan of ``agentd.convergence``: load what is, plan, act; again when something changed.

Level-triggered: every pass derives all from the stored document and the disk. ``poke`` only wakes it early; the timer
behind it is the truth.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from agentd.artifacts.attempt import Cancelled, Fetched, FetchFailed, Stop
from agentd.artifacts.marks import Marks
from agentd.artifacts.quota import Room
from agentd.artifacts.store import ArtifactStore, Blob
from agentd.board import StatusBoard
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
    Step,
    Verify,
)
from agentd.convergence.plan import plan, retry_delay_s
from agentd.device.clock import boottime_s, wall_s
from agentd.models.types import ModelHost, ModelKey, ModelStatus
from agentd.telemetry.events import EventLog
from slmfleet import logs
from slmfleet.modelfiles.upstream import leads_away
from slmfleet.v1 import state_pb2 as pb
from slmfleet.variants import Hardware

log = logs.get(__name__)

PERIOD_S = 10.0
PROGRESS_EVERY_S = 0.5
# Severity and reason of what is told of a model's speed: that it is itself again, that it thrashes.
_SPEED_EVENTS = (("info", "ModelRecovered"), ("warning", "ModelThrashing"))

# Bytes into the partial file: (sha256, size, stop) -> Fetched. Blocking.
Fetcher = Callable[[str, int, Stop], Fetched]


class Desired(Protocol):
    """What the loop needs of the owner of the desired state."""

    @property
    def document(self) -> pb.NodeDocument | None:
        """The newest document; None on a node that never got one."""

    @property
    def generation(self) -> int:
        """Its generation."""


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """The part of the configuration that convergence needs."""

    formats: frozenset[str]
    keep_alive_s: float
    context_tokens: int
    cache_bytes: int
    disk_reserve_bytes: int
    hardware: Hardware = field(default_factory=Hardware)
    profile: str = "balanced"


class Converger:
    """Owns the artifact store and what is known about attempts. ``planned`` is called with each new plan."""

    def __init__(
        self,
        desired: Desired,
        store: ArtifactStore,
        marks: Marks,
        host: ModelHost,
        fetcher: Fetcher,
        board: StatusBoard,
        events: EventLog,
        limits: NodeLimits,
        planned: Callable[[Plan], None],
    ) -> None:
        self._desired = desired
        self._store = store
        self._marks = marks
        self._host = host
        self._fetcher = fetcher
        self._board = board
        self._events = events
        self._limits = limits
        self._planned = planned
        self._wake = asyncio.Event()
        self._failures: dict[str, Failure] = {}
        self._linked: set[tuple[str, str]] = set()
        self._crashes: dict[ModelKey, int] = {}
        self._thrashing: set[ModelKey] = set()
        self._job: _Job | None = None
        # Digests of the files that were verified at the last pass.
        self.verified: frozenset[str] = frozenset()
        # When the last pass ended (CLOCK_BOOTTIME): the watchdog's proof of progress.
        self.last_pass_s = boottime_s()

    def poke(self) -> None:
        """Something changed: plan again soon."""
        self._wake.set()

    async def run(self) -> None:
        """Converge until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    current = await self.step(tasks)
                    wait_s = self._sleep_s(current)
                except (OSError, sqlite3.Error):
                    # A full or failing disk: the models that are loaded go on serving, and the next pass tries again.
                    log.error("a pass of convergence failed", exc_info=True, next_try_s=PERIOD_S)
                    await asyncio.sleep(PERIOD_S)
                    continue
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()

    async def settle(self) -> None:
        """Act on what is verified on disk, without downloads or hashing: at start, before anything else runs."""
        for _ in range(8):
            current = await self.step(None)
            if all(isinstance(step, (Fetch, Verify)) for step in current.steps):
                return

    async def step(self, tasks: asyncio.TaskGroup | None) -> Plan:
        """One pass. ``tasks`` runs what takes long (a download, hashing); None: none of it is started."""
        actual = await self._load()
        document, generation = self._desired.document, self._desired.generation
        current = plan(document, generation, actual, await self._bounds(), boottime_s())
        if self._job and self._job.sha256 not in current.needed:
            self._job.stop.set()
        for step in current.steps:
            if isinstance(step, Link):
                await self._act(step)
        if document is not None:
            self._host.set_models(current.models)
        self._planned(current)
        for step in current.steps:
            if isinstance(step, (RemoveView, RemoveBlob, RemovePartial)):
                await self._act(step)
            elif isinstance(step, (Fetch, Verify)) and tasks is not None:
                self._job = _Job(step.sha256, Stop())
                tasks.create_task(self._work(step, self._job), name=f"{type(step).__name__} {step.sha256[:12]}")
        self._report(current)
        self.last_pass_s = boottime_s()
        return current

    def _sleep_s(self, current: Plan) -> float:
        if any(isinstance(step, (Link, RemoveBlob)) for step in current.steps):
            # What was just done makes other steps possible.
            return 0.0
        if self._job is not None:
            return PROGRESS_EVERY_S
        if current.wake_at_s is None:
            return PERIOD_S
        return min(PERIOD_S, max(current.wake_at_s - boottime_s(), 0.05))

    async def _load(self) -> Actual:
        blobs, partial, views, away = await asyncio.to_thread(self._look)
        marks = await self._marks.load()
        verified = {blob.sha256: blob.size_bytes for blob in blobs if marks.get(blob.sha256, (None,))[0] == blob}
        self.verified = frozenset(verified)
        models = {status.key: status for status in self._host.status()}
        await self._note_crashes(models.values())
        return Actual(
            verified=verified,
            unverified={blob.sha256: blob.size_bytes for blob in blobs if blob.sha256 not in verified},
            partial=partial,
            used_at={digest: used for digest, (_, used) in marks.items()},
            failures=dict(self._failures),
            busy_with=self._job.sha256 if self._job else "",
            views=views,
            linked=frozenset(self._linked & views),
            away=away,
            models=models,
        )

    async def _note_crashes(self, models: Iterable[ModelStatus]) -> None:
        """An event for each model that crashed, became far slower, or recovered since the last pass."""
        for status in models:
            if status.crashes > self._crashes.get(status.key, 0):
                message = f"the worker of {status.key} ended badly: {status.reason or 'it gave no reason'}"
                await self._events.record("error", "ModelCrashed", message, f"model/{status.key.model}")
            self._crashes[status.key] = status.crashes
            if bool(status.thrashing) != (status.key in self._thrashing):
                self._thrashing ^= {status.key}
                message = f"{status.key}: {status.thrashing or 'it is as fast as it was'}"
                await self._events.record(*_SPEED_EVENTS[bool(status.thrashing)], message, f"model/{status.key.model}")

    def _look(self) -> tuple[list[Blob], dict[str, int], frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
        views = frozenset(self._store.views())
        away = frozenset(view for view in views if leads_away(self._store.view_path(*view)))
        return self._store.blobs(), self._store.partial_sizes(), views, away

    async def _bounds(self) -> Limits:
        free = await asyncio.to_thread(self._store.free_bytes)
        return Limits(
            formats=self._limits.formats,
            room=Room(self._limits.cache_bytes, free, self._limits.disk_reserve_bytes),
            views_root=self._store.root / "views",
            keep_alive_s=self._limits.keep_alive_s,
            context_tokens=self._limits.context_tokens,
            hardware=self._limits.hardware,
            profile=self._limits.profile,
        )

    async def _act(self, step: Step) -> None:
        log.info("converging", step=type(step).__name__, reason=step.reason, what=_what(step))
        match step:
            case Link(digest, variant, files):
                await asyncio.to_thread(self._store.link_view, digest, variant, list(files))
                await self._marks.touch([sha256 for _, sha256 in files], wall_s())
                self._linked.add((digest, variant))
            case RemoveView(digest, variant):
                self._linked.discard((digest, variant))
                await asyncio.to_thread(self._store.remove_view, digest, variant)
            case RemoveBlob(sha256):
                await asyncio.to_thread(self._store.remove_blob, sha256)
                await self._marks.forget(sha256)
            case RemovePartial(sha256):
                await asyncio.to_thread(self._store.remove_partial, sha256)

    async def _work(self, step: Fetch | Verify, job: _Job) -> None:
        """Download or hash one file; what came of it shows in the store, the marks and ``_failures``; plan again."""
        log.info("working on a file", step=type(step).__name__, sha256=step.sha256[:12], reason=step.reason)
        began_s = boottime_s()
        try:
            blob = await (self._fetch(step, job) if isinstance(step, Fetch) else self._verify(step, job))
            if blob is not None:
                await self._marks.remember(blob, wall_s())
                self._failures.pop(step.sha256, None)
                seconds = round(boottime_s() - began_s, 3)
                log.info("a file is verified", sha256=step.sha256[:12], size_bytes=blob.size_bytes, seconds=seconds)
        except Cancelled:
            log.info("work on a file was stopped", sha256=step.sha256[:12])
        except (FetchFailed, OSError) as error:
            await self._failed(step, error)
        finally:
            # A cancelled task leaves a thread behind that must not outlive the daemon.
            job.stop.set()
            self._job = None
            self.poke()

    async def _fetch(self, step: Fetch, job: _Job) -> Blob:
        await asyncio.to_thread(self._fetcher, step.sha256, step.size_bytes, job.stop)
        return await asyncio.to_thread(self._store.adopt, step.sha256)

    async def _verify(self, step: Verify, job: _Job) -> Blob | None:
        blob = await asyncio.to_thread(self._store.verify, step.sha256, job.stop)
        if blob is None:
            log.error("a damaged file was deleted", sha256=step.sha256[:12])
            await self._events.record(
                "error", "DigestMismatch", "a file on disk was damaged; it was deleted", f"artifact/{step.sha256}"
            )
        return blob

    async def _failed(self, step: Fetch | Verify, error: FetchFailed | OSError) -> None:
        reason = error.reason if isinstance(error, FetchFailed) else "FetchFailed"
        before = self._failures.get(step.sha256)
        attempts = before.attempts + 1 if before else 1
        retry_at_s = boottime_s() + retry_delay_s(attempts, random.random())
        self._failures[step.sha256] = Failure(reason, str(error), retry_at_s, attempts)
        log.warning("a file could not be fetched", sha256=step.sha256[:12], reason=reason, error=str(error),
                    attempts=attempts)  # fmt: skip
        if before is None or before.reason != reason:
            await self._events.record("warning", reason, str(error), f"artifact/{step.sha256}")

    def forgive(self) -> None:
        """The link to the control plane is new: do not wait out the back-off of failed downloads."""
        self._failures = {
            digest: failure for digest, failure in self._failures.items() if failure.reason == "DigestMismatch"
        }
        self.poke()

    def _report(self, current: Plan) -> None:
        for status in self._board.put_up(current.statuses, int(wall_s() * 1000)):
            facts = {item.type.lower(): item.reason for item in status.conditions}
            log.debug("assignment status", assignment=status.id, **facts)


@dataclass(frozen=True, slots=True)
class _Job:
    sha256: str
    stop: Stop


def _what(step: Step) -> str:
    if isinstance(step, (Link, RemoveView)):
        return f"{step.digest[:12]}/{step.variant}"
    return step.sha256[:12]
