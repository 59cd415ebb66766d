"""From a model to a running worker: read the files' header, estimate memory, spawn, say Load."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentd.device.cgroups import Cgroups, Group, Limits, open_cgroups
from agentd.models.backends import FORMATS
from agentd.models.inspect import ModelFacts, NotAModel
from agentd.models.memory import Estimate, context_for, estimate
from agentd.models.process import Exit, Launch, Worker, WorkerProcess, reap_leftovers, resident_bytes
from agentd.models.settings import HostSettings
from agentd.models.types import LoadableModel, ModelKey
from agentd.models.worker.environment import worker_environment
from slmfleet import logs
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


class ProcessLauncher:
    """The real Launcher. ``open`` before use, ``close`` after: they own the folder that workers live in."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._run_dir: Path | None = None
        self._serial = 0
        self._cgroups: Cgroups | None = None
        self._estimates: dict[ModelKey, int] = {}

    def open(self) -> None:
        """Make the run folder, and end what an earlier agentd left in it."""
        if self._settings.memory_limit_factor:
            self._cgroups = open_cgroups()
            if self._cgroups is None:
                log.warning("workers run without limits by the kernel: no cgroup is writable here")
        if self._settings.run_dir is None:
            self._run_dir = Path(tempfile.mkdtemp(prefix="slmfleet-workers-"))
            return
        self._run_dir = self._settings.run_dir.absolute()
        self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if ended := reap_leftovers(self._run_dir):
            log.warning("ended workers that an earlier agentd left", pids=ended)
        if self._cgroups is not None:
            self._cgroups.sweep("worker-")

    def close(self) -> None:
        """Remove a temporary run folder."""
        if self._run_dir is not None and self._settings.run_dir is None:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    async def prepare(self, model: LoadableModel) -> Prepared:
        backend = self._backend(model.format)
        form = FORMATS.get(model.format)
        facts = None
        if form is not None and backend == form.backend:
            # Reading a header takes milliseconds from flash and far longer from a worn card.
            facts = await asyncio.to_thread(form.inspect, model.entry)
        settings = self._settings
        context = context_for(model.context_tokens, facts, settings.default_context_tokens)
        slots = settings.slots if model.format == "gguf" or facts is None else 1
        guess = estimate(
            model.format,
            model.size_bytes,
            facts,
            context_tokens=context,
            slots=slots,
            kv_type=settings.kv_type,
            prefill_chunk=settings.prefill_chunk,
        )
        self._estimates[model.key] = guess.total
        load = worker_pb2.WorkerRequest.Load(
            backend=backend,
            entry=str(model.entry.absolute()),
            context_tokens=context,
            threads=settings.threads_per_worker(),
            slots=slots,
            prefill_chunk=settings.prefill_chunk,
            kv_type=settings.kv_type,
            gpu_layers=settings.gpu_layers,
            lock_memory=settings.lock_memory,
        )
        mapped = model.size_bytes if model.format == "gguf" and not settings.lock_memory else 0
        return Prepared(facts, context, guess, mapped, worker_pb2.WorkerRequest(load=load))

    async def start(self, model: LoadableModel, on_reply: OnReply, on_exit: OnExit) -> Worker:
        assert self._run_dir is not None, "open() comes first"
        self._serial += 1
        name = f"worker-{os.getpid()}-{self._serial}"
        launch = Launch(
            folder=self._run_dir / name,
            environment=worker_environment(os.environ, self._settings.worker_environment),
            group=self._group(name, self._estimates.get(model.key, 0)),
        )
        return await WorkerProcess.start(launch, on_reply, on_exit)

    def _group(self, name: str, estimate_bytes: int) -> Group | None:
        if self._cgroups is None:
            return None
        settings = self._settings
        memory = int(estimate_bytes * settings.memory_limit_factor)
        return self._cgroups.create(name, Limits(memory, settings.worker_cpus, settings.worker_pids))

    def memory_bytes(self, worker: Worker) -> int:
        return resident_bytes(worker.pid)

    def _backend(self, model_format: str) -> str:
        if chosen := self._settings.backends.get(model_format):
            return chosen
        if model_format in FORMATS:
            return FORMATS[model_format].backend
        known = ", ".join(sorted({*FORMATS, *self._settings.backends}))
        raise NotAModel(f"no backend serves the format {model_format!r}: this node knows {known}")
