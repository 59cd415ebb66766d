"""The barest server that streams chat chunks: ``asgi_stream.py PORT``. What HTTP itself costs here, for comparison.

uvicorn with agentd's own settings; the body of a request says how many events (``max_tokens``) it wants.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","created":1795340042,"model":"stub",'
    b'"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"w123 "},"finish_reason":null}]}\n\n'
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI 3."""
    count = json.loads((await receive())["body"])["max_tokens"]
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(count):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), http="h11", ws="none", loop="asyncio", lifespan="off", interface="asgi3",
        access_log=False, server_header=False, date_header=False, proxy_headers=False, log_level="warning",
    )  # fmt: skip
