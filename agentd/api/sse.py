"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), as OpenAI writes them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

SendStart = Callable[[int, list[tuple[bytes, bytes]]], Awaitable[None]]
SendBody = Callable[[bytes, bool], Awaitable[None]]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS = [(b"content-type", b"application/json")]
DONE = b"data: [DONE]\n\n"
# An encoder that is kept: json.dumps makes a new one for each call with options.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def compact(value: Any) -> str:
    """JSON without white space."""
    return _encode(value)


def data(value: Mapping[str, Any]) -> bytes:
    """One event without a name."""
    return b"data: " + _encode(value).encode() + b"\n\n"


def named(value: Mapping[str, Any]) -> bytes:
    """One event that is named by its ``type``."""
    return f"event: {value['type']}\ndata: {_encode(value)}\n\n".encode()
