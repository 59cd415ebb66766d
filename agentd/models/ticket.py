"""One request on its way through an owner: what its caller reads, and what the owner knows of it."""

from __future__ import annotations

import asyncio
from collections import deque

from agentd.models.types import Chunk, Done, GenerateRequest, Vectors
from slmfleet.v1 import worker_pb2


class Ticket:
    """An asynchronous iterator over the answer. The owner pushes; one reader reads.

    A slow reader costs little more than the answer's text: past a number of unread pieces, more of them are joined.
    """

    __slots__ = (
        "_error", "_finished", "_items", "_reader", "first_token_s", "id", "internal", "message", "output_tokens",
        "priority", "progress_s", "progress_tokens", "queue_deadline_s", "request", "sent_s", "submitted_s",
        "total_deadline_s",
    )  # fmt: skip

    def __init__(
        self, request: GenerateRequest, message: worker_pb2.WorkerRequest, now_s: float, internal: bool = False
    ) -> None:
        self.request = request
        # Generate or Embed, complete but for its id.
        self.message = message
        # agentd asks for itself: nobody reads the answer, and it is not counted.
        self.internal = internal
        self.priority = request.priority
        self.submitted_s = now_s
        self.queue_deadline_s = now_s + request.queue_timeout_s
        self.total_deadline_s = now_s + request.timeout_s
        # Owner's notes. ``id`` is the request id in the worker; 0 while the request waits.
        self.id = 0
        self.sent_s = 0.0
        self.first_token_s: float | None = None
        self.progress_s = now_s
        self.progress_tokens = 0
        self.output_tokens = 0
        self._items: deque[Chunk | Done | Vectors] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._finished = False

    @property
    def finished(self) -> bool:
        """True once the last item or the error was pushed."""
        return self._finished

    @property
    def is_embedding(self) -> bool:
        return self.message.WhichOneof("message") == "embed"

    def push(self, chunk: Chunk, now_s: float) -> None:
        """Give the reader a piece of the answer."""
        if self._finished:
            return
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.progress_s = now_s
        self.output_tokens += chunk.tokens
        if self.internal:
            return
        last = self._items[-1] if len(self._items) >= _MOST_UNREAD else None
        if isinstance(last, Chunk) and _is_text(last) and _is_text(chunk):
            text = last.delta["content"] + chunk.delta["content"]
            self._items[-1] = Chunk({**last.delta, "content": text}, last.tokens + chunk.tokens)
        else:
            self._items.append(chunk)
        self._wake()

    def finish(self, last: Done | Vectors) -> None:
        """The answer is complete."""
        if not self._finished:
            self._finished = True
            self._items.append(last)
            self._wake()

    def fail(self, error: Exception) -> None:
        """End with ``error``, which the reader gets after what was pushed before."""
        if not self._finished:
            self._finished = True
            self._error = error
            self._wake()

    def close(self) -> None:
        """The reader is gone."""
        self._finished = True
        self._items.clear()

    def rest(self) -> list[Chunk | Done | Vectors]:
        """All that can be read without waiting, and is read now."""
        items = list(self._items)
        self._items.clear()
        return items

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Chunk | Done | Vectors:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _is_text(chunk: Chunk) -> bool:
    return chunk.logprobs is None and isinstance(chunk.delta.get("content"), str) and chunk.delta.keys() <= _TEXT_KEYS


_TEXT_KEYS = {"role", "content"}
# A reader that keeps up gets every piece by itself, also when many arrive with one read from the worker's socket.
_MOST_UNREAD = 1024
