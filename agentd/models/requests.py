"""The requests of one model: those that wait and those that run in its worker. Owned by the model's owner."""

from __future__ import annotations

import json
from collections.abc import Iterator

from agentd.models import admission
from agentd.models.ledger import Ledger
from agentd.models.ticket import Ticket
from agentd.models.types import Chunk, GenerationFailed, Refused
from slmfleet.v1 import worker_pb2
from slmfleet.v1.worker_pb2 import WorkerReply, WorkerRequest


class Requests:
    """Every ticket is in exactly one of ``waiting`` and ``running`` until its worker (or nobody) holds it no more.

    A ticket whose caller left stays in ``running`` until the worker says that it is through: its slot is not free.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.waiting: list[Ticket] = []
        # By the id that they have in the worker.
        self.running: dict[int, Ticket] = {}
        self._ledger = ledger
        self._last_id = 0

    @property
    def references(self) -> int:
        """How many need the model."""
        return len(self.waiting) + len(self.running)

    def start(self, now_s: float) -> WorkerRequest:
        """Move the best waiting request into a slot; what to tell the worker."""
        ticket = self.waiting.pop(admission.next_index(self.waiting))
        self._last_id += 1
        ticket.id = ticket.message.request_id = self._last_id
        ticket.sent_s = ticket.progress_s = now_s
        self.running[ticket.id] = ticket
        return ticket.message

    def abandon(self, ticket: Ticket, now_s: float) -> Iterator[WorkerRequest]:
        """The caller left; what to tell the worker."""
        if ticket.finished:
            return
        ticket.close()
        self._ledger.current.requests_cancelled += 1
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        elif ticket.id in self.running:
            yield _cancel(ticket, now_s)

    def expire_running(self, now_s: float) -> Iterator[WorkerRequest]:
        """Fail the requests whose whole time is over; what to tell the worker."""
        for ticket in self.running.values():
            if now_s >= ticket.total_deadline_s and not ticket.finished:
                self.fail(ticket, "timeout", f"the answer was not complete after {ticket.request.timeout_s:g} s", now_s)
                yield _cancel(ticket, now_s)

    def take_expired(self, now_s: float) -> list[Ticket]:
        """Take out the requests that waited too long."""
        expired = [t for t in self.waiting if now_s >= min(t.queue_deadline_s, t.total_deadline_s)]
        for ticket in expired:
            self.waiting.remove(ticket)
        return expired

    def take_waiting(self) -> list[Ticket]:
        """Take out all requests that wait."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def chunk(self, reply: WorkerReply, now_s: float) -> None:
        """A piece of an answer."""
        if ticket := self.running.get(reply.request_id):
            ticket.push(_chunk(reply.chunk), now_s)

    def heartbeat(self, heartbeat: WorkerReply.Heartbeat, now_s: float) -> None:
        """What the worker says of the requests' progress."""
        for progress in heartbeat.progress:
            ticket = self.running.get(progress.request_id)
            if ticket is not None and not ticket.finished and progress.tokens > ticket.progress_tokens:
                ticket.progress_tokens = progress.tokens
                ticket.progress_s = now_s

    def speed(self, now_s: float) -> float | None:
        """Tokens per second of all answers that are being written, together; None if it is too early to say."""
        writing = [t for t in self.running.values() if t.first_token_s is not None and not t.finished]
        if not writing:
            return None
        speeds = [admission.speed_so_far(t.output_tokens, now_s - (t.first_token_s or now_s)) for t in writing]
        known = [speed for speed in speeds if speed is not None]
        return sum(known) if len(known) == len(speeds) else None

    def end(self, reply: WorkerReply, now_s: float, load_started_s: float, ready_s: float) -> Ticket | None:
        """Done or Failed; the ticket, unless it was heard of before."""
        ticket = self.running.pop(reply.request_id, None)
        if ticket is None:
            return None
        failed = reply.failed
        if reply.WhichOneof("message") == "done":
            self._ledger.done(ticket, reply.done, now_s, load_started_s, ready_s)
        elif failed.status:
            wait = failed.retry_after_seconds or None
            self.refuse(ticket, Refused(failed.status, failed.code, failed.message, wait))
        else:
            self.fail(ticket, failed.code or "generation_failed", failed.message, now_s)
        return ticket

    def fail_running(self, code: str, message: str, now_s: float) -> None:
        """The worker is gone."""
        for ticket in self.running.values():
            self.fail(ticket, code, message, now_s)
        self.running.clear()

    def fail(self, ticket: Ticket, code: str, message: str, now_s: float) -> None:
        """End a request that had begun."""
        if not ticket.internal:
            self._ledger.failed(ticket, now_s)
        ticket.fail(GenerationFailed(code, message))

    def refuse(self, ticket: Ticket, refusal: Refused) -> None:
        """End a request of which nothing ran."""
        if not ticket.finished:
            if not ticket.internal:
                self._ledger.refused(refusal.code)
            ticket.fail(refusal)

    def stuck(self, now_s: float, limit_s: float) -> bool:
        """True if a running request made no progress for ``limit_s``."""
        return any(now_s - ticket.progress_s >= limit_s for ticket in self.running.values())

    def deadlines(self) -> Iterator[float]:
        """Moments at which a request's time is over."""
        for ticket in self.waiting:
            yield min(ticket.queue_deadline_s, ticket.total_deadline_s)
        for ticket in self.running.values():
            if not ticket.finished:
                yield ticket.total_deadline_s


def _cancel(ticket: Ticket, now_s: float) -> WorkerRequest:
    # From here on only its end counts as progress: a worker that is deaf to this hangs.
    ticket.progress_s = now_s
    return WorkerRequest(request_id=ticket.id, cancel=WorkerRequest.Cancel())


def _chunk(chunk: worker_pb2.WorkerReply.Chunk) -> Chunk:
    delta = json.loads(chunk.delta) if chunk.delta else {"content": chunk.text}
    return Chunk(delta, chunk.tokens, json.loads(chunk.logprobs) if chunk.logprobs else None)
