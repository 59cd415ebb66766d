"""An owner's books: counters for telemetry and /metrics, and the running means that admission decides by."""

from __future__ import annotations

from agentd.models.admission import running_mean
from agentd.models.counters import ModelCounters
from agentd.models.ticket import Ticket
from agentd.models.types import Done, Timings, Vectors
from slmfleet.v1 import worker_pb2


class Ledger:
    """Counts of one model since the daemon started."""

    def __init__(self) -> None:
        # Since the last ``take``.
        self.current = ModelCounters()
        self._taken = ModelCounters()
        # Seconds in the worker, and prompt tokens read per second: means over the last few requests.
        self.service_s: float | None = None
        self.prefill_tokens_per_s: float | None = None
        # Tokens written per second by all slots together, likewise.
        self.decode_tokens_per_s: float | None = None

    def take(self) -> ModelCounters:
        """Counts since the last call."""
        taken, self.current = self.current, ModelCounters()
        self._taken = self._taken.plus(taken)
        return taken

    def total(self) -> ModelCounters:
        """Counts since the start."""
        return self._taken.plus(self.current)

    def loaded(self, seconds: float) -> None:
        """The model became ready."""
        self.current.loads += 1
        self.current.load_s.observe(seconds)

    def decoded(self, tokens_per_s: float) -> None:
        """A speed that was measured while all was well."""
        self.decode_tokens_per_s = running_mean(self.decode_tokens_per_s, tokens_per_s)

    def refused(self, code: str) -> None:
        """A request was turned away."""
        self.current.requests_refused += 1
        self.current.refusals[code] = self.current.refusals.get(code, 0) + 1

    def failed(self, ticket: Ticket, now_s: float) -> None:
        """The model failed a request that its caller still waits for."""
        if not ticket.finished:
            self.current.requests_failed += 1
            self.current.total_s.observe(now_s - ticket.submitted_s)

    def done(
        self, ticket: Ticket, done: worker_pb2.WorkerReply.Done, now_s: float, load_started_s: float, ready_s: float
    ) -> None:
        """A request is complete: count it, and give its caller the end of the answer."""
        if done.finish_reason == "cancelled":
            return
        if ticket.internal:
            ticket.finish(Done(done.finish_reason, done.prompt_tokens, done.output_tokens))
            return
        self.service_s = running_mean(self.service_s, now_s - ticket.sent_s)
        read = done.prompt_tokens - done.cached_tokens
        if read >= 16 and done.prefill_seconds > 0:
            self.prefill_tokens_per_s = running_mean(self.prefill_tokens_per_s, read / done.prefill_seconds)
        if ticket.finished:
            return
        # The part of the wait during which the model was being loaded.
        load_s = max(0.0, ready_s - max(ticket.submitted_s, load_started_s))
        queue_s = max(0.0, ticket.sent_s - ticket.submitted_s - load_s)
        current = self.current
        current.requests_ok += 1
        current.prompt_tokens += done.prompt_tokens
        current.cached_tokens += done.cached_tokens
        current.output_tokens += done.output_tokens
        current.prefill_seconds += done.prefill_seconds
        current.decode_seconds += done.decode_seconds
        if done.output_tokens and done.decode_seconds > 0:
            current.token_s.observe(done.decode_seconds / done.output_tokens)
        current.queue_s.observe(queue_s)
        current.total_s.observe(now_s - ticket.submitted_s)
        if ticket.first_token_s is not None:
            current.first_token_s.observe(ticket.first_token_s - ticket.submitted_s)
        if ticket.is_embedding:
            ticket.finish(Vectors([list(v.values) for v in done.embeddings], done.prompt_tokens))
            return
        timings = Timings(queue_s, load_s, done.prefill_seconds, done.decode_seconds)
        ticket.finish(Done(done.finish_reason, done.prompt_tokens, done.output_tokens, done.cached_tokens, timings))
