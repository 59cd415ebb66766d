"""``POST /v1/completions``: text goes on, without a chat template. For models; an agent answers chats.

Several prompts, and ``n`` of each, are answered one after the other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from agentd.agents.router import compose
from agentd.api import checks
from agentd.api.chat import broken, seeded
from agentd.api.errors import bad_request
from agentd.api.serving import Account, Bursts, Serving, Turn, collect, next_burst
from agentd.api.sse import DONE, JSON_HEADERS, SSE_HEADERS, SendBody, SendStart, compact, data
from agentd.api.validation import INFORMING, SHARED, choices, keep_alive_s, streaming, token_limit
from agentd.models.types import Chunk, Done, GenerateRequest, GenerationFailed, Refused

MAX_PROMPTS = 64
# OpenAI's default.
_MAX_TOKENS = 16
_KNOWN = frozenset({"prompt", "echo", "best_of", "logprobs", *SHARED, *INFORMING})
_UNSUPPORTED = {"suffix": "text is only written at the end of the prompt"}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked request. ``body`` goes to the backend with one of the prompts."""

    model: str
    stream: bool
    include_usage: bool
    prompts: list[str]
    choices: int
    echo: bool
    body: dict[str, Any]
    keep_alive_s: float | None


def parse(raw: bytes) -> CompletionRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    given = checks.parse_object(raw)
    model = checks.model_name(given)
    checks.refuse_unknown(given, _KNOWN, _UNSUPPORTED)
    stream, include_usage = streaming(given)
    body = checks.sampling(given)
    body["max_tokens"] = token_limit(given, "max_tokens") or _MAX_TOKENS
    if given.get("logprobs") is not None:
        body["logprobs"] = checks.integer(0, 5)("logprobs", given["logprobs"])
    count = choices(given)
    if given.get("best_of") not in (None, count):
        raise bad_request("`best_of` can only be what `n` is: ask for all answers and choose", "best_of",
                          "unsupported_value")  # fmt: skip
    echo = given.get("echo") is not None and checks.flag("echo", given["echo"])
    if echo and body.get("logprobs") is not None:
        raise bad_request("`logprobs` of the prompt are not known: leave `echo` or `logprobs` out", "echo",
                          "unsupported_value")  # fmt: skip
    prompts = _prompts(given.get("prompt"))
    return CompletionRequest(model, stream, include_usage, prompts, count, echo, body, keep_alive_s(given))


def _prompts(given: Any) -> list[str]:
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts:
        raise bad_request("`prompt` must be text or a list of texts", "prompt")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise bad_request("`prompt` must be text: token ids are not taken", "prompt", "unsupported_value")
    if len(prompts) > MAX_PROMPTS:
        raise bad_request(f"`prompt` has {len(prompts)} texts; at most {MAX_PROMPTS} are taken", "prompt")
    if not all(prompts):
        raise bad_request("`prompt` is empty: there is nothing to go on from", "prompt")
    return prompts


class Completions:
    """Answers completion requests."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def answer(self, request: CompletionRequest, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Answer one checked request. Raises ApiError; when the answer has begun by then, it says so itself."""
        target, _ = self._serving.bare_model(request.model, relayed, "/v1/completions")
        generation = compose(target, request.body, keep_alive_s=request.keep_alive_s)
        async with self._serving.turn(target, generation) as turn:
            answer = _CompletionAnswer(request, generation, turn)
            await (answer.stream(start, body) if request.stream else answer.whole(start, body))


class _CompletionAnswer:
    """One answer: a choice for each prompt and each of its ``n``."""

    def __init__(self, request: CompletionRequest, generation: GenerateRequest, turn: Turn) -> None:
        self._request = request
        self._generation = generation
        self._turn = turn
        self._account = Account(generation.key, turn.waited_s)
        self._common: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    def _bursts(self, index: int) -> Bursts:
        which, number = divmod(index, self._request.choices)
        return self._turn.generate(seeded(self._generation, number, prompt=self._request.prompts[which]))

    @property
    def _count(self) -> int:
        return len(self._request.prompts) * self._request.choices

    def _echoed(self, index: int) -> str:
        return self._request.prompts[index // self._request.choices] if self._request.echo else ""

    async def stream(self, start: SendStart, body: SendBody) -> None:
        """Server-sent events."""
        started = False
        for index in range(self._count):
            writer = _ChoiceWriter(self._common, index, self._echoed(index))
            async with aclosing(self._bursts(index)) as bursts:
                try:
                    burst = await next_burst(bursts)
                    if not started:
                        await start(200, SSE_HEADERS)
                        started = True
                    while not isinstance(burst[-1], Done):
                        await body(writer.chunks(burst), True)
                        burst = await next_burst(bursts)
                except (Refused, GenerationFailed) as error:
                    if started:
                        await body(broken(error), False)
                    raise
            *pieces, done = burst
            assert isinstance(done, Done)
            self._account.add(done, same_prompt=index % self._request.choices > 0)
            await body(writer.chunks(pieces) + writer.finish(done.finish_reason), True)
        facts = self._account.facts()
        more = {"usage": self._account.usage()} if self._request.include_usage else {}
        await body(data({**self._common, "choices": [], **more, "slmfleet": facts}) + DONE, False)

    async def whole(self, start: SendStart, body: SendBody) -> None:
        """The answer in one piece."""
        choices = [await self._choice(index) for index in range(self._count)]
        more = {"usage": self._account.usage(), "slmfleet": self._account.facts()}
        await start(200, JSON_HEADERS)
        await body(compact({**self._common, "choices": choices, **more}).encode(), False)

    async def _choice(self, index: int) -> dict[str, Any]:
        text, logprobs, found = [self._echoed(index)], _Logprobs(), None

        def take(item: Chunk) -> None:
            nonlocal found
            text.append(item.delta.get("content") or "")
            found = joined(found, logprobs.take(item.logprobs))

        done = await collect(self._bursts(index), take)
        self._account.add(done, same_prompt=index % self._request.choices > 0)
        return {"index": index, "text": "".join(text), "logprobs": found, "finish_reason": done.finish_reason}


class _ChoiceWriter:
    """Makes the events of one choice."""

    def __init__(self, common: Mapping[str, Any], index: int, echoed: str) -> None:
        self._common = common
        self._index = index
        # Told with the first piece.
        self._echoed = echoed
        self._logprobs = _Logprobs()

    def chunks(self, items: Iterable[Chunk | Done]) -> bytes:
        """An event for each piece that says something."""
        return b"".join([self._chunk(item) for item in items if isinstance(item, Chunk)])

    def _chunk(self, item: Chunk) -> bytes:
        text, self._echoed = self._echoed + (item.delta.get("content") or ""), ""
        if not text and item.logprobs is None:
            return b""
        return self._event(text, self._logprobs.take(item.logprobs), None)

    def finish(self, reason: str) -> bytes:
        """The event that says how the choice ended."""
        return self._event(self._echoed, None, reason)

    def _event(self, text: str, logprobs: Mapping[str, Any] | None, reason: str | None) -> bytes:
        choice = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return data({**self._common, "choices": [choice]})


class _Logprobs:
    """Turns the logprobs of chats into the older form of completions: four lists side by side."""

    def __init__(self) -> None:
        self._offset = 0

    def take(self, logprobs: Any) -> dict[str, Any] | None:
        """The lists for one piece of the answer."""
        if logprobs is None:
            return None
        made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs.get("content") or []:
            made["tokens"].append(entry["token"])
            made["token_logprobs"].append(entry["logprob"])
            made["top_logprobs"].append({top["token"]: top["logprob"] for top in entry.get("top_logprobs") or []})
            made["text_offset"].append(self._offset)
            self._offset += len(entry["token"])
        return made


def joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Both, one behind the other."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}
