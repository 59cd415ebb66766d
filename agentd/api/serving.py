"""The way of a request to the model host: find the target, hold a place at its agent, tell refusals as API errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from agentd.agents.admission import Admission
from agentd.agents.router import Catalog, Target, Unknown, resolve
from agentd.api.errors import ApiError, bad_request
from agentd.api.tools import TOOL_FIELDS, ToolCallReader, settle
from agentd.device.clock import boottime_s
from agentd.models.types import (
    Chunk,
    Done,
    GenerateRequest,
    GenerationFailed,
    ModelHost,
    ModelKey,
    Refused,
    Timings,
    Vectors,
)

# Pieces of an answer, as many at a time as were there; the last item is a Done.
Bursts = AsyncGenerator[Sequence[Chunk | Done], None]
# A model that is still being fetched: when to ask again.
_NOT_READY_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A place at the agent. All that runs in it shares the request's time."""

    host: ModelHost
    waited_s: float
    # CLOCK_BOOTTIME.
    deadline_s: float

    def generate(self, request: GenerateRequest) -> Bursts:
        """One answer. Close it, also when it was not read to its end."""
        return self.host.bursts(self._timed(request))

    async def embed(self, request: GenerateRequest, inputs: list[str]) -> Vectors:
        """Vectors of the inputs."""
        return await self.host.embed(self._timed(request), inputs)

    def _timed(self, request: GenerateRequest) -> GenerateRequest:
        return replace(request, timeout_s=max(self.deadline_s - boottime_s(), 0.001))


class Serving:
    """``catalog`` gives the newest catalog at each call; ``refused`` hears of requests that an agent's own limits
    refused (all others are counted by the host)."""

    def __init__(
        self, host: ModelHost, catalog: Callable[[], Catalog], refused: Callable[[ModelKey, str], None]
    ) -> None:
        self.host = host
        self._catalog = catalog
        self._refused = refused
        self._admission = Admission()

    def target(self, name: str, relayed: bool) -> tuple[Target, ModelKey]:
        """What ``name`` stands for, and the model behind it. Raises ApiError (404, 503)."""
        catalog = self._catalog()
        found = resolve(catalog, name, relayed=relayed)
        if isinstance(found, Unknown):
            raise ApiError(404, "model_not_found", found.message, "model")
        if catalog.drained:
            raise ApiError(503, "node_drained", "this node is drained: it takes no new requests", retry_after_s=30.0)
        if found.problem or found.key is None:
            raise ApiError(
                503, "model_not_ready", f"{name!r} can't serve yet: {found.problem}", "model", _NOT_READY_RETRY_S
            )
        return found, found.key

    def bare_model(self, name: str, relayed: bool, endpoint: str) -> tuple[Target, ModelKey]:
        """As ``target``, for endpoints that know no instructions: an agent's would be walked around."""
        found, key = self.target(name, relayed)
        if found.agent is not None:
            raise bad_request(
                f"{name!r} is an agent, which answers chats: name a model for {endpoint}", "model", "unsupported_value"
            )
        return found, key

    async def settled(self, generation: GenerateRequest) -> tuple[GenerateRequest, ToolCallReader | None]:
        """The generation with its tools as this model can take them (see tools.py)."""
        body = generation.body
        if not TOOL_FIELDS & body.keys():
            return generation, None
        open_choice = bool(body.get("tools")) and body.get("tool_choice") in (None, "auto")
        native = not open_choice or await self.host.knows_tools(generation.key) is not False
        settled, reader = settle(body, native=native)
        return replace(generation, body=settled), reader

    @asynccontextmanager
    async def turn(self, target: Target, generation: GenerateRequest) -> AsyncIterator[Turn]:
        """Hold a place while the request is served. What the host refuses or fails in it becomes an ApiError."""
        began_s = boottime_s()
        entered = False
        try:
            async with self._admission.place(target.agent) as waited_s:
                entered = True
                yield Turn(self.host, waited_s, began_s + generation.timeout_s)
        except Refused as refusal:
            if not entered:
                self._refused(generation.key, refusal.code)
            raise of_refusal(refusal) from refusal
        except GenerationFailed as failure:
            raise of_failure(failure) from failure


def of_refusal(refusal: Refused) -> ApiError:
    """The host's refusal in OpenAI's words."""
    return ApiError(refusal.status, refusal.code, refusal.message, retry_after_s=refusal.retry_after_s)


def of_failure(failure: GenerationFailed) -> ApiError:
    """Likewise, of a generation that broke off."""
    return ApiError(504 if failure.code == "timeout" else 503, failure.code, failure.message, retry_after_s=1.0)


async def next_burst(bursts: Bursts) -> Sequence[Chunk | Done]:
    """What came next of an answer; the end without a Done is a failure."""
    try:
        return await anext(bursts)
    except StopAsyncIteration:
        raise GenerationFailed("incomplete_answer", "the model's answer ended without its end") from None


async def collect(bursts: Bursts, take: Callable[[Chunk], None]) -> Done:
    """Give each piece of a whole answer to ``take``; its end."""
    async with aclosing(bursts):
        while True:
            for item in await next_burst(bursts):
                if isinstance(item, Done):
                    return item
                take(item)


class Account:
    """What the parts of one answer (its choices) come to together."""

    def __init__(self, key: ModelKey, waited_s: float) -> None:
        self._key = key
        self._queue_s = waited_s
        self._load_s = self._prefill_s = self._decode_s = 0.0
        self.prompt_tokens = self.output_tokens = self.cached_tokens = 0

    def add(self, done: Done, *, same_prompt: bool = False) -> None:
        """One more part; ``same_prompt``: its prompt is counted already."""
        timings: Timings = done.timings
        self._queue_s += timings.queue_s
        self._load_s += timings.load_s
        self._prefill_s += timings.prefill_s
        self._decode_s += timings.decode_s
        self.output_tokens += done.output_tokens
        if not same_prompt:
            self.prompt_tokens += done.prompt_tokens
            self.cached_tokens += done.cached_tokens

    def usage(self) -> dict[str, object]:
        """OpenAI's ``usage`` of chats and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def facts(self) -> dict[str, object]:
        """The ``slmfleet`` extension: where the time went. docs/api.md explains it."""
        return {
            "timings": {
                "queue_s": round(self._queue_s, 6),
                "load_s": round(self._load_s, 6),
                "prefill_s": round(self._prefill_s, 6),
                "decode_s": round(self._decode_s, 6),
            },
            "tokens_per_second": round(self.output_tokens / self._decode_s, 3) if self._decode_s > 0 else 0.0,
            "model": str(self._key),
        }
