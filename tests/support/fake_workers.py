"""Workers without processes, for the host in virtual time: late, dead, hung, deaf, and saying things twice."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from agentd.models.launcher import OnExit, OnReply, Prepared
from agentd.models.memory import Estimate
from agentd.models.process import Exit
from agentd.models.types import LoadableModel, ModelKey
from agentd.models.wire import Serializable
from slmfleet.modelfiles import NotAModel
from slmfleet.v1.worker_pb2 import WorkerReply, WorkerRequest


@dataclass
class Habits:
    """Chances (0 to 1) that something goes wrong, drawn once for each occasion."""

    not_a_model: float = 0.0
    spawn_fails: float = 0.0
    load_fails: float = 0.0
    load_hangs: float = 0.0
    dies: float = 0.0
    hangs: float = 0.0
    doubles: float = 0.0
    ignores_stop: float = 0.0
    deaf: float = 0.0
    grows: float = 0.0


@dataclass
class FakeLauncher:
    """Makes fake workers; counts those that live. What must never happen is written down in ``faults``: an exception
    alone would cost an owner a restart, which might look like any other crash."""

    chance: random.Random
    habits: Habits = field(default_factory=Habits)
    memory: int = 100
    alive: dict[ModelKey, FakeWorker] = field(default_factory=dict)
    most_alive: int = 0
    started: int = 0
    limit: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def hit(self, probability: float) -> bool:
        return self.chance.random() < probability

    async def prepare(self, model: LoadableModel) -> Prepared:
        await asyncio.sleep(self.chance.uniform(0, 0.1))
        if self.hit(self.habits.not_a_model):
            raise NotAModel("drawn")
        return Prepared(None, 100, Estimate(self.memory, 0, 0, 0), "", 0, WorkerRequest(load=WorkerRequest.Load()))

    async def start(self, model: LoadableModel, on_reply: OnReply, on_exit: OnExit) -> FakeWorker:
        await asyncio.sleep(self.chance.uniform(0, 0.1))
        if self.hit(self.habits.spawn_fails):
            raise OSError("drawn")
        if model.key in self.alive:
            self.fault(f"double load of {model.key}")
        self.started += 1
        worker = FakeWorker(self, model.key, on_reply, on_exit, self.started)
        self.alive[model.key] = worker
        self.most_alive = max(self.most_alive, len(self.alive))
        return worker

    def memory_bytes(self, worker: FakeWorker) -> int:
        return worker.memory

    def stalled_fraction(self, worker: FakeWorker | None) -> float:
        return 0.0


class FakeWorker:
    """Behaves like a worker process with one slot, as far as its owner can see."""

    def __init__(self, launcher: FakeLauncher, key: ModelKey, on_reply: OnReply, on_exit: OnExit, pid: int) -> None:
        self.pid = pid
        self.memory = launcher.memory
        self.limit_bytes = launcher.limit
        self.is_watched = bool(launcher.limit)
        self._launcher, self._key = launcher, key
        self._on_reply, self._on_exit = on_reply, on_exit
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._cancelled: set[int] = set()
        self._frozen = False
        self._deaf = False
        self._ready = False
        self._running: int | None = None

    def send(self, message: Serializable) -> None:
        assert isinstance(message, WorkerRequest)
        launcher, habits = self._launcher, self._launcher.habits
        match message.WhichOneof("message"):
            case "load" if launcher.hit(habits.load_hangs):
                self._frozen = True
            case "load" if launcher.hit(habits.load_fails):
                self._later(0.2, lambda: self._say(WorkerReply(failed=WorkerReply.Failed(message="drawn"))))
                self._later(0.3, lambda: self._end(1))
            case "load":
                ready = WorkerReply(ready=WorkerReply.Ready(slots=1, context_tokens=100))
                self._later(launcher.chance.uniform(0.1, 3), lambda: self._become(ready))
            case "generate":
                if self._running is not None:
                    launcher.fault("more requests than slots")
                if not self._ready:
                    launcher.fault("a request before the worker was ready")
                self._running = message.request_id
                self._later(0.05, lambda: self._token(message.request_id, launcher.chance.randint(1, 20)))
            case "cancel" if launcher.hit(habits.deaf):
                self._deaf = True
            case "cancel":
                self._cancelled.add(message.request_id)

    def _become(self, ready: WorkerReply) -> None:
        self._ready = True
        self._say(ready)

    def _token(self, request_id: int, left: int) -> None:
        launcher = self._launcher
        if launcher.hit(launcher.habits.dies):
            self._end(-9)
        elif launcher.hit(launcher.habits.hangs):
            self._frozen = True
        elif launcher.hit(launcher.habits.grows):
            self.memory = launcher.limit + 1
            self._later(3.0, lambda: self._token(request_id, left))
        elif self._deaf or (left and request_id not in self._cancelled):
            self._say(WorkerReply(request_id=request_id, chunk=WorkerReply.Chunk(text="x", tokens=1)))
            self._later(launcher.chance.uniform(0.01, 0.5), lambda: self._token(request_id, left - 1))
        else:
            self._running = None
            reason = "cancelled" if left else "stop"
            self._say(WorkerReply(request_id=request_id, done=WorkerReply.Done(finish_reason=reason, prompt_tokens=5)))

    def _later(self, seconds: float, action: object) -> None:
        self._loop.call_later(seconds, lambda: None if self._gone.is_set() or self._frozen else action())  # type: ignore[operator]

    def _say(self, reply: WorkerReply) -> None:
        self._on_reply(reply)
        if self._launcher.hit(self._launcher.habits.doubles) and not reply.HasField("chunk"):
            # Perhaps when this worker is gone and another one lives.
            self._loop.call_later(self._launcher.chance.uniform(0, 20), self._on_reply, reply)

    def kill(self) -> None:
        self._loop.call_later(0.02, self._end, -9)

    async def stop(self, grace_s: float) -> None:
        stubborn = self._frozen or self._launcher.hit(self._launcher.habits.ignores_stop)
        self._loop.call_later(2 * grace_s if stubborn else 0.02, self._end, 0)
        await self._gone.wait()

    def _end(self, code: int) -> None:
        if not self._gone.is_set():
            self._gone.set()
            del self._launcher.alive[self._key]
            self._on_exit(Exit(code))
