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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from agentd.models import admission, life, refusals
from agentd.models import events as on
from agentd.models.broker import Broker
from agentd.models.claim import Claim
from agentd.models.failures import Failures
from agentd.models.launcher import Launcher, Prepared
from agentd.models.ledger import Ledger
from agentd.models.life import Life
from agentd.models.places import Places, Rank
from agentd.models.process import Exit
from agentd.models.requests import Requests
from agentd.models.settings import HostSettings, Tuning
from agentd.models.ticket import Ticket
from agentd.models.types import LoadableModel, ModelState, ModelStatus, Refused, RuntimeOptions
from agentd.models.warmup import warm_up
from slmfleet import logs
from slmfleet.modelfiles import NotAModel
from slmfleet.v1.worker_pb2 import WorkerReply, WorkerRequest

log = logs.get(__name__)
State = ModelState
# More events than this in one inbox mean that requests come faster than they can even be refused: such get no place.
_INBOX = 4096
# Progress of running requests is looked at this often.
_WATCH_S = 1.0
_MEMORY_MAX_AGE_S = 5.0


class Owner:
    """Owns one model's worker, queue and timers. Everything but ``run`` may be called from callbacks."""

    def __init__(
        self,
        model: LoadableModel,
        settings: HostSettings,
        launcher: Launcher,
        broker: Broker,
        notify: Callable[[ModelStatus], None],
        places: Places,
        tuning: Callable[[], Tuning],
    ) -> None:
        self.model = model
        self.ledger = Ledger()
        # True once ``run`` is over; nothing that is posted then is read.
        self.ended = False
        self._settings = settings
        self._launcher = launcher
        self._broker = broker
        self._notify = notify
        self._places = places
        self._tuning = tuning
        self._inbox: asyncio.Queue[on.Event] = asyncio.Queue()
        self._effects: asyncio.TaskGroup
        self._timer: asyncio.TimerHandle | None = None
        self._state = State.UNLOADED
        self._life = Life()
        self._requests = Requests(self.ledger)
        self._closing = False
        self._reason = ""
        self._claim = Claim(broker, self._read)
        # A model that found no memory is not asked for again before this for its own sake.
        self._ask_again_s = 0.0
        self._holds: list[asyncio.Future[None]] = []
        self._unloads: list[asyncio.Future[None]] = []
        self._load_seconds: float | None = None
        self._last_used_s = 0.0
        self._failures = Failures(settings.backoff)

    # Called from outside the task.

    def post(self, event: on.Event) -> bool:
        """Put an event into the inbox; False if it comes from a caller and there are too many of those."""
        if self._inbox.qsize() >= _INBOX and isinstance(event, on.FROM_OUTSIDE):
            log.warning("an inbox is full", model=str(self.model.key), event=type(event).__name__)
            return False
        self._inbox.put_nowait(event)
        return True

    def wake(self) -> None:
        """Look again at what can be done."""
        self.post(on.Tick())

    @property
    def closing(self) -> bool:
        """True once the desired state dropped the model. Advisory, like all that is read from outside."""
        return self._closing

    @property
    def references(self) -> int:
        """Requests that run or wait."""
        return self._requests.references

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._requests.running)

    @property
    def turn(self) -> Rank | None:
        """See ``places.Contender``."""
        able = self._state is State.READY and not self._life.leave and len(self._requests.running) < self._life.slots
        if not able or not self._requests.waiting:
            return None
        return (*min(map(admission.rank, self._requests.waiting)), str(self.model.key))

    @property
    def last_used_s(self) -> float:
        """Loop time of the last request's end, or of readiness."""
        return self._last_used_s

    @property
    def state(self) -> ModelState:
        return self._state

    def status(self) -> ModelStatus:
        """What is so now."""
        worker, now = self._life.worker, _now()
        if worker is not None and now - self._life.memory[0] > _MEMORY_MAX_AGE_S:
            self._life.memory = (now, self._launcher.memory_bytes(worker))
        return ModelStatus(
            key=self.model.key,
            state=self._state,
            format=self.model.format,
            pid=worker.pid if worker else None,
            memory_bytes=self._life.memory[1],
            in_flight=len(self._requests.running),
            queued=len(self._requests.waiting),
            reason=self._reason,
            loaded_at_s=self._life.ready_s,
            load_seconds=self._load_seconds,
            crashes=self._failures.count,
            degraded=self._failures.degraded,
            log_lines=self._failures.lines,
            thrashing=self._life.thrashing,
            limit_bytes=worker.limit_bytes if worker else 0,
        )

    def on_reply(self, serial: int, reply: WorkerReply) -> None:
        """A message of the worker, straight from its socket. Pieces of answers skip the inbox: they change nothing
        but their request, and there are many."""
        if reply.WhichOneof("message") != "chunk":
            self.post(on.Replied(serial, reply))
        elif serial == self._life.serial:
            self._requests.chunk(reply, _now())

    def on_exit(self, serial: int, how: Exit) -> None:
        """A worker is gone."""
        self.post(on.Exited(serial, how))

    # The task.

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
        idle = self._state in (State.UNLOADED, State.BACKING_OFF) and not self._claim.open
        return self._closing and idle and not self.references and self._inbox.empty()

    async def _shut_down(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        refusal = refusals.shutting_down()
        self._requests.fail_running("shutting_down", refusal.message, _now())
        # What came after the last event that was handled must not wait for ever either.
        while not self._inbox.empty():
            match self._inbox.get_nowait():
                case on.Submit(ticket):
                    self._requests.waiting.append(ticket)
                case on.Spawned(serial, worker) if serial == self._life.serial:
                    self._life.worker = worker
                case on.Probe(answer) | on.Hold(answer) | on.Unload(answer):
                    _resolve([answer], refusal)
                case _:
                    pass
        for ticket in self._requests.take_waiting():
            self._requests.refuse(ticket, refusal)
        _resolve(self._holds, refusal)
        _resolve(self._unloads, None)
        if self._life.worker is not None:
            await self._life.worker.stop(self._settings.stop_grace_s)

    # Events: each changes facts.

    def _handle(self, event: on.Event, now: float) -> None:
        match self._state, event:
            case _, on.Submit(ticket):
                self._admit(ticket, now)
            case _, on.Abandon(ticket):
                self._tell_worker(self._requests.abandon(ticket, now))
            case _, on.Configure(model):
                self._configure(model)
            case _, on.Close():
                self._closing = True
                _resolve(self._holds, refusals.removed(self.model.key))
            case _, on.Probe(answer):
                _resolve([answer], None)
            case _, on.Hold(answer) if self._closing:
                _resolve([answer], refusals.removed(self.model.key))
            case State.READY, on.Hold(answer):
                self._last_used_s = now
                _resolve([answer], None)
            case State.BACKING_OFF, on.Hold(answer):
                _resolve([answer], self._backing_off(now))
            case _, on.Hold(answer):
                self._holds.append(answer)
            case ((State.UNLOADED | State.BACKING_OFF), on.Unload(answer)):
                _resolve([answer], None)
            case _, on.Unload(answer):
                self._unloads.append(answer)
                self._life.leave = "asked to unload"
            case _, on.Tick():
                pass
            case State.UNLOADED, on.Prepare(model, prepared, error):
                self._on_prepared(model, prepared, error, now)
            case State.UNLOADED, on.Granted(wish) if self._claim.answers(wish):
                self._start(now)
            case State.UNLOADED, on.Denied(wish, reason) if self._claim.answers(wish):
                self._on_denied(reason, now)
            case State.READY, on.Evict(reason) if not self.references and not self.model.warm:
                self._life.leave = reason
                self.ledger.current.evictions += 1
            case State.READY, on.Yield(reason) if not self.model.warm:
                self._life.leave = reason
                self.ledger.current.evictions += 1
            case _, (on.Evict() | on.Yield()):
                # Too late: somebody uses it, or it is gone already. The planner looks again.
                self._broker.declined(self.model)
            case State.UNLOADED, on.Retune():
                self._claim.forget(self.model)
            case _, (on.Spawned(serial, _) | on.SpawnFailed(serial, _) | on.Replied(serial, _) | on.Exited(serial, _)):
                # Of an earlier worker nothing is of interest any more.
                if serial == self._life.serial:
                    self._on_worker(event, now)
            case _:
                log.debug("an event came too late", model=str(self.model.key), event=type(event).__name__)

    def _on_worker(self, event: on.Event, now: float) -> None:
        match self._state, event:
            case State.LOADING, on.Spawned(_, worker):
                self._life.worker = worker
                worker.send(self._life.load)
            case State.STOPPING, on.Spawned(_, worker):
                self._life.worker = worker
                self._end_worker()
            case ((State.LOADING | State.STOPPING), on.SpawnFailed(_, reason)):
                self._broker.release(self.model)
                self._crashed(f"no process could be started: {reason}", (), now)
            case _, on.Exited(_, how):
                self._on_exited(how, now)
            case State.LOADING, on.Replied(_, reply) if reply.HasField("ready"):
                self._on_ready(reply.ready, now)
            case State.LOADING, on.Replied(_, reply) if reply.HasField("failed"):
                # It ends by itself now; what it said is better than what its exit status says.
                self._life.failure = reply.failed.message
            case _, on.Replied(_, reply) if reply.HasField("heartbeat"):
                self._requests.heartbeat(reply.heartbeat, now)
                self._judge_speed(self._requests.speed(now))
            case _, on.Replied(_, reply) if reply.HasField("done") or reply.HasField("failed"):
                self._on_end(reply, now)
            case _:
                pass

    def _admit(self, ticket: Ticket, now: float) -> None:
        waiting = len(self._requests.waiting)
        if self._closing:
            self._requests.refuse(ticket, refusals.removed(self.model.key))
        elif self._state is State.BACKING_OFF:
            self._requests.refuse(ticket, self._backing_off(now))
        elif waiting >= self._settings.max_queued:
            self._requests.refuse(ticket, self._late(refusals.queue_is_full(self.model.key, waiting), now))
        elif not ticket.finished:
            self._requests.waiting.append(ticket)

    def _configure(self, model: LoadableModel) -> None:
        old, self.model = self.model, model
        self._closing = False
        if _files(old) == _files(model):
            return
        self._claim.forget(old)
        if self._state in (State.LOADING, State.READY):
            self._life.leave = "its settings changed"

    def _on_prepared(self, model: LoadableModel, prepared: Prepared | None, error: str, now: float) -> None:
        self._claim.open = False
        if _files(model) != _files(self.model):
            return
        if prepared is None:
            self._crashed(error, (), now)
        else:
            self._claim.prepared = prepared

    def _on_denied(self, reason: str, now: float) -> None:
        self._ask_again_s = now + refusals.ASK_AGAIN_S
        self._reason = reason
        refusal = refusals.no_memory(reason)
        for ticket in self._requests.take_waiting():
            self._requests.refuse(ticket, refusal)
        _resolve(self._holds, refusal)
        self._notify(self.status())

    def _on_ready(self, ready: WorkerReply.Ready, now: float) -> None:
        self._life.slots = max(1, ready.slots)
        self._life.ready_s = self._last_used_s = now
        self._load_seconds = now - self._life.started_s
        self.ledger.loaded(self._load_seconds)
        self._reason = ""
        self._measure(now)
        self._move(State.READY)
        _resolve(self._holds, None)
        if self.model.warm and not self._requests.waiting:
            self._requests.waiting.extend(warm_up(self.model, self._life.slots, now))

    def _on_end(self, reply: WorkerReply, now: float) -> None:
        life = self._life
        ticket = self._requests.end(reply, now, life.started_s, life.ready_s or now)
        if ticket is None:
            return
        self._last_used_s = now
        if ticket.request.keep_alive_s is not None:
            life.keep_alive_s = ticket.request.keep_alive_s
        if reply.HasField("done") and not ticket.internal:
            self._failures.succeeded()
            speed = admission.decode_speed(reply.done)
            self._judge_speed(speed and speed * (1 + len(self._requests.running)))
        # The kernel walks all pages of the worker to tell this: not after each of many short answers.
        if now - life.memory[0] >= _WATCH_S:
            self._measure(now)

    def _on_exited(self, how: Exit, now: float) -> None:
        ended, self._life = self._life, Life(serial=self._life.serial)
        self._broker.release(self.model)
        # What was read of the files is read again, which costs nothing while they are the same: threads may differ.
        self._claim.forget(self.model)
        if self._state is State.STOPPING and not ended.verdict:
            self.ledger.current.unloads += 1
            self._move(State.UNLOADED)
            _resolve(self._unloads, None)
        else:
            self._crashed(ended.verdict or life.why(ended.failure, how), how.lines, now)

    def _crashed(self, reason: str, lines: Sequence[str], now: float) -> None:
        self.ledger.current.crashes += 1
        self._reason = self._failures.add(reason, lines, now)
        log.warning("worker failed", model=str(self.model.key), reason=reason, crashes=self._failures.count,
                    wait_s=self._failures.until_s - now)  # fmt: skip
        self._move(State.BACKING_OFF)
        self._requests.fail_running("worker_failed", f"the model failed while it answered: {reason}", now)
        refusal = self._backing_off(now)
        for ticket in self._requests.take_waiting():
            self._requests.refuse(ticket, refusal)
        _resolve(self._holds, refusal)
        _resolve(self._unloads, None)

    # Steps: each is taken as soon as the facts allow it.

    def _settle(self, now: float) -> None:
        for ticket in self._requests.take_expired(now):
            what = refusals.waited_too_long(self.model.key, now - ticket.submitted_s)
            self._requests.refuse(ticket, self._late(what, now))
        self._tell_worker(self._requests.expire_running(now))
        # Of those who asked for a load, some may have gone.
        self._holds = [hold for hold in self._holds if not hold.done()]
        if self._state is State.BACKING_OFF and now >= self._failures.until_s:
            self._move(State.UNLOADED)
        match self._state:
            case State.UNLOADED:
                self._ask(now)
            case State.LOADING:
                self._watch_load(now)
            case State.READY:
                self._serve(now)
            case _:
                pass
        self._places.look(self)

    def _is_wanted(self, now: float) -> bool:
        warm = self.model.warm and not self._closing and now >= self._ask_again_s
        return bool(self._requests.waiting or self._holds) or warm

    def _ask(self, now: float) -> None:
        if self._is_wanted(now):
            self._claim.ask(self.model)
        else:
            self._claim.drop(self.model)

    def _read(self, model: LoadableModel) -> None:
        self._effects.create_task(self._prepare(model), name=f"prepare {model.key}")

    async def _prepare(self, model: LoadableModel) -> None:
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                prepared = await self._launcher.prepare(model)
        except NotAModel as error:
            self.post(on.Prepare(model, None, str(error)))
        except OSError as error:
            self.post(on.Prepare(model, None, f"its files can't be read: {error.strerror or 'it took too long'}"))
        else:
            self.post(on.Prepare(model, prepared))

    def _start(self, now: float) -> None:
        prepared = self._claim.prepared
        if prepared is None or not self._is_wanted(now):
            self._broker.unwant(self.model)
            return
        self._broker.taken(self.model)
        self._life = Life(serial=self._life.serial + 1, started_s=now, load=prepared.load)
        self._move(State.LOADING)
        self._effects.create_task(self._spawn(self.model, self._life.serial), name=f"spawn {self.model.key}")

    async def _spawn(self, model: LoadableModel, serial: int) -> None:
        try:
            worker = await self._launcher.start(
                model, lambda reply: self.on_reply(serial, reply), lambda how: self.on_exit(serial, how)
            )
        except OSError as error:
            self.post(on.SpawnFailed(serial, error.strerror or str(error)))
        else:
            self.post(on.Spawned(serial, worker))

    def _watch_load(self, now: float) -> None:
        limit = self._load_limit_s()
        # Written as _arm writes it: a rounding error would make the timer fire for ever.
        if now >= self._life.started_s + limit:
            self._kill(f"it was not loaded after {limit:.0f} s")
        elif excess := self._over_limit(now):
            self._kill(excess)
        elif (self._closing or self._life.leave) and not self.references and not self._holds:
            self._stop()

    def _serve(self, now: float) -> None:
        requests = self._requests
        while self.turn is not None and self._places.may_start(self):
            self._tell_worker([requests.start(now)])
        limit = admission.hang_limit_s(
            self.ledger.prefill_tokens_per_s, self._settings.prefill_chunk, self._settings.hang_floor_s
        )
        if requests.stuck(now, limit):
            self._kill(f"it hung: no progress for {limit:.0f} s")
        elif excess := self._over_limit(now):
            self._kill(excess)
        elif not requests.running and (why := self._why_leave(now)):
            log.info("unloading", model=str(self.model.key), reason=why)
            self._stop()

    def _why_leave(self, now: float) -> str:
        """Why a worker that serves nobody should go; "" if it should stay."""
        if self._life.leave:
            # Those who wait get the next worker.
            return self._life.leave
        if self._requests.waiting:
            return ""
        if self._closing:
            return "no longer assigned to this node"
        idle = self._idle_limit_s()
        return f"idle for {idle:g} s" if idle is not None and now >= self._last_used_s + idle else ""

    def _idle_limit_s(self) -> float | None:
        """Seconds of idleness after which the model goes; None: never."""
        if self.model.warm:
            return None
        for seconds in (self._life.keep_alive_s, self.model.keep_alive_s, self._settings.keep_alive_s):
            if seconds is not None:
                cap = self._tuning().keep_alive_cap_s
                return None if seconds < 0 else seconds if cap is None else min(seconds, cap)
        return None

    def _over_limit(self, now: float) -> str:
        """Why a worker that no cgroup holds must go: agentd is its watchdog. Looked at once a second while it works."""
        worker = self._life.worker
        if worker is None or not worker.is_watched:
            return ""
        if now - self._life.memory[0] >= _WATCH_S:
            self._life.memory = (now, self._launcher.memory_bytes(worker))
        excess = life.over_limit(self._life.memory[1], worker.limit_bytes)
        self.ledger.current.over_limit += bool(excess)
        return excess

    def _judge_speed(self, tokens_per_s: float | None) -> None:
        """Notice a model that is far slower than it was on this device."""
        if tokens_per_s is None:
            return
        usual = self.ledger.decode_tokens_per_s
        slow = usual is not None and tokens_per_s < usual * life.SLOW_SHARE
        why = life.thrash(tokens_per_s, usual, self._launcher.stalled_fraction(self._life.worker)) if slow else ""
        if not slow:
            self.ledger.decoded(tokens_per_s)
        if why and not self._life.thrashing:
            self.ledger.current.thrashes += 1
            log.warning("a model thrashes", model=str(self.model.key), reason=why)
        if bool(why) != bool(self._life.thrashing):
            self._life.thrashing = why
            self._notify(self.status())

    def _load_limit_s(self) -> float:
        settings = self._settings
        return admission.load_timeout_s(self.model.size_bytes, settings.load_timeout_s, settings.load_seconds_per_byte)

    def _stop(self) -> None:
        self._move(State.STOPPING)
        self._end_worker()

    def _kill(self, verdict: str) -> None:
        """End the worker without asking it; its end is a crash with this reason."""
        self._life.verdict = verdict
        self._stop()

    def _end_worker(self) -> None:
        worker = self._life.worker
        if worker is None:
            return
        if self._life.verdict:
            worker.kill()
        else:
            self._effects.create_task(worker.stop(self._settings.stop_grace_s), name=f"stop {self.model.key}")

    def _arm(self, now: float) -> None:
        """Have a Tick posted at the next moment that matters."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moments = list(self._requests.deadlines())
        match self._state:
            case State.BACKING_OFF:
                moments.append(self._failures.until_s)
            case State.UNLOADED if self.model.warm and not self._claim.open:
                moments.append(self._ask_again_s)
            case State.LOADING:
                moments.append(self._life.started_s + self._load_limit_s())
                if self._life.worker is not None and self._life.worker.is_watched:
                    moments.append(now + _WATCH_S)
            case State.READY if self.references:
                moments.append(now + _WATCH_S)
            case State.READY:
                idle = self._idle_limit_s()
                moments += [] if idle is None else [self._last_used_s + idle]
            case _:
                pass
        if moments:
            self._timer = asyncio.get_running_loop().call_at(min(moments), self.post, on.Tick())

    # Helpers.

    def _move(self, state: ModelState) -> None:
        self._state = state
        self._broker.changed()
        self._notify(self.status())

    def _tell_worker(self, messages: Iterable[WorkerRequest]) -> None:
        for message in messages:
            if self._life.worker is not None:
                self._life.worker.send(message)

    def _measure(self, now: float) -> None:
        if self._life.worker is not None:
            self._life.memory = (now, self._launcher.memory_bytes(self._life.worker))
            self._broker.correct(self.model, self._life.memory[1], self._load_seconds or 0.0)

    def _backing_off(self, now: float) -> Refused:
        return refusals.backing_off(self.model.key, self._reason, self._failures.until_s - now)

    def _late(self, what: str, now: float) -> Refused:
        """For a request that can't have its turn: 429 while the model serves, 503 while it does not."""
        if self._state is State.READY:
            oldest = max((now - ticket.sent_s for ticket in self._requests.running.values()), default=0.0)
            return refusals.busy(what, len(self._requests.waiting), self._life.slots, self.ledger.service_s, oldest)
        expected = self._load_seconds or max(1.0, self.model.size_bytes * self._settings.load_seconds_per_byte)
        since = now - self._life.started_s if self._state is State.LOADING else None
        return refusals.loading(what, since, expected, ending=self._state is State.STOPPING)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _resolve(answers: list[asyncio.Future[None]], error: Exception | None) -> None:
    """Answer and forget."""
    for answer in answers:
        if not answer.done():
            answer.set_exception(error) if error else answer.set_result(None)
    answers.clear()


def _files(model: LoadableModel) -> tuple[Path, str, int, RuntimeOptions]:
    """What of a model needs a new worker when it changes."""
    return model.entry, model.format, model.context_tokens, model.runtime
