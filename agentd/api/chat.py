"""``POST /v1/chat/completions``: check, find the target, hold a place, generate, answer in OpenAI's words."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from agentd.agents.admission import Admission
from agentd.agents.router import Catalog, Target, Unknown, compose, resolve
from agentd.api.errors import ApiError
from agentd.api.validation import ChatRequest
from agentd.models.types import Chunk, Done, GenerateRequest, GenerationFailed, ModelHost, ModelKey, Refused

SendStart = Callable[[int, list[tuple[bytes, bytes]]], Awaitable[None]]
SendBody = Callable[[bytes, bool], Awaitable[None]]

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON_HEADERS = [(b"content-type", b"application/json")]
# A model that is still being fetched: when to ask again.
_NOT_READY_RETRY_S = 5.0


class Chat:
    """Answers chat requests. ``catalog`` gives the newest catalog at each call."""

    def __init__(self, host: ModelHost, catalog: Callable[[], Catalog], refused: Callable[[ModelKey], None]) -> None:
        self._host = host
        self._catalog = catalog
        # Told of requests that an agent's own limits refused; all others are counted by the host.
        self._refused = refused
        self._admission = Admission()

    async def answer(self, request: ChatRequest, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Answer one checked request. Raises ApiError; when the answer has begun by then, it says so itself."""
        target = self._target(request.model, relayed)
        generation = compose(target, request.body)
        entered = False
        try:
            async with self._admission.place(target.agent) as waited_s:
                entered = True
                left_s = max(generation.timeout_s - waited_s, 0.001)
                await self._generate(request, replace(generation, timeout_s=left_s), waited_s, start, body)
        except Refused as refusal:
            if not entered:
                self._refused(generation.key)
            raise ApiError(
                refusal.status, refusal.code, refusal.message, retry_after_s=refusal.retry_after_s
            ) from refusal
        except GenerationFailed as failure:
            status = 504 if failure.code == "timeout" else 503
            raise ApiError(status, failure.code, failure.message, retry_after_s=1.0) from failure

    def _target(self, name: str, relayed: bool) -> Target:
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
        return found

    async def _generate(
        self, request: ChatRequest, generation: GenerateRequest, waited_s: float, start: SendStart, body: SendBody
    ) -> None:
        stream = self._host.generate(generation)
        async with aclosing(stream) as items:  # type: ignore[type-var]
            # The first item decides the status: nothing is sent before it is known that the request runs.
            first = await _next(items)
            writer = _Writer(request, generation, waited_s)
            if request.stream:
                await _stream_answer(writer, first, items, start, body)
            else:
                await _whole_answer(writer, first, items, start, body)


class _Writer:
    """Makes OpenAI's objects for one answer."""

    def __init__(self, request: ChatRequest, generation: GenerateRequest, waited_s: float) -> None:
        self._request = request
        self._generation = generation
        self._waited_s = waited_s
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._role_sent = False

    def chunk(self, item: Chunk) -> bytes:
        """One server-sent event."""
        delta = item.delta
        if not self._role_sent:
            delta = {"role": "assistant", "content": "", **delta} if "tool_calls" not in delta else {
                "role": "assistant", **delta}  # fmt: skip
            self._role_sent = True
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if item.logprobs is not None:
            choice["logprobs"] = item.logprobs
        return self._event([choice])

    def end(self, done: Done) -> bytes:
        """The finishing chunk, the usage chunk when it was asked for, and ``[DONE]``."""
        finish = [{"index": 0, "delta": {}, "finish_reason": done.finish_reason}]
        if not self._request.include_usage:
            return self._event(finish, slmfleet=self.facts(done)) + b"data: [DONE]\n\n"
        usage = self._event([], usage=self.usage(done), slmfleet=self.facts(done))
        return self._event(finish) + usage + b"data: [DONE]\n\n"

    def whole(self, message: dict[str, Any], logprobs: Any, done: Done) -> bytes:
        """The answer in one piece."""
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": done.finish_reason}
        answer = {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(done),
            "slmfleet": self.facts(done),
        }
        return json.dumps(answer, ensure_ascii=False).encode()

    def usage(self, done: Done) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.output_tokens,
            "total_tokens": done.prompt_tokens + done.output_tokens,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        }

    def facts(self, done: Done) -> dict[str, Any]:
        """The ``slmfleet`` extension: where the time went."""
        timings = done.timings
        return {
            "timings": {
                "queue_s": round(timings.queue_s + self._waited_s, 6),
                "load_s": round(timings.load_s, 6),
                "prefill_s": round(timings.prefill_s, 6),
                "decode_s": round(timings.decode_s, 6),
            },
            "tokens_per_second": round(done.output_tokens / timings.decode_s, 3) if timings.decode_s > 0 else 0.0,
            "model": str(self._generation.key),
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        event = {**self._common, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _next(items: AsyncIterator[Chunk | Done]) -> Chunk | Done:
    try:
        return await anext(items)
    except StopAsyncIteration:
        raise GenerationFailed("incomplete_answer", "the model's answer ended without its end") from None


async def _stream_answer(
    writer: _Writer, first: Chunk | Done, items: AsyncIterator[Chunk | Done], start: SendStart, body: SendBody
) -> None:
    await start(200, _SSE_HEADERS)
    item = first
    try:
        while isinstance(item, Chunk):
            await body(writer.chunk(item), True)
            item = await _next(items)
    except (Refused, GenerationFailed) as error:
        # The status is sent already: the error travels in the stream, and no [DONE] follows.
        await body(b"data: " + ApiError(503, error.code, error.message).body() + b"\n\n", False)
        raise
    await body(writer.end(item), False)


async def _whole_answer(
    writer: _Writer, first: Chunk | Done, items: AsyncIterator[Chunk | Done], start: SendStart, body: SendBody
) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    logprobs: dict[str, Any] | None = None
    item = first
    while isinstance(item, Chunk):
        merge_delta(message, item.delta)
        if item.logprobs is not None:
            logprobs = logprobs or {"content": []}
            logprobs["content"] += item.logprobs.get("content") or []
        item = await _next(items)
    if message.get("tool_calls") and not message["content"]:
        message["content"] = None
    await start(200, _JSON_HEADERS)
    await body(writer.whole(message, logprobs, item), False)


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
