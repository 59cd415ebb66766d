"""``POST /v1/chat/completions``: check, find the target, hold a place, generate, answer in OpenAI's words."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from agentd.agents.router import compose
from agentd.api.errors import ApiError
from agentd.api.serving import Account, Bursts, Serving, Turn, collect, next_burst
from agentd.api.sse import DONE, JSON_HEADERS, SSE_HEADERS, SendBody, SendStart, compact, data
from agentd.api.tools import ToolCallReader
from agentd.api.validation import ChatRequest
from agentd.models.types import Chunk, Done, GenerateRequest, GenerationFailed, Refused


class Chat:
    """Answers chat requests."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def answer(self, request: ChatRequest, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Answer one checked request. Raises ApiError; when the answer has begun by then, it says so itself."""
        target, _ = self._serving.target(request.model, relayed)
        generation = compose(target, request.body, keep_alive_s=request.keep_alive_s)
        generation, reader = await self._serving.settled(generation)
        async with self._serving.turn(target, generation) as turn:
            answer = _ChatAnswer(request, generation, turn, reader)
            if request.stream:
                await answer.stream(start, body)
            else:
                await answer.whole(start, body)


def seeded(generation: GenerateRequest, number: int, **more: Any) -> GenerateRequest:
    """The generation of one choice, with more in its body: with the same seed all choices would be the same."""
    seed = generation.body.get("seed")
    if number and seed is not None:
        more["seed"] = (seed + number) % 2**32
    return replace(generation, body={**generation.body, **more}) if more else generation


class _ChatAnswer:
    """One answer, with all its choices."""

    def __init__(
        self, request: ChatRequest, generation: GenerateRequest, turn: Turn, reader: ToolCallReader | None
    ) -> None:
        self._request = request
        self._generation = generation
        self._turn = turn
        self._reader = reader
        self._account = Account(generation.key, turn.waited_s)
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }

    async def stream(self, start: SendStart, body: SendBody) -> None:
        """Server-sent events."""
        started = False
        for number in range(self._request.choices):
            writer = _ChoiceWriter(self._common, number)
            async with aclosing(self._bursts(number)) as bursts:
                try:
                    # The first piece decides the status: nothing is sent before it is known that the request runs.
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
            self._account.add(done, same_prompt=number > 0)
            last = number + 1 == self._request.choices
            end = self._end(writer, done.finish_reason) if last else writer.finish(done.finish_reason)
            await body(writer.chunks(pieces) + end, not last)

    def _end(self, writer: _ChoiceWriter, reason: str) -> bytes:
        """The finishing chunk, the usage chunk when it was asked for, and ``[DONE]``."""
        facts = self._account.facts()
        if not self._request.include_usage:
            return writer.finish(reason, slmfleet=facts) + DONE
        usage = {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self._account.usage(),
            "slmfleet": facts,
        }
        return writer.finish(reason) + data(usage) + DONE

    async def whole(self, start: SendStart, body: SendBody) -> None:
        """The answer in one piece."""
        choices = [await self._choice(number) for number in range(self._request.choices)]
        answer = {
            **self._common,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._account.usage(),
            "slmfleet": self._account.facts(),
        }
        await start(200, JSON_HEADERS)
        await body(compact(answer).encode(), False)

    async def _choice(self, number: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        logprobs: dict[str, Any] | None = None

        def take(item: Chunk) -> None:
            nonlocal logprobs
            merge_delta(message, item.delta)
            if item.logprobs is not None:
                logprobs = logprobs or {"content": []}
                logprobs["content"] += item.logprobs.get("content") or []

        done = await collect(self._bursts(number), take)
        self._account.add(done, same_prompt=number > 0)
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": done.finish_reason}

    def _bursts(self, number: int) -> Bursts:
        """The pieces of one choice."""
        bursts = self._turn.generate(seeded(self._generation, number))
        return bursts if self._reader is None else read_calls(bursts, self._reader.fresh())


async def read_calls(bursts: Bursts, reader: ToolCallReader) -> Bursts:
    """The pieces with bound text turned into calls. Logprobs of its tokens belong to no text that is shown."""
    call_id = f"call_{secrets.token_hex(12)}"
    async with aclosing(bursts):
        async for burst in bursts:
            made: list[Chunk | Done] = []
            for item in burst:
                if isinstance(item, Done):
                    made.append(replace(item, finish_reason=reader.finish_reason(item.finish_reason)))
                else:
                    text = item.delta.get("content") or ""
                    made += [Chunk(delta, item.tokens) for delta in reader.feed(text, call_id)]
            if made:
                yield made


def broken(error: Refused | GenerationFailed) -> bytes:
    """The event that ends a stream whose status is sent already: no ``[DONE]`` follows."""
    return b"data: " + ApiError(503, error.code, error.message).body() + b"\n\n"


class _ChoiceWriter:
    """Makes the events of one choice. Nearly all of them differ in a piece of text only, so the rest is made once."""

    def __init__(self, common: Mapping[str, Any], number: int) -> None:
        head = compact({**common, "object": "chat.completion.chunk"})[:-1]
        self._head = f'data: {head},"choices":[{{"index":{number},"delta":'
        self._before = f'{self._head}{{"content":'.encode()
        self._after = b'},"finish_reason":null}]}\n\n'
        self._common = common
        self._number = number
        self._role_sent = False

    def chunks(self, items: Iterable[Chunk | Done]) -> bytes:
        """An event for each piece."""
        return b"".join([self._chunk(item) for item in items if isinstance(item, Chunk)])

    def _chunk(self, item: Chunk) -> bytes:
        delta = item.delta
        if self._role_sent and item.logprobs is None and len(delta) == 1 and "content" in delta:
            return self._before + compact(delta["content"]).encode() + self._after
        if not self._role_sent:
            self._role_sent = True
            delta = {"role": "assistant", "content": None if "tool_calls" in delta else "", **delta}
        logprobs = "" if item.logprobs is None else f',"logprobs":{compact(item.logprobs)}'
        return f'{self._head}{compact(delta)}{logprobs},"finish_reason":null}}]}}\n\n'.encode()

    def finish(self, reason: str, **more: Any) -> bytes:
        """The chunk that says how the choice ended."""
        choice = {"index": self._number, "delta": {}, "finish_reason": reason}
        return data({**self._common, "object": "chat.completion.chunk", "choices": [choice], **more})


def merge_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add a piece to a message: texts grow, tool calls are joined by their index."""
    for name, value in delta.items():
        if name == "role" or value is None:
            continue
        if name == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for piece in value:
                _merge_call(calls, piece)
        elif isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        else:
            message[name] = value


def _merge_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    index = piece.get("index", len(calls))
    while len(calls) <= index:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    call["id"] = piece.get("id") or call["id"]
    function = piece.get("function") or {}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""
