"""What must hold after every single event of a model host, checked from the inside while a test runs it.

``Watch(host)`` looks after each event of each owner and each action of the scheduler; what it finds is in ``broken``.
"""

from __future__ import annotations

from typing import Any

from agentd.models import events as on
from agentd.models.host import Host
from agentd.models.owner import Owner
from agentd.models.requests import Requests
from agentd.models.scheduler import Scheduler
from agentd.models.ticket import Ticket
from agentd.models.types import ModelState


class Watch:
    """Installed with pytest's monkeypatch, so that it is gone after the test."""

    def __init__(self, monkeypatch: Any) -> None:
        self.broken: list[str] = []
        self.events = 0
        self.evictions = 0
        # Those that run under this watch.
        self.hosts: list[Host] = []
        self._tickets: dict[int, Ticket] = {}
        self._ends: dict[int, int] = {}
        watch = self

        handle, settle, apply = Owner._handle, Owner._settle, Scheduler._apply
        finish, fail, submit, start = Ticket.finish, Ticket.fail, Host._submit, Requests.start

        def watched_handle(owner: Owner, event: on.Event, now: float) -> None:
            before = (owner.state, owner.references, owner.running, owner.model.warm, owner._life.leave)
            handle(owner, event, now)
            watch.after_event(owner, event, *before)

        def watched_settle(owner: Owner, now: float) -> None:
            before = owner.state
            settle(owner, now)
            watch.after_step(owner, before)

        def watched_apply(scheduler: Scheduler, action: Any) -> None:
            apply(scheduler, action)
            watch.after_action(scheduler)

        def watched_finish(ticket: Ticket, last: Any) -> None:
            watch.end_of(ticket)
            finish(ticket, last)

        def watched_fail(ticket: Ticket, error: Exception) -> None:
            watch.end_of(ticket)
            fail(ticket, error)

        def watched_submit(host: Host, *arguments: Any) -> Any:
            ticket, owner = submit(host, *arguments)
            watch._tickets[id(ticket)] = ticket
            return ticket, owner

        def watched_start(requests: Requests, now: float) -> Any:
            message = start(requests, now)
            watch.after_start(requests)
            return message

        for cls, name, function in (
            (Owner, "_handle", watched_handle), (Owner, "_settle", watched_settle),
            (Scheduler, "_apply", watched_apply),
            (Ticket, "finish", watched_finish), (Ticket, "fail", watched_fail), (Host, "_submit", watched_submit),
            (Requests, "start", watched_start),
        ):  # fmt: skip
            monkeypatch.setattr(cls, name, function)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def after_event(
        self, owner: Owner, event: on.Event, state: ModelState, references: int, running: int, warm: bool, leave: str
    ) -> None:
        """A model that is used, loaded or kept warm does not go because the planner asks."""
        self.events += 1
        name = f"{owner.model.key} at {type(event).__name__}"
        if isinstance(event, on.Evict) and (references or state is not ModelState.READY or warm):
            self.expect(owner._life.leave == leave, f"{name}: a busy, loading or warm model was told to go")
        if isinstance(event, on.Evict | on.Yield) and owner._life.leave != leave:
            self.evictions += 1
        told = isinstance(event, on.Yield) and owner._life.leave != leave
        self.expect(not (warm and told), f"{name}: a warm model was told to go")
        started = not isinstance(event, on.Exited | on.SpawnFailed | on.Replied | on.Abandon | on.Submit)
        self.expect(owner.running == running or not started, f"{name}: running requests changed")
        ended = isinstance(event, on.Replied) and event.reply.WhichOneof("message") in ("done", "failed")
        if owner.running < running:
            self.expect(ended or isinstance(event, on.Exited), f"{name}: a running request was dropped")
        self.everywhere(owner)

    def after_step(self, owner: Owner, state: ModelState) -> None:
        """A worker that serves is ended for two reasons only: it hangs, or it takes too much. One that others wait for
        goes only when it was told to."""
        went = state is ModelState.READY and owner.state is ModelState.STOPPING
        if went and owner.running:
            self.expect(bool(owner._life.verdict), f"{owner.model.key}: stopped while {owner.running} requests ran")
        waiting = len(owner._requests.waiting)
        if went and waiting and not owner._life.verdict:
            self.expect(bool(owner._life.leave), f"{owner.model.key}: stopped while {waiting} requests waited")
        self.expect(not any(hold.done() for hold in owner._holds), f"{owner.model.key}: held by a caller who left")
        self.everywhere(owner)

    def after_action(self, scheduler: Scheduler) -> None:
        """Never more is granted than there is."""
        budget = scheduler._budget()
        granted = [grant for grant in scheduler._grants.values() if not grant.taken]
        if granted and budget.max_memory_bytes:
            total = scheduler.granted_bytes()
            self.expect(total <= budget.max_memory_bytes, f"{total} bytes granted, {budget.max_memory_bytes} allowed")
        if granted and budget.max_loaded_models:
            loaded = len(scheduler._grants)
            self.expect(loaded <= budget.max_loaded_models, f"{loaded} loaded, {budget.max_loaded_models} allowed")

    def after_start(self, requests: Requests) -> None:
        """Never more requests run on the node than may."""
        for host in self.hosts:
            limit, running = host._max_concurrent(), sum(owner.running for owner in host._owners.values())
            starts = any(owner._requests is requests for owner in host._owners.values())
            self.expect(not starts or not limit or running <= limit, f"{running} requests run, {limit} may")

    def end_of(self, ticket: Ticket) -> None:
        if not ticket.finished:
            # Kept, so that no other gets its id.
            self._tickets[id(ticket)] = ticket
            self._ends[id(ticket)] = self._ends.get(id(ticket), 0) + 1
            self.expect(self._ends[id(ticket)] == 1, "a request was answered twice")

    def everywhere(self, owner: Owner) -> None:
        """Each request is in one place; a worker has memory that was granted; slots are not exceeded."""
        requests, key = owner._requests, owner.model.key
        self.expect(len(requests.running) <= owner._life.slots, f"{key}: more requests than slots")
        twice = {id(t) for t in requests.waiting} & {id(t) for t in requests.running.values()}
        self.expect(not twice and len({id(t) for t in requests.waiting}) == len(requests.waiting), f"{key}: twice")
        self.expect(not any(t.finished for t in requests.waiting), f"{key}: a finished request waits")
        able = owner.state in (ModelState.READY, ModelState.STOPPING)
        self.expect(able or not requests.running, f"{key}: runs nowhere")
        scheduler: Any = owner._broker
        waits = any(isinstance(event, on.Evict | on.Yield) for event in owner._inbox._queue)  # type: ignore[attr-defined]
        going = owner.state is ModelState.STOPPING or bool(owner._life.leave) or waits
        self.expect(going or key not in scheduler._asked_to_go, f"{key}: the planner waits for it in vain")
        has = owner.state in (ModelState.LOADING, ModelState.READY, ModelState.STOPPING)
        grant = scheduler._grants.get(key)
        self.expect(not has or (grant is not None and grant.taken), f"{key}: {owner.state} without memory")
        self.expect(has or grant is None or not grant.taken, f"{key}: {owner.state} keeps memory")

    def lost(self) -> list[Ticket]:
        """Requests without an end that nobody holds any more, when all is quiet."""
        owners = [owner for host in self.hosts for owner in host._owners.values()]
        held = {id(t) for o in owners for t in (*o._requests.waiting, *o._requests.running.values())}
        return [t for key, t in self._tickets.items() if not t.finished and key not in held]
