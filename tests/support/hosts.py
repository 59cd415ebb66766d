"""A running model host inside a test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from agentd.models.host import Host
from agentd.models.types import Chunk, Done, GenerateRequest, LoadableModel, ModelKey, ModelState, ModelStatus


@contextlib.asynccontextmanager
async def running(host: Host, models: Sequence[LoadableModel]) -> AsyncIterator[Host]:
    """Run ``host`` with these models; at the end stop it in order."""
    task = asyncio.create_task(host.run(), name="host")
    await asyncio.sleep(0)
    host.set_models(models)
    try:
        yield host
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def request(key: ModelKey, text: str = "hello", max_tokens: int = 8, **more: Any) -> GenerateRequest:
    """A chat request; keys of GenerateRequest and of the body alike."""
    fields = {
        name: more.pop(name) for name in ("timeout_s", "queue_timeout_s", "priority", "keep_alive_s") if name in more
    }
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, **more}
    return GenerateRequest(key, body, **fields)


async def answer(host: Host, ask: GenerateRequest) -> tuple[str, Done]:
    """The whole text and its end."""
    text, done = "", None
    async for item in host.generate(ask):
        if isinstance(item, Chunk):
            text += item.delta.get("content") or ""
        else:
            done = item
    assert done is not None
    return text, done


def status_of(host: Host, key: ModelKey) -> ModelStatus:
    """The status of one model."""
    return next(status for status in host.status() if status.key == key)


async def reached(
    host: Host,
    key: ModelKey,
    state: ModelState,
    timeout_s: float = 20.0,
    also: Callable[[ModelStatus], bool] | None = None,
) -> ModelStatus:
    """Wait until a model is in ``state`` (and ``also`` holds); woken by the host's own notices."""
    changed = asyncio.Event()
    end = host.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                changed.clear()
                status = status_of(host, key)
                if status.state is state and (also is None or also(status)):
                    return status
                await changed.wait()
    finally:
        end()
