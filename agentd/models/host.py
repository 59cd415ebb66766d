"""The model host: the owners of all models of this node, and the scheduler between them. Implements ModelHost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing

from agentd.device.pressure import Memory, read_memory
from agentd.models import events as on
from agentd.models import refusals
from agentd.models.backends import available_formats
from agentd.models.counters import ModelCounters
from agentd.models.launcher import Launcher, ProcessLauncher
from agentd.models.measured import Measurement
from agentd.models.owner import Owner
from agentd.models.places import Places
from agentd.models.planner import Budget
from agentd.models.scheduler import Scheduler
from agentd.models.settings import HostSettings, Tuning, tightest
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
from slmfleet.modelfiles import NotAModel
from slmfleet.v1 import worker_pb2

log = logs.get(__name__)
# Of the memory of the machine, where no limit was set.
_DEFAULT_SHARE = 0.8
_RESTART_S, _RESTART_CAP_S = 1.0, 60.0


class Host:
    """Serves ``generate`` while ``run`` runs. One event loop owns it: no method may be called from another thread."""

    def __init__(
        self,
        settings: HostSettings,
        launcher: Launcher | None = None,
        memory: Callable[[], Memory] = read_memory,
    ) -> None:
        self._settings = settings
        self._tuning = Tuning()
        self._processes = ProcessLauncher(settings) if launcher is None else None
        self._launcher: Launcher = launcher or self._processes  # type: ignore[assignment]
        self._memory = memory
        self._owners: dict[ModelKey, Owner] = {}
        # What the desired state names. One owner at a time exists per key: the next one is made when the last is gone.
        self._models: dict[ModelKey, LoadableModel] = {}
        self._scheduler = Scheduler(self._owners, self._budget)
        self._places = Places(self._max_concurrent, self._owners.values)
        if self._processes is not None:
            self._processes.measured = self._scheduler.measured
        self._subscribers: list[Callable[[ModelStatus], None]] = []
        self._group: asyncio.TaskGroup | None = None
        self._stopped = False
        # Counts of models that are gone, until they are taken.
        self._departed: dict[ModelKey, ModelCounters] = {}
        # Bugs in owners that cost a model a restart.
        self.owner_failures = 0

    # What the rest of agentd asks.

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk | Done]:
        """See ModelHost.generate."""
        async with aclosing(self.bursts(request)) as bursts:
            async for burst in bursts:
                for item in burst:
                    yield item

    async def bursts(self, request: GenerateRequest) -> AsyncGenerator[Sequence[Chunk | Done], None]:
        """See ModelHost.bursts."""
        body = json.dumps(dict(request.body), ensure_ascii=False).encode()
        message = worker_pb2.WorkerRequest(generate=worker_pb2.WorkerRequest.Generate(body=body))
        ticket, owner = self._submit(request, message)
        try:
            async for item in ticket:
                yield [item, *ticket.rest()]  # type: ignore[list-item]  # a generation has no Vectors
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
        self._models = {model.key: model for model in models}
        for key, owner in self._owners.items():
            if key not in self._models:
                owner.post(on.Close())
        for key, model in self._models.items():
            known = self._owners.get(key)
            if known is None:
                self._add(model)
            elif known.model != model or known.closing:
                known.post(on.Configure(model))

    def tune(self, tuning: Tuning) -> None:
        """Bounds from now on: memory and places at once, threads and slots from each model's next load."""
        if tuning == self._tuning:
            return
        self._tuning = tuning
        if self._processes is not None:
            self._processes.tuning = tuning
        for owner in self._owners.values():
            owner.post(on.Retune())
        self._scheduler.changed()

    @property
    def limits(self) -> str:
        """How workers are held to their limits: "cgroup2", "cgroup1", "watchdog" or "none". Known while it runs."""
        return self._processes.limits if self._processes else "none"

    def remember(self, measured: Mapping[ModelKey, Measurement]) -> None:
        """What models took in an earlier life of this process on this device."""
        self._scheduler.remember(measured)

    @property
    def measured(self) -> Mapping[ModelKey, Measurement]:
        """What models took when they were loaded last: to be given to the next life of this process."""
        return self._scheduler.measured

    def status(self) -> Sequence[ModelStatus]:
        """See ModelHost.status."""
        return [owner.status() for owner in self._owners.values()]

    def available_formats(self) -> frozenset[str]:
        """Formats that a backend here can load."""
        return available_formats(self._settings.backends)

    async def knows_tools(self, key: ModelKey) -> bool | None:
        """See ModelHost.knows_tools."""
        model = self._models.get(key)
        if model is None or self._processes is None:
            return None
        try:
            facts = await self._processes.facts(model)
        except (NotAModel, OSError):
            return None  # the load will say it
        if facts is None or not facts.has_chat_template or model.format == "upstream":
            return None
        return bool(facts.tool_format)

    async def load(self, key: ModelKey, timeout_s: float = 600.0) -> None:
        """Load now; returns when the model is ready. Raises Refused."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._answer(self._post(key, on.Hold(answer)), answer, "loaded", timeout_s)

    async def unload(self, key: ModelKey, timeout_s: float = 600.0) -> None:
        """Unload as soon as nobody uses the model; returns when its memory is back. Raises Refused."""
        owner = self._owners.get(key)
        if owner is not None and owner.model.warm:
            raise Refused(400, "model_kept_warm", f"{key} is kept loaded by the desired state; change the deployment")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._answer(self._post(key, on.Unload(answer)), answer, "unloaded", timeout_s)

    async def _answer(self, owner: Owner, answer: asyncio.Future[None], what: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            raise refusals.too_slow(owner.model.key, what, timeout_s) from None
        finally:
            # A hold whose caller left is no reason to load.
            owner.wake()

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
        owner = Owner(
            model, self._settings, self._launcher, self._scheduler, self._publish, self._places, lambda: self._tuning
        )
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
            self.owner_failures += 1
            log.exception("an owner failed", model=str(key), failures=self.owner_failures)
            await asyncio.sleep(min(_RESTART_CAP_S, _RESTART_S * self.owner_failures))
        self._retire(owner)
        self._scheduler.forget(key)
        del self._owners[key]
        if key in self._models and not self._stopped:
            # It failed, or was named again while it ended.
            self._add(self._models[key])

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
        if owner is not None and owner.ended:
            raise refusals.restarting(key)
        if owner is None:
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
            max_memory_bytes=tightest(
                self._settings.max_memory_bytes or int(memory.total * _DEFAULT_SHARE), self._tuning.max_memory_bytes
            ),
            max_loaded_models=tightest(self._settings.max_loaded_models, self._tuning.max_loaded_models),
            short_bytes=max(0, self._settings.reserve_bytes - memory.available),
        )

    def _max_concurrent(self) -> int:
        return tightest(self._settings.max_concurrent, self._tuning.max_concurrent)
