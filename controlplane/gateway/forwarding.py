"""One request through the fleet: choose a replica, ask it through its relay, pass the answer on as it comes.

::

    choose --> ask --> first byte --> pass on --> done
      ^         |                        |
      |         | nothing was sent yet   | link lost, reset, too late
      +---------+ (at most twice)        +--> error event, end of the stream
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlplane.domain.routing import AllBusy, Chosen, NoneReady, may_retry
from controlplane.gateway.answers import Answer, ApiError, Events, HeaderLines, error_event, tokens_in
from controlplane.gateway.balancer import Balancer, Outcome
from controlplane.gateway.metrics import Metrics
from controlplane.gateway.table import Replica, Target
from controlplane.node_api.exchange import ExchangeReset, ExchangeTimeout, LinkLost, RelayError, RelayResponse
from controlplane.node_api.links import NodeLinks
from slmfleet import logs

log = logs.get(__name__)

# The longest answer that is not a stream, in bytes: it is read whole before it is passed on.
_MAX_WHOLE_ANSWER = 16 << 20
# Headers of a node's answer that the caller gets.
_PASSED = frozenset({"content-type", "cache-control", "retry-after", "x-accel-buffering"})


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent to a node. ``deadline`` and ``arrived``: event loop's clock."""

    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    arrived: float
    deadline: float
    # Headers that stand on every answer, such as x-request-id.
    answer_headers: HeaderLines


class _Elsewhere(Exception):
    """Nothing has been sent to the caller, and another replica may do better. ``error``: what the caller gets if not;
    ``answer``: the node's own refusal, passed on as it is if there is nobody else."""

    def __init__(self, outcome: Outcome, error: ApiError, answer: _Whole | None = None) -> None:
        super().__init__(error.message)
        self.outcome = outcome
        self.error = error
        self.answer = answer


@dataclass(frozen=True, slots=True)
class _Whole:
    status: int
    headers: HeaderLines
    body: bytes


class Forwarder:
    """Passes requests to replicas. ``clock``: the event loop's."""

    def __init__(self, links: NodeLinks, balancer: Balancer, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._links = links
        self._balancer = balancer
        self._metrics = metrics
        self._clock = clock

    async def forward(self, request: Request, target: Target, answer: Answer) -> str:
        """Answer ``request``; the result's word for the metrics. Raises ApiError while nothing was sent."""
        tried: frozenset[str] = frozenset()
        last: _Elsewhere | None = None
        while last is None or may_retry(
            attempts=len(tried), began=answer.started, now=self._clock(), deadline=request.deadline
        ):
            choice = self._balancer.choose(target, tried)
            if not isinstance(choice, Chosen):
                if last is None:
                    raise _nobody(choice)
                break
            if last is not None:
                self._metrics.retries[target.name] += 1
            tried |= {choice.candidate.replica}
            replica = next(one for one in target.replicas if one.id == choice.candidate.replica)
            try:
                return await self._try(request, target, replica, choice.reason, answer)
            except _Elsewhere as failure:
                last = failure
                log.info("request goes elsewhere", target=target.name, node=replica.node, reason=failure.error.code)
        assert last is not None
        if last.answer is None:
            raise last.error
        refusal = last.answer
        await answer.whole(refusal.status, refusal.headers, refusal.body)
        return last.error.result

    async def _try(self, request: Request, target: Target, replica: Replica, reason: str, answer: Answer) -> str:
        """Ask one replica, and tell the balancer what came of it. Raises _Elsewhere, ApiError."""
        self._balancer.begin(replica.id)
        # Nothing is learnt from a caller that leaves, which is what ends this call by cancellation.
        outcome = Outcome.NOTHING
        response: RelayResponse | None = None
        try:
            response = await self._ask(request, replica)
            headers = [*request.answer_headers, *_answer_headers(response, replica, reason)]
            if response.status in (429, 503) or response.status >= 500:
                raise await _refusal(response, headers, replica)
            if _is_stream(response):
                result = await self._pass_stream(request, target, response, headers, answer)
            else:
                result = await self._pass_whole(request, target, response, headers, answer)
            outcome = Outcome.FAILED if result == "broken" else Outcome.OK
            return result
        except RelayError as error:
            outcome = Outcome.NOTHING if error.code == "refused" else Outcome.FAILED
            raise _relay_failure(error, replica) from error
        except _Elsewhere as failure:
            outcome = failure.outcome
            raise
        finally:
            if response is not None:
                response.close()
            self._balancer.finish(replica.id, outcome)

    async def _ask(self, request: Request, replica: Replica) -> RelayResponse:
        link = self._links.relay(replica.node_id)
        if link is None:
            # Gone since it was chosen.
            raise LinkLost("the node's relay is gone", began=False)
        left_s = request.deadline - self._clock()
        return await link.request("POST", request.path, request.headers, request.body, left_s)

    async def _pass_stream(
        self, request: Request, target: Target, response: RelayResponse, headers: HeaderLines, answer: Answer
    ) -> str:
        """Pass server-sent events on. The head goes out with the first of them: until then all can still be undone."""
        events = Events()
        first = b""
        while not first:
            try:
                first = events.feed(await anext(response))
            except StopAsyncIteration:
                break
        self._metrics.first_byte_s.observe(target.name, self._clock() - request.arrived)
        await answer.start(response.status, headers)
        if first:
            await answer.chunk(first)
        tokens = tokens_in(first)
        try:
            async for chunk in response:
                tokens |= tokens_in(chunk)
                if complete := events.feed(chunk):
                    await answer.chunk(complete)
        except RelayError as error:
            # After the last event only the end of the exchange was lost.
            if not answer.complete:
                log.warning("stream broke", target=target.name, code=error.code)
                lost = ApiError(502, error.code, f"the answer broke off: {error.message}")
                await answer.end(error_event(lost))
                return "broken"
        await answer.end(events.rest())
        self._count_tokens(target, tokens)
        return "ok" if response.status < 400 else "client_error"

    async def _pass_whole(
        self, request: Request, target: Target, response: RelayResponse, headers: HeaderLines, answer: Answer
    ) -> str:
        body = await response.read(_MAX_WHOLE_ANSWER)
        self._metrics.first_byte_s.observe(target.name, self._clock() - request.arrived)
        await answer.whole(response.status, headers, body)
        self._count_tokens(target, tokens_in(body))
        return "ok" if response.status < 400 else "client_error"

    def _count_tokens(self, target: Target, tokens: dict[str, int]) -> None:
        for kind, count in tokens.items():
            self._metrics.tokens[(target.name, kind)] += count


def _nobody(choice: NoneReady | AllBusy) -> ApiError:
    if isinstance(choice, AllBusy):
        return ApiError(429, "overloaded", choice.reason, retry_after_s=choice.retry_after_s, result="refused")
    return ApiError(503, "no_replica_ready", choice.reason, retry_after_s=choice.retry_after_s, result="unavailable")


def _is_stream(response: RelayResponse) -> bool:
    return any(
        name.lower() == "content-type" and value.lower().startswith("text/event-stream")
        for name, value in response.headers
    )


def _answer_headers(response: RelayResponse, replica: Replica, reason: str) -> HeaderLines:
    passed = [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in response.headers
        if name.lower() in _PASSED
    ]
    return [
        *passed,
        (b"x-slmfleet-node", replica.node.encode("latin-1", "replace")),
        (b"x-slmfleet-replica", replica.id.encode("latin-1", "replace")),
        (b"x-slmfleet-reason", reason.encode("latin-1", "replace")),
    ]


async def _refusal(response: RelayResponse, headers: HeaderLines, replica: Replica) -> _Elsewhere:
    """The node's own 429 or 5xx: worth asking somebody else, and good enough to pass on if there is nobody."""
    body = await response.read(_MAX_WHOLE_ANSWER)
    busy = response.status in (429, 503)
    code, result = ("busy", "refused") if response.status == 429 else ("unavailable", "unavailable")
    error = ApiError(
        response.status,
        code if busy else "node_failed",
        f"node {replica.node} answered {response.status}",
        result=result if busy else "failed",
    )
    outcome = Outcome.NOTHING if busy else Outcome.FAILED
    return _Elsewhere(outcome, error, _Whole(response.status, headers, body))


def _relay_failure(error: RelayError, replica: Replica) -> _Elsewhere | ApiError:
    """What a failed exchange means before anything was sent to the caller."""
    match error:
        case ExchangeTimeout():
            return ApiError(504, "timeout", f"node {replica.node} gave {error.message}", result="timeout")
        case ExchangeReset(code="refused"):
            busy = ApiError(503, "busy", error.message, retry_after_s=1.0, result="refused")
            return _Elsewhere(Outcome.NOTHING, busy)
        case ExchangeReset(code="timeout"):
            return ApiError(504, "timeout", f"node {replica.node}: {error.message}", result="timeout")
        case ExchangeReset(code="too_large"):
            return ApiError(502, "answer_too_large", error.message, result="failed")
        case _:
            message = f"node {replica.node} was lost while it worked on the request: {error.message}"
            lost = ApiError(503, error.code, message, retry_after_s=1.0, result="failed")
            return _Elsewhere(Outcome.FAILED, lost)
