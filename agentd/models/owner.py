"""The owner of one model: one task with an inbox, which alone decides what happens to its worker.

::

                    Granted            Ready (message)
      UNLOADED ────────────▶ LOADING ────────────────▶ READY
         ▲  ▲                 │    │                   │   │
         │  │       crash,    │    │ no longer wanted  │   │ idle, evicted, unloaded, removed, hung
         │  │       failure   ▼    ▼                   │   ▼
         │  └──────────── BACKING_OFF ◀────────────────┘ STOPPING ──┐
         │     time is up       ▲       crash                       │ process gone
         │                      └───────────────────────────────────┤ (it hung)
         └──────────────────────────────────────────────────────────┘

A request is in the owner's queue, and so counted as a reference, before anyone hears that the model is ready: nothing
evicts a model that a request waits for. Events change facts; ``_settle`` then takes every step that the facts allow,
so a lost or doubled event costs nothing but time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from agentd.models import admission
from agentd.models import events as on
from agentd.models.inspect import NotAModel
from agentd.models.launcher import Launcher, Prepared
from agentd.models.ledger import Ledger
from agentd.models.process import Exit, Worker
from agentd.models.settings import HostSettings
from agentd.models.ticket import Ticket
from agentd.models.types import (
    Chunk,
    GenerationFailed,
    LoadableModel,
    ModelState,
    ModelStatus,
    Refused,
)
from slmfleet import logs
from slmfleet.v1 import worker_pb2

log = logs.get(__name__)
State = ModelState
# More events than this in one inbox mean that requests come faster than they can even be refused.
_INBOX = 4096
# Progress of running requests is looked at this often.
_WATCH_S = 1.0
# A warm model that found no memory asks again after this long.
_ASK_AGAIN_S = 30.0
_MEMORY_MAX_AGE_S = 5.0
_LOG_PREFIX = re.compile(r"^[\d.]+ [EF] +\S+: +")


class Broker(Protocol):
    """The scheduler as owners see it. Calls never block; answers come as Granted, Denied and Evict."""

    def want(self, model: LoadableModel, prepared: Prepared) -> None:
        """Ask for memory. Asking twice is asking once."""
        ...

    def unwant(self, model: LoadableModel) -> None:
        """Take the wish back."""
        ...

    def correct(self, model: LoadableModel, memory_bytes: int, load_seconds: float) -> None:
        """What the loaded model really takes."""
        ...

    def release(self, model: LoadableModel) -> None:
        """The memory is back."""
        ...

    def changed(self) -> None:
        """Something happened that a plan may depend on."""
        ...


class Owner:
    """Owns one model's worker, queue and timers. Everything but ``run`` may be called from callbacks."""

    def __init__(
        self,
        model: LoadableModel,
        settings: HostSettings,
        launcher: Launcher,
        broker: Broker,
        notify: Callable[[ModelStatus], None],
    ) -> None:
        self.model = model
        self.ledger = Ledger()
        self.ended = False
        self._settings = settings
        self._launcher = launcher
        self._broker = broker
        self._notify = notify
        self._inbox: asyncio.Queue[on.Event] = asyncio.Queue(_INBOX)
        self._effects: asyncio.TaskGroup
        self._timer: asyncio.TimerHandle | None = None
        self._state = State.UNLOADED
        self._closing = False
        self._reason = ""
        # Requests: those that wait, and those in the worker by their id there.
        self._queue: list[Ticket] = []
        self._running: dict[int, Ticket] = {}
        self._last_id = 0
        # Loading: what is known of the files, and whether the planner (or the header's reader) was asked.
        self._prepared: Prepared | None = None
        self._asked = False
        self._ask_again_s = 0.0
        self._holds: list[asyncio.Future[None]] = []
        self._unloads: list[asyncio.Future[None]] = []
        # The worker; ``_serial`` names it in events. ``_verdict``: why we killed it ourselves.
        self._worker: Worker | None = None
        self._serial = 0
        self._slots = 1
        self._verdict = ""
        self._failure = ""
        self._load_started_s = 0.0
        self._ready_s: float | None = None
        self._load_seconds: float | None = None
        self._last_used_s = 0.0
        self._keep_alive_s: float | None = None
        self._leave = ""
        self._crashes = 0
        self._backoff_until_s = 0.0
        self._memory = (0.0, 0)

    # Called from outside the task.

    def post(self, event: on.Event) -> bool:
        """Put an event into the inbox; False if it is full."""
        try:
            self._inbox.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("an inbox is full", model=str(self.model.key), event=type(event).__name__)
            return False
        return True

    @property
    def closing(self) -> bool:
        """True once the desired state dropped the model. Advisory."""
        return self._closing

    @property
    def references(self) -> int:
        """Requests that run or wait. Advisory."""
        return len(self._queue) + len(self._running)

    @property
    def last_used_s(self) -> float:
        """Loop time of the last request's end, or of readiness. Advisory."""
        return self._last_used_s

    @property
    def state(self) -> ModelState:
        """Advisory."""
        return self._state

    def status(self) -> ModelStatus:
        """What is so now. Advisory."""
        return ModelStatus(
            key=self.model.key,
            state=self._state,
            format=self.model.format,
            pid=self._worker.pid if self._worker else None,
            memory_bytes=self._memory_bytes(),
            in_flight=len(self._running),
            queued=len(self._queue),
            reason=self._reason,
            loaded_at_s=self._ready_s,
            load_seconds=self._load_seconds,
            crashes=self._crashes,
        )

    async def run(self) -> None:
        """Serve the inbox until the model is closed and gone, or until cancelled; then no worker is left."""
        try:
            async with asyncio.TaskGroup() as self._effects:
                while True:
                    now = _now()
                    self._settle(now)
                    if self._is_over():
                        return
                    self._arm(now)
                    self._handle(await self._inbox.get(), _now())
        finally:
            self.ended = True
            await self._shut_down()

    def _is_over(self) -> bool:
        idle = self._state in (State.UNLOADED, State.BACKING_OFF) and not self._asked
        return self._closing and idle and not self.references and self._inbox.empty()

    async def _shut_down(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        error = GenerationFailed("shutting_down", "the node is shutting down")
        refusal = Refused(503, "shutting_down", "the node is shutting down; ask again later", 10.0)
        for ticket in [*self._running.values()]:
            ticket.fail(error)
        # Requests may have come after the last event that was handled.
        while not self._inbox.empty():
            match self._inbox.get_nowait():
                case on.Submit(ticket):
                    self._queue.append(ticket)
                case on.Spawned(_, worker):
                    self._worker = worker
                case on.Probe(answer) | on.Hold(answer) | on.Unload(answer):
                    _settle_future(answer, refusal)
                case _:
                    pass
        for ticket in self._queue:
            ticket.fail(refusal)
        self._queue.clear()
        self._answer_holds(refusal)
        if self._worker is not None:
            await self._worker.stop(self._settings.stop_grace_s)

    # Events: each changes facts.

    def _handle(self, event: on.Event, now: float) -> None:
        match self._state, event:
            case _, on.Submit(ticket):
                self._admit(ticket, now)
            case _, on.Abandon(ticket):
                self._abandon(ticket)
            case _, on.Configure(model):
                self._configure(model)
            case _, on.Close():
                self._closing = True
            case _, on.Probe(answer):
                _settle_future(answer, None)
            case _, on.Hold(answer):
                self._hold(answer, now)
            case ((State.UNLOADED | State.BACKING_OFF), on.Unload(answer)):
                _settle_future(answer, None)
            case _, on.Unload(answer):
                self._unloads.append(answer)
                self._leave = "asked to unload"
            case _, on.Tick():
                pass
            case State.UNLOADED, on.Prepare(model, prepared, error):
                self._on_prepared(model, prepared, error, now)
            case State.UNLOADED, on.Granted() if self._asked and self._prepared is not None:
                self._launch(now)
            case _, on.Granted():
                self._broker.release(self.model)
            case State.UNLOADED, on.Denied(reason) if self._asked:
                self._on_denied(reason, now)
            case State.READY, on.Evict(reason) if not self.references:
                self._leave = reason
                self.ledger.current.evictions += 1
            case _, on.Evict():
                # Too late: somebody uses it. The planner looks again.
                self._broker.changed()
            case _, (on.Spawned(serial) | on.SpawnFailed(serial) | on.Replied(serial) | on.Exited(serial)) if (
                serial != self._serial
            ):
                pass
            case State.LOADING, on.Spawned(_, worker):
                self._worker = worker
                assert self._prepared is not None
                worker.send(self._prepared.load)
            case State.STOPPING, on.Spawned(_, worker):
                self._worker = worker
                self._stop_process()
            case ((State.LOADING | State.STOPPING), on.SpawnFailed(_, reason)):
                self._broker.release(self.model)
                self._crashed(f"no process could be started: {reason}", now)
            case _, on.Replied(_, reply):
                self._on_message(reply, now)
            case _, on.Exited(_, how):
                self._on_exit(how, now)
            case _:
                log.debug("an event came too late", model=str(self.model.key), event=type(event).__name__)

    def _admit(self, ticket: Ticket, now: float) -> None:
        if ticket.finished:
            return
        if self._closing:
            self._refuse(ticket, 404, "model_not_found", f"{self.model.key} is being removed from this node", None)
        elif self._state is State.BACKING_OFF:
            self._refuse_backing_off(ticket, now)
        elif len(self._queue) >= self._settings.max_queued:
            self._refuse_waiting(ticket, now, f"{len(self._queue)} requests already wait for {self.model.key}")
        else:
            self._queue.append(ticket)

    def _abandon(self, ticket: Ticket) -> None:
        if ticket.finished:
            return
        ticket.close()
        self.ledger.current.requests_cancelled += 1
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif ticket.id in self._running:
            self._cancel_in_worker(ticket)

    def _configure(self, model: LoadableModel) -> None:
        old, self.model = self.model, model
        self._closing = False
        if _load_key(old) != _load_key(model):
            self._prepared = None
            # A wish that was made for the old files is of no use: the next step asks anew.
            if self._asked:
                self._asked = False
                self._broker.unwant(old)
            if self._state in (State.LOADING, State.READY):
                self._leave = "its settings changed"

    def _hold(self, answer: asyncio.Future[None], now: float) -> None:
        if self._state is State.READY:
            self._last_used_s = now
            _settle_future(answer, None)
        elif self._state is State.BACKING_OFF:
            wait = self._backoff_until_s - now
            _settle_future(answer, Refused(503, "model_backing_off", self._reason, wait))
        else:
            self._holds.append(answer)

    def _on_prepared(self, model: LoadableModel, prepared: Prepared | None, error: str, now: float) -> None:
        self._asked = False
        if _load_key(model) != _load_key(self.model):
            return
        if prepared is None:
            self._crashed(error, now)
        else:
            self._prepared = prepared

    def _on_denied(self, reason: str, now: float) -> None:
        self._asked = False
        self._ask_again_s = now + _ASK_AGAIN_S
        self._reason = reason
        for ticket in self._take_queue():
            self._refuse(ticket, 503, "insufficient_memory", reason, _ASK_AGAIN_S)
        self._answer_holds(Refused(503, "insufficient_memory", reason, _ASK_AGAIN_S))
        self._tell()

    def on_reply(self, serial: int, reply: worker_pb2.WorkerReply) -> None:
        """A message of the worker, straight from its socket. Pieces of answers skip the inbox: they change nothing
        but their request, and there are many."""
        kind = reply.WhichOneof("message")
        if kind == "chunk":
            ticket = self._running.get(reply.request_id)
            if ticket is not None and serial == self._serial:
                ticket.push(_chunk(reply.chunk), _now())
        else:
            self.post(on.Replied(serial, reply))

    def on_exit(self, serial: int, how: Exit) -> None:
        """The worker is gone."""
        self.post(on.Exited(serial, how))

    def _on_message(self, reply: worker_pb2.WorkerReply, now: float) -> None:
        match self._state, reply.WhichOneof("message"):
            case State.LOADING, "ready":
                self._on_ready(reply.ready, now)
            case State.LOADING, "failed":
                # It ends by itself now; what it said is better than what its exit status says.
                self._failure = reply.failed.message
            case _, "heartbeat":
                for progress in reply.heartbeat.progress:
                    if (ticket := self._running.get(progress.request_id)) and progress.tokens > ticket.progress_tokens:
                        ticket.progress_tokens = progress.tokens
                        ticket.progress_s = now
            case _, ("done" | "failed"):
                if ticket := self._running.pop(reply.request_id, None):
                    self._on_end(ticket, reply, now)
            case _:
                pass

    def _on_ready(self, ready: worker_pb2.WorkerReply.Ready, now: float) -> None:
        self._slots = max(1, ready.slots)
        self._ready_s = self._last_used_s = now
        self._load_seconds = now - self._load_started_s
        self.ledger.loaded(self._load_seconds)
        self._reason = ""
        self._measure(now)
        self._move(State.READY)
        self._answer_holds(None)

    def _on_end(self, ticket: Ticket, reply: worker_pb2.WorkerReply, now: float) -> None:
        self._last_used_s = now
        if ticket.request.keep_alive_s is not None:
            self._keep_alive_s = ticket.request.keep_alive_s
        if reply.WhichOneof("message") == "done":
            self._crashes = 0
            self.ledger.done(ticket, reply.done, now, self._load_started_s, self._ready_s or now)
        elif reply.failed.status:
            failed = reply.failed
            self._refuse(ticket, failed.status, failed.code, failed.message, None)
        else:
            self.ledger.failed(ticket, now)
            ticket.fail(GenerationFailed(reply.failed.code or "generation_failed", reply.failed.message))
        self._measure(now)

    def _on_exit(self, how: Exit, now: float) -> None:
        expected = self._state is State.STOPPING and not self._verdict
        reason = self._verdict or _why(self._failure, how)
        self._worker = None
        self._ready_s = None
        self._verdict = self._failure = self._leave = ""
        self._memory = (0.0, 0)
        self._broker.release(self.model)
        if expected:
            self.ledger.current.unloads += 1
            self._move(State.UNLOADED)
            for answer in self._unloads:
                _settle_future(answer, None)
            self._unloads.clear()
        else:
            self._crashed(reason, now)

    def _crashed(self, reason: str, now: float) -> None:
        self._crashes += 1
        self.ledger.current.crashes += 1
        wait = admission.backoff_s(self._crashes, self._settings.backoff)
        self._backoff_until_s = now + wait
        degraded = self._crashes >= self._settings.backoff.degraded_after
        self._reason = f"{reason} ({self._crashes} times in a row)" if degraded else reason
        log.warning("worker failed", model=str(self.model.key), reason=reason, crashes=self._crashes, wait_s=wait)
        for ticket in self._running.values():
            self.ledger.failed(ticket, now)
            ticket.fail(GenerationFailed("worker_failed", f"the model failed while it answered: {reason}"))
        self._running.clear()
        for ticket in self._take_queue():
            self._refuse_backing_off(ticket, now)
        self._answer_holds(Refused(503, "model_load_failed", self._reason, wait))
        for answer in self._unloads:
            _settle_future(answer, None)
        self._unloads.clear()
        self._move(State.BACKING_OFF)

    # Steps: each is taken as soon as the facts allow it.

    def _settle(self, now: float) -> None:
        self._expire(now)
        if self._state is State.BACKING_OFF and now >= self._backoff_until_s:
            self._move(State.UNLOADED)
        match self._state:
            case State.UNLOADED:
                self._ask(now)
            case State.LOADING:
                self._watch_load(now)
            case State.READY:
                self._dispatch(now)
                self._watch_progress(now)
                if self._state is State.READY and not self.references and (why := self._why_leave(now)):
                    log.info("unloading", model=str(self.model.key), reason=why)
                    self._move(State.STOPPING)
                    self._stop_process()
            case _:
                pass

    def _expire(self, now: float) -> None:
        for ticket in [t for t in self._queue if now >= min(t.queue_deadline_s, t.total_deadline_s)]:
            self._queue.remove(ticket)
            waited = now - ticket.submitted_s
            self._refuse_waiting(
                ticket, now, f"the request waited {waited:.0f} s for {self.model.key} without its turn"
            )
        for ticket in self._running.values():
            if now >= ticket.total_deadline_s and not ticket.finished:
                self.ledger.failed(ticket, now)
                message = f"the answer was not complete after {ticket.request.timeout_s:g} s"
                ticket.fail(GenerationFailed("timeout", message))
                self._cancel_in_worker(ticket)

    def _is_wanted(self, now: float) -> bool:
        warm = self.model.warm and not self._closing and now >= self._ask_again_s
        return bool(self._queue or self._holds) or warm

    def _ask(self, now: float) -> None:
        if not self._is_wanted(now):
            if self._asked and self._prepared is not None:
                self._asked = False
                self._broker.unwant(self.model)
        elif not self._asked:
            self._asked = True
            if self._prepared is None:
                self._effects.create_task(self._prepare(self.model), name=f"prepare {self.model.key}")
            else:
                self._broker.want(self.model, self._prepared)

    async def _prepare(self, model: LoadableModel) -> None:
        try:
            prepared = await self._launcher.prepare(model)
        except NotAModel as error:
            self.post(on.Prepare(model, None, str(error)))
        else:
            self.post(on.Prepare(model, prepared))

    def _launch(self, now: float) -> None:
        self._asked = False
        if not self._is_wanted(now):
            self._broker.release(self.model)
            return
        self._serial += 1
        self._load_started_s = now
        self._leave = ""
        self._keep_alive_s = None
        self._move(State.LOADING)
        self._effects.create_task(self._spawn(self.model, self._serial), name=f"spawn {self.model.key}")

    async def _spawn(self, model: LoadableModel, serial: int) -> None:
        try:
            worker = await self._launcher.start(
                model,
                lambda reply: self.on_reply(serial, reply),
                lambda how: self.on_exit(serial, how),
            )
        except OSError as error:
            self.post(on.SpawnFailed(serial, error.strerror or str(error)))
        else:
            self.post(on.Spawned(serial, worker))

    def _watch_load(self, now: float) -> None:
        limit = self._load_limit_s()
        if now - self._load_started_s >= limit:
            self._kill(f"it was not loaded after {limit:.0f} s")
        elif (self._closing or self._leave) and not self.references:
            self._move(State.STOPPING)
            self._stop_process()

    def _dispatch(self, now: float) -> None:
        assert self._worker is not None
        if self._leave and not self._running:
            # Settings changed: those who wait get the new worker.
            self._move(State.STOPPING)
            self._stop_process()
            return
        while self._queue and len(self._running) < self._slots and not self._leave:
            ticket = self._queue.pop(admission.next_index(self._queue, now))
            self._last_id += 1
            ticket.id = self._last_id
            ticket.sent_s = ticket.progress_s = now
            self._running[ticket.id] = ticket
            ticket.message.request_id = ticket.id
            self._worker.send(ticket.message)

    def _watch_progress(self, now: float) -> None:
        limit = admission.hang_limit_s(
            self.ledger.prefill_tokens_per_s, self._settings.prefill_chunk, self._settings.hang_floor_s
        )
        for ticket in self._running.values():
            if now - ticket.progress_s >= limit:
                self._kill(f"it hung: no progress for {limit:.0f} s")
                return

    def _why_leave(self, now: float) -> str:
        if self._closing:
            return "no longer assigned to this node"
        if self._leave:
            return self._leave
        idle = self._idle_limit_s()
        if idle is not None and now - self._last_used_s >= idle:
            return f"idle for {idle:g} s"
        return ""

    def _idle_limit_s(self) -> float | None:
        """Seconds of idleness after which the model goes; None: never."""
        if self.model.warm:
            return None
        for seconds in (self._keep_alive_s, self.model.keep_alive_s, self._settings.keep_alive_s):
            if seconds is not None:
                return seconds if seconds >= 0 else None
        return None

    def _load_limit_s(self) -> float:
        settings = self._settings
        return admission.load_timeout_s(self.model.size_bytes, settings.load_timeout_s, settings.load_seconds_per_byte)

    def _kill(self, verdict: str) -> None:
        """End the worker without asking it; its end is a crash with this reason."""
        self._verdict = verdict
        self._move(State.STOPPING)
        if self._worker is not None:
            self._worker.kill()

    def _stop_process(self) -> None:
        if self._worker is None:
            return
        if self._verdict:
            self._worker.kill()
        else:
            stop = self._worker.stop(self._settings.stop_grace_s)
            self._effects.create_task(stop, name=f"stop {self.model.key}")

    def _cancel_in_worker(self, ticket: Ticket) -> None:
        if self._worker is not None:
            cancel = worker_pb2.WorkerRequest.Cancel()
            self._worker.send(worker_pb2.WorkerRequest(request_id=ticket.id, cancel=cancel))

    def _arm(self, now: float) -> None:
        """Have a Tick posted at the next moment that matters."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moments = [min(t.queue_deadline_s, t.total_deadline_s) for t in self._queue]
        match self._state:
            case State.BACKING_OFF:
                moments.append(self._backoff_until_s)
            case State.UNLOADED if self.model.warm and not self._asked:
                moments.append(self._ask_again_s)
            case State.LOADING:
                moments.append(self._load_started_s + self._load_limit_s())
            case State.READY if self._running:
                moments.append(now + _WATCH_S)
            case State.READY:
                idle = self._idle_limit_s()
                moments += [] if idle is None else [self._last_used_s + idle]
            case _:
                pass
        moments += [t.total_deadline_s for t in self._running.values() if not t.finished]
        if moments:
            self._timer = asyncio.get_running_loop().call_at(min(moments), self.post, on.Tick())

    # Helpers.

    def _move(self, state: ModelState) -> None:
        self._state = state
        self._broker.changed()
        self._tell()

    def _tell(self) -> None:
        self._notify(self.status())

    def _take_queue(self) -> list[Ticket]:
        queue, self._queue = self._queue, []
        return queue

    def _answer_holds(self, error: Exception | None) -> None:
        for answer in self._holds:
            _settle_future(answer, error)
        self._holds.clear()

    def _measure(self, now: float) -> None:
        if self._worker is not None:
            self._memory = (now, self._launcher.memory_bytes(self._worker))
            self._broker.correct(self.model, self._memory[1], self._load_seconds or 0.0)

    def _memory_bytes(self) -> int:
        now = _now()
        if self._worker is not None and now - self._memory[0] > _MEMORY_MAX_AGE_S:
            self._memory = (now, self._launcher.memory_bytes(self._worker))
        return self._memory[1]

    def _refuse(self, ticket: Ticket, status: int, code: str, message: str, retry_after_s: float | None) -> None:
        self.ledger.refused(code)
        ticket.fail(Refused(status, code, message, retry_after_s))

    def _refuse_backing_off(self, ticket: Ticket, now: float) -> None:
        wait = max(1.0, self._backoff_until_s - now)
        message = f"{self.model.key} can't be served for another {wait:.0f} s: {self._reason}"
        self._refuse(ticket, 503, "model_backing_off", message, wait)

    def _refuse_waiting(self, ticket: Ticket, now: float, what: str) -> None:
        """429 while the model serves, 503 with the load's progress while it does not."""
        if self._state is State.READY:
            oldest = max((now - t.sent_s for t in self._running.values()), default=0.0)
            wait = admission.retry_after_s(len(self._queue) + 1, self._slots, self.ledger.service_s, oldest)
            self._refuse(ticket, 429, "queue_full", f"{what}; ask again in {wait:.0f} s", wait)
            return
        expected = self._load_seconds or max(1.0, self.model.size_bytes * self._settings.load_seconds_per_byte)
        since = now - self._load_started_s if self._state is State.LOADING else 0.0
        wait = max(1.0, expected - since)
        doing = f"it has been loading for {since:.0f} s" if self._state is State.LOADING else "it waits for memory"
        self._refuse(ticket, 503, "model_loading", f"{what}: {doing}", wait)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _settle_future(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)


def _why(failure: str, how: Exit) -> str:
    """One sentence about an end that nobody asked for: what the worker said, else its status and last lines."""
    # llama.cpp: "0.00.004.025 E llama_model_load: error loading model: ..."; its first error is the cause.
    errors = [_LOG_PREFIX.sub("", line) for line in how.lines if _LOG_PREFIX.match(line)]
    said = errors[0] if errors else "; ".join(how.lines[-3:])
    if failure:
        return f"{failure}: {said}" if errors else failure
    return f"the worker {how}: {said}" if said else f"the worker {how}"


def _chunk(chunk: worker_pb2.WorkerReply.Chunk) -> Chunk:
    delta = json.loads(chunk.delta) if chunk.delta else {"content": chunk.text}
    return Chunk(delta, chunk.tokens, json.loads(chunk.logprobs) if chunk.logprobs else None)


def _load_key(model: LoadableModel) -> tuple[Path, str, int]:
    """What of a model needs a new worker when it changes."""
    return model.entry, model.format, model.context_tokens
