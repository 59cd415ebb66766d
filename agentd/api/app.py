"""The local API as a plain ASGI application: a handful of routes need no framework.

The relay runs the same application with the extension ``slmfleet.relay`` in its scope; then only ``/v1`` exists, and
only what is exposed to the gateway. docs/api.md describes every route.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from agentd.agents.router import Catalog, names, unknown
from agentd.api.endpoints import CONTROLS, GENERATORS, Endpoints
from agentd.api.errors import ApiError
from agentd.api.guard import is_json
from agentd.api.serving import Serving
from agentd.device.clock import boottime_s
from slmfleet import logs

log = logs.get(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_JSON = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed the connection."""


class Api:
    """Routes requests. The functions given to it read the daemon's state at each call."""

    def __init__(
        self,
        serving: Serving,
        catalog: Callable[[], Catalog],
        *,
        ready: Callable[[], Awaitable[dict[str, Any]]],
        status: Callable[[], Awaitable[dict[str, Any]]],
        metrics: Callable[[], Awaitable[bytes]],
        max_request_bytes: int,
        max_requests: int,
        host_allowed: Callable[[str], bool],
        created_s: int,
    ) -> None:
        self._endpoints = Endpoints(serving)
        self._catalog = catalog
        self._ready = ready
        self._status = status
        self._metrics = metrics
        self._max_request_bytes = max_request_bytes
        self._max_requests = max_requests
        self._host_allowed = host_allowed
        self._created_s = created_s
        # Requests to models that run or wait now.
        self.in_flight = 0
        # Set when agentd stops: running requests go on, new ones are refused.
        self.stopping = False
        # When a request last ended (CLOCK_BOOTTIME).
        self.last_request_s = 0.0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] != "http":
            return
        exchange = _Answer(send)
        try:
            await self._route(scope, receive, exchange)
        except ApiError as error:
            if not exchange.started:
                await exchange.start(error.status, [_JSON, *error.headers()])
                await exchange.body(error.body(), False)
        except ClientGone:
            pass
        except Exception:  # one request must not end the server
            log.error("a request failed", exc_info=True, path=scope["path"])
            if exchange.started:
                raise
            failure = ApiError(500, "internal_error", "agentd failed to answer; its log says why")
            await exchange.start(failure.status, [_JSON])
            await exchange.body(failure.body(), False)

    async def _route(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        method, path = scope["method"], scope["path"]
        relayed = "slmfleet.relay" in (scope.get("extensions") or {})
        if not relayed:
            self._check_host(scope)
        if path in GENERATORS:
            _require(method, "POST")
            await self._generate(scope, receive, answer, relayed)
        elif path == "/v1/models":
            _require(method, "GET")
            models = [self._model(name) for name in names(self._catalog(), relayed)]
            await answer.json({"object": "list", "data": models})
        elif path.startswith("/v1/models/"):
            _require(method, "GET")
            name = path.removeprefix("/v1/models/")
            if name not in names(self._catalog(), relayed):
                raise ApiError(404, "model_not_found", unknown(name, names(self._catalog(), relayed)), "model")
            await answer.json(self._model(name))
        elif path in CONTROLS and not relayed:
            await self._control(scope, receive, answer)
        elif path in ("/healthz", "/readyz", "/metrics", "/status") and not relayed:
            _require(method, "GET")
            await self._about_the_node(path, answer)
        else:
            raise ApiError(404, "not_found", f"there is no {path} here: see docs/api.md, and /v1/models for the models")

    def _check_host(self, scope: Message) -> None:
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if not self._host_allowed(host):
            raise ApiError(403, "host_not_allowed", f"this API is for programs on this device, not for {host!r}")

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created_s, "owned_by": "slmfleet"}

    async def _about_the_node(self, path: str, answer: _Answer) -> None:
        match path:
            case "/healthz":
                await answer.json({"status": "ok"})
            case "/readyz":
                facts = await self._ready()
                await answer.json(facts, 200 if facts["ready"] and not self.stopping else 503)
            case "/status":
                await answer.json(await self._status())
            case "/metrics":
                page = await self._metrics()
                await answer.start(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])
                await answer.body(page, False)

    async def _control(self, scope: Message, receive: Receive, answer: _Answer) -> None:
        path, method = scope["path"], scope["method"]
        _require(method, CONTROLS[path])
        if method != "POST":
            await answer.json(self._endpoints.status())
            return
        if not is_json(scope["headers"]):
            raise _not_json()
        raw = await self._read(receive)
        found: list[Any] = []

        async def work() -> None:
            found.append(await self._endpoints.control(path, raw))

        await _unless_gone(receive, work())
        await answer.json(found[0])

    async def _generate(self, scope: Message, receive: Receive, answer: _Answer, relayed: bool) -> None:
        if self.stopping:
            raise ApiError(503, "stopping", "agentd is stopping", retry_after_s=5.0)
        if self.in_flight >= self._max_requests:
            raise ApiError(
                503, "overloaded", f"{self._max_requests} requests run or wait on this node already", retry_after_s=1.0
            )
        if not relayed and not is_json(scope["headers"]):
            raise _not_json()
        self.in_flight += 1
        try:
            raw = await self._read(receive)
            work = self._endpoints.generate(scope["path"], raw, relayed, answer.start, answer.body)
            await _unless_gone(receive, work)
        finally:
            self.in_flight -= 1
            self.last_request_s = boottime_s()

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_request_bytes:
                raise ApiError(
                    413, "request_too_large",
                    f"the body is larger than {self._max_request_bytes} bytes (max_request_bytes of this node)",
                )  # fmt: skip
            if not message.get("more_body", False):
                return b"".join(parts)


class _Answer:
    """Sends one response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def json(self, value: Any, status: int = 200) -> None:
        await self.start(status, [_JSON])
        await self.body(json.dumps(value, ensure_ascii=False).encode(), False)


async def _unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work, and cancel it when the client leaves: a generation that nobody reads only heats the device."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientGone

    try:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(watch(), name="client watcher")
            await work
            watcher.cancel()
    except ExceptionGroup as group:
        # The cause first: an error of the work, else that the client left.
        others = [error for error in group.exceptions if not isinstance(error, ClientGone)]
        raise (others or group.exceptions)[0] from None


def _not_json() -> ApiError:
    return ApiError(415, "unsupported_media_type", "send the header `Content-Type: application/json`")


def _require(method: str, allowed: str) -> None:
    if method != allowed and not (method == "HEAD" and allowed == "GET"):
        raise ApiError(405, "method_not_allowed", f"use {allowed} here, not {method}")
