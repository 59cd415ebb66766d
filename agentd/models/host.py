"""The model host: the owners of all models of this node, and the scheduler between them. Implements ModelHost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from agentd.device.pressure import Memory, read_memory
from agentd.models import events as on
from agentd.models.backends import available_formats
from agentd.models.counters import ModelCounters
from agentd.models.launcher import Launcher, ProcessLauncher
from agentd.models.owner import Owner
from agentd.models.planner import Budget
from agentd.models.scheduler import Scheduler
from agentd.models.settings import HostSettings
from agentd.models.ticket import Ticket
from agentd.models.types import (
    Chunk,
    Done,
    GenerateRequest,
    LoadableModel,
    ModelKey,
    ModelStatus,
    Refused,
    Vectors,
)
from agentd.models.wire import MAX_FRAME_BYTES
from slmfleet import logs
from slmfleet.v1 import worker_pb2

log = logs.get(__name__)
# Of the memory of the machine, where no limit was set.
_DEFAULT_SHARE = 0.8
_RESTART_S = 1.0


class Host:
    """Serves ``generate`` while ``run`` runs. One event loop owns it: no method may be called from another thread."""

    def __init__(
        self,
        settings: HostSettings,
        launcher: Launcher | None = None,
        memory: Callable[[], Memory] = read_memory,
    ) -> None:
        self._settings = settings
        self._processes = ProcessLauncher(settings) if launcher is None else None
        self._launcher: Launcher = launcher or self._processes  # type: ignore[assignment]
        self._memory = memory
        self._owners: dict[ModelKey, Owner] = {}
        self._scheduler = Scheduler(self._owners, self._budget)
        self._subscribers: list[Callable[[ModelStatus], None]] = []
        self._group: asyncio.TaskGroup | None = None
        self._stopped = False
        # Counts of models that are gone, until they are taken.
        self._departed: dict[ModelKey, ModelCounters] = {}

    # What the rest of agentd asks.

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Done]:
        """See ModelHost.generate."""
        body = json.dumps(dict(request.body), ensure_ascii=False).encode()
        message = worker_pb2.WorkerRequest(generate=worker_pb2.WorkerRequest.Generate(body=body))
        ticket, owner = self._submit(request, message)
        try:
            async for item in ticket:
                yield item  # type: ignore[misc]  # a generation has no Vectors
        finally:
            if not ticket.finished:
                owner.post(on.Abandon(ticket))

    async def embed(self, request: GenerateRequest, inputs: Sequence[str]) -> Vectors:
        """Vectors for the inputs. ``request.body`` is not used. Raises as ``generate`` does."""
        message = worker_pb2.WorkerRequest(embed=worker_pb2.WorkerRequest.Embed(input=inputs))
        ticket, owner = self._submit(request, message)
        try:
            vectors = await anext(ticket)
        finally:
            if not ticket.finished:
                owner.post(on.Abandon(ticket))
        assert isinstance(vectors, Vectors)
        return vectors

    def set_models(self, models: Sequence[LoadableModel]) -> None:
        """See ModelHost.set_models."""
        wanted = {model.key: model for model in models}
        for key, owner in self._owners.items():
            if key not in wanted:
                owner.post(on.Close())
        for key, model in wanted.items():
            known = self._owners.get(key)
            if known is None or known.ended:
                self._add(model)
            elif known.model != model or known.closing:
                known.post(on.Configure(model))

    def status(self) -> Sequence[ModelStatus]:
        """See ModelHost.status."""
        return [owner.status() for owner in self._owners.values()]

    def available_formats(self) -> frozenset[str]:
        """Formats that a backend here can load."""
        return available_formats(self._settings.backends)

    async def load(self, key: ModelKey) -> None:
        """Load now; returns when the model is ready. Raises Refused."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(key, on.Hold(answer))
        await answer

    async def unload(self, key: ModelKey) -> None:
        """Unload as soon as nobody uses the model; returns when its memory is back. Raises Refused."""
        owner = self._owners.get(key)
        if owner is not None and owner.model.warm:
            raise Refused(400, "model_kept_warm", f"{key} is kept loaded by the desired state; change the deployment")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._post(key, on.Unload(answer))
        await answer

    def subscribe(self, callback: Callable[[ModelStatus], None]) -> Callable[[], None]:
        """Call ``callback`` at each change of a model's state; the answer ends that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def take_counters(self) -> Mapping[ModelKey, ModelCounters]:
        """Counts since the last call, per model; also of models that are gone since."""
        taken, self._departed = self._departed, {}
        for key, owner in self._owners.items():
            counters = owner.ledger.take()
            taken[key] = taken[key].plus(counters) if key in taken else counters
        return taken

    def totals(self) -> Mapping[ModelKey, ModelCounters]:
        """Counts since the start, per model of the set."""
        return {key: owner.ledger.total() for key, owner in self._owners.items()}

    def granted_bytes(self) -> int:
        """Memory that is granted to workers now."""
        return self._scheduler.granted_bytes()

    async def probe(self, timeout_s: float = 1.0) -> str:
        """Exercise the scheduler and every owner. "" if all answered in time, else who did not."""
        asked = {"the scheduler": self._scheduler.probe()}
        for key, owner in self._owners.items():
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if owner.post(on.Probe(answer)):
                asked[str(key)] = answer
        _, late = await asyncio.wait(asked.values(), timeout=timeout_s)
        names = [name for name, answer in asked.items() if answer in late]
        for answer in late:
            answer.cancel()
        return f"no answer within {timeout_s:g} s from {', '.join(names)}" if names else ""

    # Its own life.

    async def run(self) -> None:
        """Serve until cancelled; then stop every worker in order."""
        if self._processes is not None:
            self._processes.open()
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._scheduler.run(), name="model scheduler")
                for owner in list(self._owners.values()):
                    self._start(owner)
                await asyncio.Event().wait()
        finally:
            self._stopped = True
            if self._processes is not None:
                self._processes.close()

    def _add(self, model: LoadableModel) -> None:
        owner = Owner(model, self._settings, self._launcher, self._scheduler, self._publish)
        self._owners[model.key] = owner
        if self._group is not None:
            self._start(owner)

    def _start(self, owner: Owner) -> None:
        assert self._group is not None
        self._group.create_task(self._own(owner), name=f"owner {owner.model.key}")

    async def _own(self, owner: Owner) -> None:
        """Run an owner to its end. A bug in it costs its model a restart, and others nothing."""
        key = owner.model.key
        try:
            await owner.run()
        except Exception:
            log.exception("an owner failed", model=str(key))
            self._scheduler.release(owner.model)
            self._scheduler.unwant(owner.model)
            await asyncio.sleep(_RESTART_S)
            if self._owners.get(key) is owner:
                self._retire(owner)
                self._add(owner.model)
            return
        if self._owners.get(key) is owner:
            self._retire(owner)
            del self._owners[key]

    def _retire(self, owner: Owner) -> None:
        counters, key = owner.ledger.take(), owner.model.key
        self._departed[key] = self._departed[key].plus(counters) if key in self._departed else counters

    def _submit(self, request: GenerateRequest, message: worker_pb2.WorkerRequest) -> tuple[Ticket, Owner]:
        if message.ByteSize() > MAX_FRAME_BYTES // 2:
            raise Refused(400, "request_too_large", f"a request may have {MAX_FRAME_BYTES // 2} bytes; shorten it")
        ticket = Ticket(request, message, asyncio.get_running_loop().time())
        return ticket, self._post(request.key, on.Submit(ticket))

    def _post(self, key: ModelKey, event: on.Event) -> Owner:
        owner = self._owners.get(key)
        if self._stopped or self._group is None:
            raise Refused(503, "shutting_down", "the model host is not running; ask again later", 5.0)
        if owner is None or owner.ended:
            raise Refused(404, "model_not_found", f"this node has no model {key}")
        if not owner.post(event):
            raise Refused(429, "queue_full", f"too many requests for {key} at once; ask again later", 1.0)
        return owner

    def _publish(self, status: ModelStatus) -> None:
        for callback in list(self._subscribers):
            callback(status)

    def _budget(self) -> Budget:
        memory = self._memory()
        return Budget(
            available_bytes=max(0, memory.available - self._settings.reserve_bytes),
            max_memory_bytes=self._settings.max_memory_bytes or int(memory.total * _DEFAULT_SHARE),
            max_loaded_models=self._settings.max_loaded_models,
        )
