"""The gateway as an ASGI application: OpenAI's paths (see PASSED) and ``/v1/models`` for the whole fleet.

Plain ASGI without a framework or validation of bodies: what a request may say is the node's business; the gateway reads
``model`` and passes the rest on unread.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db.engine import Hints
from controlplane.gateway.answers import Answer, ApiError, HeaderLines, Message, Receive, Send
from controlplane.gateway.balancer import Balancer
from controlplane.gateway.forwarding import Forwarder, Request
from controlplane.gateway.metrics import Metrics
from controlplane.gateway.routes import Routes
from controlplane.gateway.table import RoutingTable, Target
from controlplane.node_api.links import NodeLinks
from controlplane.rest.auth import Unauthorized
from slmfleet import logs

log = logs.get(__name__)

_ROLES = frozenset({"admin", "gateway"})
# Request headers that travel to the node. The caller's key never does.
_TRAVEL = frozenset({b"idempotency-key", b"traceparent", b"tracestate"})
_JSON = (b"content-type", b"application/json")
# What is passed on to a node, chosen by ``model``.
PASSED = frozenset({"/chat/completions", "/completions", "/embeddings", "/responses"})


class Principal(Protocol):
    """Who calls."""

    @property
    def role(self) -> str:
        """admin or gateway."""
        ...


class Authenticator(Protocol):
    """Knows callers by their Authorization header (``controlplane.rest.auth``)."""

    async def authenticate(self, authorization: str | None) -> Principal:
        """The caller. Raises Unauthorized."""
        ...


@dataclass(frozen=True, slots=True)
class GatewayPolicy:
    """Limits and times of the gateway."""

    # Seconds that a request may take, answer included; a caller may ask for less (x-slmfleet-timeout: seconds).
    timeout_s: float = 120.0
    max_request_bytes: int = 8 << 20
    # Seconds within which the body of a request must be here.
    body_timeout_s: float = 30.0
    # Requests under way; more are refused with 429.
    most_per_replica: int = 64
    most_per_target: int = 1024
    refresh_s: float = 1.0
    # A node that was silent for so long is not chosen: one TTL.
    silent_s: float = 15.0


class _ClientGone(Exception):
    """The caller closed the connection."""


class Gateway:
    """ASGI 3 application. ``run`` keeps its routing table fresh and must run beside it."""

    def __init__(
        self, engine: AsyncEngine, hints: Hints, links: NodeLinks, authenticator: Authenticator, policy: GatewayPolicy
    ) -> None:
        self._authenticator = authenticator
        self._policy = policy
        self._clock = asyncio.get_running_loop().time
        self._metrics = Metrics()
        self._balancer = Balancer(
            links,
            most_per_replica=policy.most_per_replica,
            most_per_target=policy.most_per_target,
            silent_s=policy.silent_s,
            clock=self._clock,
        )
        self._forwarder = Forwarder(links, self._balancer, self._metrics, self._clock)
        self._routes = Routes(engine, hints, period_s=policy.refresh_s, changed=self._on_table)

    async def run(self) -> None:
        """Keep the routing table fresh until cancelled."""
        await self._routes.run()

    def metrics_text(self) -> str:
        """Counters and latencies in Prometheus's text format."""
        return self._metrics.text(self._balancer.outstanding)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request. Works mounted (``root_path``) or at the top, with or without the ``/v1`` in its path."""
        if scope["type"] != "http":
            return
        answer = Answer(send)
        arrived = self._clock()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:128] or secrets.token_hex(12).encode()
        own = [(b"x-request-id", request_id)]
        target = ""
        try:
            await self._authenticate(headers)
            path = _path(scope)
            if path in PASSED:
                _require(scope["method"], "POST")
                body = await self._read(receive)
                found = self._find(_model_of(body))
                target = found.name
                request = Request(
                    path=f"/v1{path}",
                    headers=_node_headers(headers, request_id),
                    body=body,
                    arrived=arrived,
                    deadline=arrived + self._timeout_s(headers),
                    answer_headers=own,
                )
                result = await _unless_gone(receive, answer, self._forwarder.forward(request, found, answer))
            else:
                _require(scope["method"], "GET")
                await answer.whole(200, [_JSON, *own], self._models(path))
                result = "ok"
        except ApiError as error:
            result = error.result
            await answer.error(error, own)
        except _ClientGone:
            result = "cancelled"
        except Exception as error:  # noqa: BLE001 - the edge: one request must not end the server
            result = await self._failed(error, answer, own)
        self._metrics.requests[(target, result)] += 1
        if target:
            self._metrics.total_s.observe(target, self._clock() - arrived)

    async def _failed(self, error: Exception, answer: Answer, own: HeaderLines) -> str:
        """One request must not end the server, nor the text of a bug stand in an answer."""
        if answer.started and isinstance(error, OSError):
            # The server's send, on a connection that the caller has closed.
            return "cancelled"
        log.error("request failed", exc_info=error)
        if answer.started:
            raise error
        await answer.error(ApiError(500, "internal_error", "the gateway failed to answer; its log says why"), own)
        return "internal_error"

    async def _authenticate(self, headers: dict[bytes, bytes]) -> None:
        authorization = headers.get(b"authorization")
        try:
            given = authorization.decode("latin-1") if authorization is not None else None
            principal = await self._authenticator.authenticate(given)
        except Unauthorized as error:
            raise ApiError(401, "invalid_api_key", str(error), result="unauthorized") from None
        except (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            log.warning("cannot check a key: the database is not there", error=error)
            message = "keys can't be checked now: the control plane has no database"
            raise ApiError(503, "unavailable", message, retry_after_s=2.0) from None
        if principal.role not in _ROLES:
            raise ApiError(403, "forbidden", f"a key of role {principal.role} may not call models")

    async def _read(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._policy.body_timeout_s):
                return await self._read_all(receive)
        except TimeoutError:
            limit = f"{self._policy.body_timeout_s:g} s"
            raise ApiError(408, "timeout", f"the body did not arrive within {limit}", result="bad_request") from None

    async def _read_all(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self._policy.max_request_bytes:
                limit = self._policy.max_request_bytes
                raise ApiError(413, "request_too_large", f"the body is larger than {limit} bytes", result="bad_request")
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _find(self, name: str) -> Target:
        table = self._loaded()
        target = table.targets.get(name)
        if target is not None:
            return target
        near = table.near(name)
        known = near or [one.name for one in table.listed[:10]]
        words = "did you mean " if near else "there are " if known else ""
        hint = f": {words}{', '.join(known)}{'?' if near else ''}" if known else ": nothing is deployed yet"
        raise ApiError(
            404, "model_not_found", f"there is no model {name[:100]!r} in this fleet{hint}", param="model",
            result="not_found",
        )  # fmt: skip

    def _loaded(self) -> RoutingTable:
        if self._routes.table is None:
            message = "the gateway starts and has no routes yet"
            raise ApiError(503, "starting", message, retry_after_s=1.0, result="unavailable")
        return self._routes.table

    def _models(self, path: str) -> bytes:
        if path == "/models":
            data = [_model(target) for target in self._loaded().listed]
            return json.dumps({"object": "list", "data": data}).encode()
        if path.startswith("/models/"):
            return json.dumps(_model(self._find(path.removeprefix("/models/")))).encode()
        known = ", ".join(f"/v1{one}" for one in sorted(PASSED))
        message = f"there is no /v1{path} here: there are {known} and /v1/models"
        raise ApiError(404, "not_found", message)

    def _timeout_s(self, headers: dict[bytes, bytes]) -> float:
        wished = headers.get(b"x-slmfleet-timeout")
        if wished is None:
            return self._policy.timeout_s
        try:
            seconds = float(wished)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            message = "x-slmfleet-timeout must be a number of seconds above 0"
            raise ApiError(400, "invalid_header", message, result="bad_request")
        return min(seconds, self._policy.timeout_s)

    def _on_table(self, table: RoutingTable) -> None:
        self._balancer.keep_only(replica.id for target in table.listed for replica in target.replicas)


def build_gateway(
    engine: AsyncEngine,
    hints: Hints,
    links: NodeLinks,
    authenticator: Authenticator,
    policy: GatewayPolicy | None = None,
) -> Gateway:
    """The gateway over the nodes in ``links``. Call it inside the event loop that will serve it, and run
    ``Gateway.run`` beside it."""
    return Gateway(engine, hints, links, authenticator, policy or GatewayPolicy())


def _path(scope: Message) -> str:
    path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    path = path.removeprefix("/v1") if path.startswith("/v1/") else path
    return path.rstrip("/") or "/"


def _require(method: str, allowed: str) -> None:
    if method != allowed:
        raise ApiError(405, "method_not_allowed", f"use {allowed} here, not {method}", result="bad_request")


def _model_of(body: bytes) -> str:
    """``model`` of a request; the rest is for the node to check."""
    try:
        parsed: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is no JSON", result="bad_request") from None
    name = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(name, str) or not name:
        message = "model is missing: name an agent (agent/<name>), a deployment or a model; GET /v1/models lists them"
        raise ApiError(400, "missing_model", message, param="model", result="bad_request")
    return name


def _node_headers(headers: dict[bytes, bytes], request_id: bytes) -> list[tuple[str, str]]:
    travel = [(name, value) for name, value in headers.items() if name in _TRAVEL]
    lines = [*travel, _JSON, (b"x-request-id", request_id)]
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in lines]


def _model(target: Target) -> dict[str, Any]:
    return {"id": target.name, "object": "model", "created": target.created_s, "owned_by": "slmfleet"}


async def _unless_gone(receive: Receive, answer: Answer, work: Awaitable[str]) -> str:
    """Do the work, and cancel it when the caller leaves: the node must not generate for nobody. A caller that leaves
    with the complete answer cancels nothing: what is left of the work is to see the exchange end and to count it."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not answer.complete:
            raise _ClientGone

    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch(), name="gateway-client-watch")
            result = await work
            watcher.cancel()
            return result
    except BaseExceptionGroup as caught:
        # The work's own error first; that the caller left is the reason only when there is no other.
        others = [error for error in caught.exceptions if not isinstance(error, _ClientGone)]
        raise (others or caught.exceptions)[0] from None
