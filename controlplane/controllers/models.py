"""Brings model versions in: fetch each file, check it, put it into the artifact store, then say "ready".

Each version that is not ready has one task, a few at a time. What ended a task is written to the row: ready, failed
(only an operator can help: apply it again), or pending with the reason and another try later. A crash anywhere is
mended by the next pass: files that are in the store are not fetched again, downloads go on where they broke off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.artifacts.formats import refuse_content, refuse_file, refuse_variant
from controlplane.artifacts.order import SourceAway, SourceUnusable
from controlplane.artifacts.sources import Fetched, fetch
from controlplane.artifacts.store import BlobStore, DigestMismatch, StoreFull
from controlplane.controllers.base import Controller
from controlplane.controllers.leadership import DATABASE_AWAY, Leadership
from controlplane.db import leaders, model_versions
from controlplane.db.leaders import Deposed
from controlplane.db.model_versions import Version
from slmfleet import logs

log = logs.get(__name__)

_AT_ONCE = 3
_TELL_S = 1.0
_BACKOFF_FIRST_S, _BACKOFF_CAP_S = 10.0, 300.0

_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Here:
    """All files are in the store."""

    variants: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Never:
    """Only an operator can help."""

    message: str


@dataclass(frozen=True, slots=True)
class _Later:
    """Trying again may help."""

    message: str


_Outcome = _Here | _Never | _Later


@dataclass(slots=True)
class _Meter:
    """Bytes of one version: of files that are complete, and of the one that comes now."""

    complete: int = 0
    here: int = 0
    total: int | None = None

    def update(self, here: int, total: int | None) -> None:
        self.here, self.total = here, total

    def next_file(self, size: int) -> None:
        self.complete += size
        self.here, self.total = 0, None

    def reading(self) -> tuple[int, int]:
        """Done and total; total 0 while it is not known."""
        return self.complete + self.here, self.complete + self.total if self.total is not None else 0


@dataclass(slots=True)
class _Import:
    """What is remembered of a version between tries; forgotten at a restart, which just tries again."""

    failures: int = 0
    not_before: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class ModelImportController(Controller):
    """Owns phase, message, progress and variants of ``model_versions``, and the rows of ``blobs`` that it adds."""

    name = "model-import"

    def __init__(self, engine: AsyncEngine, leadership: Leadership, store: BlobStore, cache: Path) -> None:
        super().__init__(engine, leadership)
        self._store = store
        self._cache = cache
        self._imports: dict[_Key, _Import] = {}
        self._group: asyncio.TaskGroup | None = None

    def wants(self, topic: str) -> bool:
        """What nodes do is of no interest here."""
        return topic in ("", "spec")

    async def run(self) -> None:
        """Lead and import until cancelled; imports that run end with it."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await super().run()

    async def reconcile(self, epoch: int) -> float | None:
        """Start what waits and end what nobody wants any more; the work itself is done by tasks."""
        async with self._engine.connect() as connection:
            unfinished = await model_versions.unfinished(connection)
        wanted: dict[_Key, Version] = {(item.model, item.version, item.digest): item for item in unfinished}
        for key, item in list(self._imports.items()):
            if key in wanted:
                continue
            if item.running and item.task is not None:
                item.task.cancel()
            else:
                del self._imports[key]
        return self._start_some(wanted, epoch)

    def _start_some(self, wanted: Mapping[_Key, Version], epoch: int) -> float | None:
        """Seconds until the next one may be tried again; None: nothing waits for its time."""
        assert self._group is not None
        now = time.monotonic()
        waits = []
        free = _AT_ONCE - sum(item.running for item in self._imports.values())
        for key, version in wanted.items():
            item = self._imports.setdefault(key, _Import())
            if item.running:
                continue
            if item.not_before > now:
                waits.append(item.not_before - now)
            elif free > 0:
                free -= 1
                item.task = self._group.create_task(self._import(version, item, epoch), name=f"import-{version}")
        return min(waits, default=None)

    async def _import(self, version: Version, item: _Import, epoch: int) -> None:
        """One try, from "fetching" to what came of it. Never raises."""
        assert self._group is not None
        try:
            async with leaders.fenced(self._engine, self.name, epoch) as connection:
                await model_versions.begin(connection, version)
            meter = _Meter()
            # In the controller's group, not in one of its own, which would wrap what is caught below.
            teller = self._group.create_task(self._tell(version, meter, epoch), name=f"import-progress-{version}")
            try:
                outcome = await self._try(version, meter, epoch)
            finally:
                teller.cancel()
            await self._conclude(version, item, outcome, epoch)
        except Deposed:
            log.info("import dropped: another process leads", model=version)
            self._leadership.lost(epoch)
        except DATABASE_AWAY as error:
            # The row still says "fetching": the next pass takes it up again.
            log.warning("the database is away, will import again", model=version, error=error)
            self._back_off(item)
        except Exception:
            log.exception("import failed, will try again", model=version)
            self._back_off(item)
        finally:
            self._wake.set()

    def _back_off(self, item: _Import) -> float:
        item.failures += 1
        delay_s = min(_BACKOFF_FIRST_S * 2 ** (item.failures - 1), _BACKOFF_CAP_S)
        item.not_before = time.monotonic() + delay_s
        return delay_s

    async def _conclude(self, version: Version, item: _Import, outcome: _Outcome, epoch: int) -> None:
        async with leaders.fenced(self._engine, self.name, epoch) as connection:
            match outcome:
                case _Here(variants):
                    await model_versions.finish(connection, version, variants)
                    log.info("model ready", model=version)
                case _Never(message):
                    await model_versions.fail(connection, version, message)
                    log.warning("model failed", model=version, reason=message)
                case _Later(message):
                    delay_s = self._back_off(item)
                    await model_versions.postpone(connection, version, f"{message}; next try in {delay_s:.0f} s")
                    log.warning("model postponed", model=version, reason=message, delay_s=delay_s)

    async def _tell(self, version: Version, meter: _Meter, epoch: int) -> None:
        """Write progress while it moves. Advisory: a database that is away costs a reading, not the import."""
        told = (0, 0)
        while True:
            await asyncio.sleep(_TELL_S)
            reading = meter.reading()
            if reading == told:
                continue
            try:
                async with leaders.fenced(self._engine, self.name, epoch) as connection:
                    await model_versions.progress(connection, version, *reading)
                told = reading
            except DATABASE_AWAY:
                continue
            except Deposed:
                # What ends the import as well, at its next write.
                return

    async def _try(self, version: Version, meter: _Meter, epoch: int) -> _Outcome:
        try:
            return _Here([await self._variant(variant, meter, epoch) for variant in version.spec["variants"]])
        except (SourceUnusable, DigestMismatch) as error:
            return _Never(str(error))
        except (SourceAway, StoreFull) as error:
            return _Later(str(error))
        except OSError as error:
            return _Later(f"{error.filename or 'the disk'}: {error.strerror or error}")

    async def _variant(self, variant: Mapping[str, Any], meter: _Meter, epoch: int) -> dict[str, Any]:
        """Bring in all files of a variant; the entry of ``model_versions.variants``."""
        if reason := refuse_variant(variant["format"], [file["name"] for file in variant["files"]]):
            raise SourceUnusable(f"variant {variant['name']}: {reason}")
        # All are looked into before the first is stored: what can't be run leaves nothing behind.
        here: dict[str, Fetched] = {}
        for file in variant["files"]:
            here[file["name"]] = await self._fetch(variant["format"], file, meter)
        paths = {name: fetched.path for name, fetched in here.items()}
        if reason := await asyncio.to_thread(refuse_content, variant["format"], paths):
            raise SourceUnusable(f"variant {variant['name']}: {reason}")
        files = []
        for name, fetched in here.items():
            size = await self._keep(fetched)
            async with leaders.fenced(self._engine, self.name, epoch) as connection:
                await model_versions.add_blob(connection, fetched.sha256, size)
            files.append({"sha256": fetched.sha256, "sizeBytes": size, "name": name})
        return {
            "name": variant["name"],
            "format": variant["format"],
            "quantization": variant.get("quantization") or "",
            "files": files,
        }

    async def _fetch(self, format_: str, file: Mapping[str, Any], meter: _Meter) -> Fetched:
        """Bring one file to this machine, and look into it."""
        sha256 = file.get("sha256")
        if sha256 and self._store.has(sha256):
            here = Fetched(self._store.path(sha256), sha256, ours=True)
        else:
            here = await fetch(file["source"], sha256, self._cache, meter.update)
        if reason := await asyncio.to_thread(refuse_file, format_, file["name"], here.path):
            raise SourceUnusable(reason)
        meter.next_file(here.path.stat().st_size)
        return here

    async def _keep(self, here: Fetched) -> int:
        """Put one file into the store; its bytes."""
        if self._store.has(here.sha256):
            return self._store.size(here.sha256)
        return await self._store.adopt(here.path, here.sha256, link=here.ours)
