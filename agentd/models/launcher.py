"""From a model to a running worker: read the files' header, estimate memory, spawn, say Load."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentd.device.cgroups import Cgroups, Group, Limits, open_cgroups
from agentd.device.pressure import stalled_fraction
from agentd.models.backends import FORMATS
from agentd.models.measured import Measurement
from agentd.models.memory import Estimate, context_for, estimate
from agentd.models.process import Exit, Launch, Worker, WorkerProcess, reap_leftovers, resident_bytes, start_time
from agentd.models.settings import HostSettings, Tuning, tightest
from agentd.models.types import LoadableModel, ModelKey
from agentd.models.worker.environment import worker_environment
from slmfleet import logs
from slmfleet.modelfiles import ModelFacts, NotAModel
from slmfleet.v1 import worker_pb2

log = logs.get(__name__)
OnReply = Callable[[worker_pb2.WorkerReply], None]
OnExit = Callable[[Exit], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a model before it is loaded."""

    facts: ModelFacts | None
    # Tokens of context for each slot.
    context_tokens: int
    estimate: Estimate
    # For which files and settings what is measured counts.
    shape: str
    # Mapped weights among the estimate: the kernel counts their pages as available.
    mapped_bytes: int
    load: worker_pb2.WorkerRequest


class Launcher(Protocol):
    """What an owner needs in order to have a worker; tests put a fake here."""

    async def prepare(self, model: LoadableModel) -> Prepared:
        """Read and check the files. Raises NotAModel."""
        ...

    async def start(self, model: LoadableModel, on_reply: OnReply, on_exit: OnExit) -> Worker:
        """Spawn a worker that waits for Load. Raises OSError."""
        ...

    def memory_bytes(self, worker: Worker) -> int:
        """What the worker takes now."""
        ...

    def stalled_fraction(self, worker: Worker | None) -> float:
        """Share of the last 10 s in which the worker (or, where that can't be told, anything) waited for memory."""
        ...


class ProcessLauncher:
    """The real Launcher. ``open`` before use, ``close`` after: they own the folder that workers live in.

    ``tuning`` tightens the settings of what is prepared from now on; ``measured`` says what models took before.
    """

    def __init__(self, settings: HostSettings, measured: Mapping[ModelKey, Measurement] | None = None) -> None:
        self._settings = settings
        self.tuning = Tuning()
        self.measured = measured or {}
        self._run_dir: Path | None = None
        self._serial = 0
        self._cgroups: Cgroups | None = None
        self._prepared: dict[ModelKey, Prepared] = {}
        # Headers that were read, and the file's identity then: a header of a large vocabulary takes milliseconds.
        self._facts: dict[ModelKey, tuple[tuple[object, ...], ModelFacts]] = {}

    @property
    def limits(self) -> str:
        """How workers are held to their limits: "cgroup2", "cgroup1", "watchdog" or "none"."""
        if not self._settings.memory_limit_factor:
            return "none"
        return f"cgroup{self._cgroups.version}" if self._cgroups else "watchdog"

    def open(self) -> None:
        """Make the run folder, and end what an earlier agentd left in it."""
        if self._settings.memory_limit_factor and not self._settings.watch_only:
            self._cgroups = open_cgroups()
            if self._cgroups is None:
                log.warning("no cgroup is writable here: the memory of workers is watched, not limited by the kernel")
        if self._settings.run_dir is None:
            self._run_dir = Path(tempfile.mkdtemp(prefix="slmfleet-workers-"))
            return
        self._run_dir = self._settings.run_dir.absolute()
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if ended := reap_leftovers(self._run_dir):
            log.warning("ended workers that an earlier agentd left", pids=ended)
        if self._cgroups is not None:
            self._cgroups.sweep("worker-", lambda pid: pid != os.getpid() and bool(start_time(pid)))

    def close(self) -> None:
        """Remove a temporary run folder."""
        if self._run_dir is not None and self._settings.run_dir is None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    async def prepare(self, model: LoadableModel) -> Prepared:
        backend = self._backend(model.format)
        facts = await self._read(model, backend)
        load = load_message(model, backend, facts, self._settings, self.tuning)
        guess = estimate(
            model.format,
            model.size_bytes,
            facts,
            context_tokens=load.context_tokens,
            slots=load.slots,
            kv_type=load.kv_type,
            prefill_chunk=load.prefill_chunk,
        )
        mapped = model.size_bytes if model.format == "gguf" and not load.lock_memory else 0
        shape = f"{model.size_bytes} {load.context_tokens}x{load.slots} {load.prefill_chunk} {load.kv_type}"
        shape += f" {load.gpu_layers} {load.lock_memory:d}"
        prepared = Prepared(facts, load.context_tokens, guess, shape, mapped, worker_pb2.WorkerRequest(load=load))
        self._prepared[model.key] = prepared
        return prepared

    async def facts(self, model: LoadableModel) -> ModelFacts | None:
        """What the model's files say; None for a backend that agentd does not know. Raises NotAModel, OSError."""
        return await self._read(model, self._backend(model.format))

    async def _read(self, model: LoadableModel, backend: str) -> ModelFacts | None:
        form = FORMATS.get(model.format)
        if form is None or backend != form.backend:
            return None
        # Also of a path in the store: one path's content never changes there, but a test's or a user's may.
        status = await asyncio.to_thread(model.entry.stat)
        identity = (model.entry, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._facts.get(model.key)
        if known is not None and known[0] == identity and model.entry.is_file():
            return known[1]
        # Reading a header takes milliseconds from flash and far longer from a worn card.
        facts = await asyncio.to_thread(form.inspect, model.entry)
        self._facts[model.key] = (identity, facts)
        return facts

    async def start(self, model: LoadableModel, on_reply: OnReply, on_exit: OnExit) -> Worker:
        assert self._run_dir is not None, "open() comes first"
        self._serial += 1
        name = f"worker-{os.getpid()}-{self._serial}"
        limit = self._limit_bytes(model.key)
        launch = Launch(
            folder=self._run_dir / name,
            environment=worker_environment(os.environ, self._settings.worker_environment),
            group=self._group(name, limit),
            limit_bytes=limit,
        )
        return await WorkerProcess.start(launch, on_reply, on_exit)

    def _limit_bytes(self, key: ModelKey) -> int:
        settings, prepared = self._settings, self._prepared[key]
        if not settings.memory_limit_factor:
            return 0
        measured = self.measured.get(key)
        took = measured.memory_bytes if measured and measured.shape == prepared.shape else 0
        # Never under the estimate: what was measured may have been a load that nobody used.
        expected = max(prepared.estimate.total, took)
        return int(expected * settings.memory_limit_factor) + settings.memory_limit_slack_bytes

    def _group(self, name: str, limit_bytes: int) -> Group | None:
        if self._cgroups is None:
            return None
        return self._cgroups.create(name, Limits(limit_bytes, self._settings.worker_cpus, self._settings.worker_pids))

    def memory_bytes(self, worker: Worker) -> int:
        return resident_bytes(worker.pid)

    def stalled_fraction(self, worker: Worker | None) -> float:
        group = worker.group if isinstance(worker, WorkerProcess) else None
        return stalled_fraction(group=group.folders.get("memory") if group else None)

    def _backend(self, model_format: str) -> str:
        if chosen := self._settings.backends.get(model_format):
            return chosen
        if model_format in FORMATS:
            return FORMATS[model_format].backend
        known = ", ".join(sorted({*FORMATS, *self._settings.backends}))
        raise NotAModel(f"no backend serves the format {model_format!r}: this node knows {known}")


def load_message(
    model: LoadableModel, backend: str, facts: ModelFacts | None, settings: HostSettings, tuning: Tuning
) -> worker_pb2.WorkerRequest.Load:
    """What a worker is told to load: the model's own options within the node's. Pure."""
    own = model.runtime
    slots = tightest(own.slots or settings.slots, tuning.slots) if model.format == "gguf" or facts is None else 1
    return worker_pb2.WorkerRequest.Load(
        backend=backend,
        entry=str(model.entry.absolute()),
        context_tokens=context_for(model.context_tokens, facts, settings.default_context_tokens),
        threads=tightest(own.threads or settings.threads_per_worker(), settings.max_threads(), tuning.threads),
        slots=slots,
        prefill_chunk=own.batch_tokens or settings.prefill_chunk,
        kv_type=own.kv_type or settings.kv_type,
        gpu_layers=settings.gpu_layers if own.gpu_layers is None else own.gpu_layers,
        lock_memory=settings.lock_memory if own.lock_memory is None else own.lock_memory,
        numa=own.numa,
    )
