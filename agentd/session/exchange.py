"""One HTTP exchange of the relay: frames on one side, an ASGI application on the other.

Flow control as ``relay.proto`` says: each direction may have WINDOW bytes in flight. What the application has read is
granted again, so a gateway that sends too much breaks the contract, and a gateway that reads slowly stops this
exchange alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from slmfleet.v1 import relay_pb2 as pb

WINDOW = 64 * 1024
# Largest Data frame: small enough that others get their turn between two of them.
FRAME = 16 * 1024

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class WindowExceeded(Exception):
    """The peer sent more than it was allowed to."""


class Exchange:
    """Frames in by ``receive_frame`` (never blocks), frames out by ``emit`` (waits while the stream is busy)."""

    def __init__(self, request_id: int, opened: pb.Open, emit: Callable[[pb.Frame], Awaitable[None]]) -> None:
        self.id = request_id
        self._open = opened
        self._emit = emit
        self._incoming: deque[bytes] = deque()
        self._buffered = 0
        self._allowed_in = WINDOW
        self._ended = False
        self._disconnected = False
        self._news = asyncio.Event()
        self._credit = WINDOW
        self._credit_news = asyncio.Event()
        # Whether the application was told that the request's body is complete.
        self._body_ended = False
        # Whether the answer was sent to its end.
        self.complete = False
        # What the peer did wrong, as a sentence; "" when nothing.
        self.violation = ""

    def receive_frame(self, frame: pb.Frame) -> None:
        """Take a frame of this exchange. Raises WindowExceeded."""
        match frame.WhichOneof("frame"):
            case "data":
                self._allowed_in -= len(frame.data.body)
                if self._allowed_in < 0:
                    raise WindowExceeded
                self._incoming.append(frame.data.body)
                self._news.set()
            case "end":
                self._ended = True
                self._news.set()
            case "window":
                self._credit += frame.window.bytes
                self._credit_news.set()
            case "reset":
                self.disconnect()
            case _:
                pass

    def disconnect(self) -> None:
        """The caller left: the application gets ``http.disconnect``, what it still sends is dropped."""
        self._disconnected = True
        self._news.set()
        self._credit_news.set()

    @property
    def disconnected(self) -> bool:
        """Whether the caller left."""
        return self._disconnected

    async def serve(self, app: App) -> None:
        """Run the application for this request."""
        await app(self._scope(), self._receive, self._send)

    def _scope(self) -> Message:
        path, _, query = self._open.path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self._open.method.upper() or "GET",
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(item.name.lower().encode(), item.value.encode("latin-1", "replace")) for item in
                        self._open.headers],
            "client": None,
            "server": None,
            "extensions": {"slmfleet.relay": {}},
        }  # fmt: skip

    async def _receive(self) -> Message:
        while True:
            if self._disconnected:
                return {"type": "http.disconnect"}
            if self._incoming:
                body = self._incoming.popleft()
                self._allowed_in += len(body)
                if not self._ended:
                    await self._emit(pb.Frame(request_id=self.id, window=pb.WindowUpdate(bytes=len(body))))
                self._body_ended = self._ended and not self._incoming
                return {"type": "http.request", "body": body, "more_body": not self._body_ended}
            if self._ended and not self._body_ended:
                self._body_ended = True
                return {"type": "http.request", "body": b"", "more_body": False}
            self._news.clear()
            await self._news.wait()

    async def _send(self, message: Message) -> None:
        if self._disconnected:
            return
        if message["type"] == "http.response.start":
            headers = [
                pb.Header(name=name.decode("latin-1"), value=value.decode("latin-1"))
                for name, value in message.get("headers", ())
            ]
            await self._emit(pb.Frame(request_id=self.id, head=pb.Head(status=message["status"], headers=headers)))
        elif message["type"] == "http.response.body":
            await self._send_body(message.get("body", b""))
            if not message.get("more_body", False) and not self._disconnected:
                self.complete = True
                await self._emit(pb.Frame(request_id=self.id, end=pb.End()))

    async def _send_body(self, body: bytes) -> None:
        view = memoryview(body)
        while len(view) and not self._disconnected:
            if self._credit <= 0:
                self._credit_news.clear()
                await self._credit_news.wait()
                continue
            size = min(len(view), self._credit, FRAME)
            self._credit -= size
            await self._emit(pb.Frame(request_id=self.id, data=pb.Data(body=bytes(view[:size]))))
            view = view[size:]
