"""What the gateway itself says: OpenAI-shaped errors, JSON, and the care for server-sent events."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderLines = list[tuple[bytes, bytes]]

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
          500: "server_error", 502: "server_error", 503: "service_unavailable_error", 504: "timeout_error"}  # fmt: skip
# The largest server-sent event that is held back until it is complete.
_MAX_EVENT = 1 << 20
# The last event of a stream: of completions, of responses. Text of the model has no line of its own.
_LAST = re.compile(rb"^(?:data: \[DONE\]|event: response\.(?:completed|incomplete|failed))\r?$", re.MULTILINE)
# Responses say input and output where all others say prompt and completion.
_TOKENS = re.compile(rb'"(prompt|completion|input|output)_tokens"\s*:\s*(\d+)')
_KINDS = {b"prompt": "prompt", b"input": "prompt", b"completion": "completion", b"output": "completion"}


class ApiError(Exception):
    """An answer that is an error. ``result`` is its word in the metrics."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        result: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.result = result or code

    def body(self) -> bytes:
        """OpenAI's error object."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "server_error"),
            "code": self.code,
            "param": self.param,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def headers(self) -> HeaderLines:
        """Content type, and when to come back."""
        lines = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            lines.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.status == 401:
            lines.append((b"www-authenticate", b"Bearer"))
        return lines


class Answer:
    """Sends one response; knows whether it has begun, and whether the caller was given all that there is to say:
    clients leave after the last event of a stream, before the stream itself ends."""

    __slots__ = ("_send", "complete", "ended", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.complete = False
        self.ended = False

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The head."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def chunk(self, body: bytes) -> None:
        """A piece of the body, sent at once."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.complete = self.complete or _LAST.search(body) is not None

    async def end(self, body: bytes = b"") -> None:
        """The last piece."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.complete = True

    async def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """A complete answer."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def error(self, error: ApiError, extra: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """An error in place of an answer."""
        await self.whole(error.status, [*error.headers(), *extra], error.body())


class Events:
    """Lets only complete server-sent events through, so that an error event can follow at any time."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """The events that are complete now."""
        if not self._tail and chunk.endswith(b"\n\n"):
            return chunk
        held = self._tail + chunk
        cut = max(_after(held, b"\n\n"), _after(held, b"\r\n\r\n"))
        if not cut and len(held) > _MAX_EVENT:
            cut = len(held)
        self._tail = held[cut:]
        return held[:cut]

    def rest(self) -> bytes:
        """What was held back; at the regular end of a stream it belongs to the answer."""
        tail, self._tail = self._tail, b""
        return tail


def _after(data: bytes, separator: bytes) -> int:
    """Where the last ``separator`` ends; 0 when there is none."""
    found = data.rfind(separator)
    return found + len(separator) if found >= 0 else 0


def error_event(error: ApiError) -> bytes:
    """An error inside a stream that has begun, as OpenAI clients understand it."""
    return b"data: " + error.body() + b"\n\n"


def tokens_in(chunk: bytes) -> dict[str, int]:
    """Token counts that a piece of an answer tells: ``{"prompt": n, "completion": n}``.

    Text of the model can't be mistaken for them: inside a JSON string the quotes are escaped.
    """
    if b"_tokens" not in chunk:
        return {}
    return {_KINDS[kind]: int(count) for kind, count in _TOKENS.findall(chunk)}
