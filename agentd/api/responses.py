"""``POST /v1/responses``, stateless: the chat that a request stands for, answered in OpenAI's newer words.

A streamed answer is a row of named events, numbered from 0::

    response.created  response.in_progress
    response.output_item.added
        response.content_part.added  response.output_text.delta ...  response.output_text.done
        response.content_part.done                                              (a message)
        response.function_call_arguments.delta ...  response.function_call_arguments.done   (a call)
    response.output_item.done
    response.completed | response.incomplete | response.failed
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from typing import Any

from agentd.agents.router import compose
from agentd.api.chat import read_calls
from agentd.api.responses_request import ResponseRequest
from agentd.api.serving import Account, Bursts, Serving, collect, next_burst
from agentd.api.sse import JSON_HEADERS, SSE_HEADERS, SendBody, SendStart, compact, named
from agentd.models.types import Chunk, Done, GenerationFailed, Refused

Event = dict[str, Any]


class Responses:
    """Answers requests to /v1/responses."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def answer(self, request: ResponseRequest, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Answer one checked request. Raises ApiError; when the answer has begun by then, it says so itself."""
        target, key = self._serving.target(request.model, relayed)
        generation = compose(target, request.body, keep_alive_s=request.keep_alive_s)
        generation, reader = await self._serving.settled(generation)
        async with self._serving.turn(target, generation) as turn:
            builder = ResponseBuilder(request, Account(key, turn.waited_s), int(time.time()))
            serve = _stream if request.stream else _whole
            bursts = turn.generate(generation)
            await serve(builder, bursts if reader is None else read_calls(bursts, reader), start, body)


async def _whole(builder: ResponseBuilder, bursts: Bursts, start: SendStart, body: SendBody) -> None:
    done = await collect(bursts, lambda chunk: _exhaust(builder.take(chunk)))
    *_, last = builder.end(done)
    await start(200, JSON_HEADERS)
    await body(compact(last["response"]).encode(), False)


def _exhaust(events: Iterator[Event]) -> None:
    """Take the step; nobody reads of it."""
    deque(events, maxlen=0)


async def _stream(builder: ResponseBuilder, stream: Bursts, start: SendStart, body: SendBody) -> None:
    async with aclosing(stream) as bursts:
        # The first piece decides the status: nothing is sent before it is known that the request runs.
        burst = await next_burst(bursts)
        await start(200, SSE_HEADERS)
        await body(_written(builder.begin()), True)
        try:
            while not isinstance(burst[-1], Done):
                if events := _told(builder, burst):
                    await body(events, True)
                burst = await next_burst(bursts)
        except (Refused, GenerationFailed) as error:
            await body(named(builder.failed(error.code, error.message)), False)
            raise
    await body(_told(builder, burst), False)


def _told(builder: ResponseBuilder, burst: Iterable[Chunk | Done]) -> bytes:
    """The events of these pieces."""
    rows = (builder.end(item) if isinstance(item, Done) else builder.take(item) for item in burst)
    return b"".join(map(_written, rows))


def _written(events: Iterable[Event]) -> bytes:
    return b"".join(map(named, events))


class ResponseBuilder:
    """From the items of a generation to events and, in the last of them, the whole response. No I/O."""

    def __init__(self, request: ResponseRequest, account: Account, now_s: int) -> None:
        self._account = account
        self._number = 0
        self._output: list[dict[str, Any]] = []
        # Pieces of the open item's text or arguments.
        self._pieces: list[str] = []
        self._logprobs: list[Any] = []
        self._response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": now_s,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": request.model,
            "output": [],
            **request.repeated,
            "usage": None,
        }

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def begin(self) -> Iterator[Event]:
        """The first events."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def take(self, chunk: Chunk) -> Iterator[Event]:
        """The events of one piece."""
        if text := chunk.delta.get("content"):
            if not self._is_open("message"):
                yield from self._close()
                yield from self._open_message()
            yield from self._add_text(text, (chunk.logprobs or {}).get("content") or [])
        for call in chunk.delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                yield from self._close()
                yield from self._open_call(call.get("id") or f"call_{secrets.token_hex(12)}", function["name"])
            if (arguments := function.get("arguments")) and self._is_open("function_call"):
                self._pieces.append(arguments)
                yield self._event(
                    "response.function_call_arguments.delta", item_id=self._output[-1]["id"],
                    output_index=len(self._output) - 1, delta=arguments,
                )  # fmt: skip

    def end(self, done: Done) -> Iterator[Event]:
        """The last events; the very last carries the whole response."""
        cut = done.finish_reason == "length"
        if not self._output and not cut:
            yield from self._open_message()
        yield from self._close("incomplete" if cut else "completed")
        self._account.add(done)
        account = self._account
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": account.prompt_tokens,
                "input_tokens_details": {"cached_tokens": account.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": account.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": account.prompt_tokens + account.output_tokens,
            },
            "slmfleet": account.facts(),
        }
        yield self._event("response.incomplete" if cut else "response.completed", response=self._response)

    def failed(self, code: str, message: str) -> Event:
        """The event that ends a stream whose generation broke off."""
        self._response |= {"status": "failed", "error": {"code": code, "message": message}, "output": self._output}
        return self._event("response.failed", response=self._response)

    def _is_open(self, kind: str) -> bool:
        return bool(self._output) and self._output[-1]["type"] == kind and self._output[-1]["status"] == "in_progress"

    def _open_message(self) -> Iterator[Event]:
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
                "status": "in_progress", "content": []}  # fmt: skip
        index = len(self._output)
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=index, item={**item})
        yield self._event("response.content_part.added", item_id=item["id"], output_index=index, content_index=0,
                          part=_part("", []))  # fmt: skip

    def _open_call(self, call_id: str, name: str) -> Iterator[Event]:
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress",
                "call_id": call_id, "name": name, "arguments": ""}  # fmt: skip
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item={**item})

    def _add_text(self, text: str, logprobs: list[Any]) -> Iterator[Event]:
        self._pieces.append(text)
        self._logprobs += logprobs
        yield self._event(
            "response.output_text.delta", item_id=self._output[-1]["id"], output_index=len(self._output) - 1,
            content_index=0, delta=text, logprobs=logprobs,
        )  # fmt: skip

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item, text, logprobs = self._output[-1], "".join(self._pieces), self._logprobs
        self._pieces, self._logprobs = [], []
        where = {"item_id": item["id"], "output_index": len(self._output) - 1}
        item["status"] = status
        if item["type"] == "message":
            part = _part(text, logprobs)
            item["content"] = [part]
            yield self._event("response.output_text.done", **where, content_index=0, text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", **where, content_index=0, part=part)
        else:
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", **where, name=item["name"], arguments=text)
        yield self._event("response.output_item.done", output_index=where["output_index"], item=item)


def _part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
