"""The gate before every path under ``/api/``: no route can forget it, because none is asked.

It checks the key, bounds the body, and turns what nobody expected into a problem without a word about the inside.
"""

from __future__ import annotations

import re
import secrets

import asyncpg
import sqlalchemy as sa
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.rest.auth import Authenticator, Principal, Unauthorized
from controlplane.rest.problems import ApiProblem, response
from slmfleet import logs

log = logs.get(__name__)
PREFIX = "/api/"
PRINCIPAL = "slmfleet.principal"
_UPLOAD = re.compile(r"/api/v1/uploads/[^/]+")
# SQLSTATE classes: connection exception, insufficient resources, operator intervention.
_LOST_STATES = ("08", "53", "57P")


def principal_of(scope: Scope) -> Principal:
    """Who makes this request; the guard let it through."""
    principal = scope[PRINCIPAL]
    assert isinstance(principal, Principal)
    return principal


class Guard:
    """ASGI middleware. ``max_upload_bytes`` bounds the body of an upload, ``max_body_bytes`` every other."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, max_body_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._authenticator = authenticator
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._admit(scope, receive, sending)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:
            # The edge: whatever got past here would drop the connection, or tell the caller of our inside.
            problem = error if isinstance(error, ApiProblem) else _unexpected(scope, error)
            if started:
                raise
            await response(problem)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            scope[PRINCIPAL] = principal = await self._authenticator.authenticate(authorization)
        except Unauthorized as error:
            raise ApiProblem(401, str(error), "unauthorized", headers={"WWW-Authenticate": "Bearer"}) from None
        if not principal.is_admin:
            raise ApiProblem(
                403, f"the role {principal.role} may use the gateway only: use a key of role admin", "role"
            )
        if _UPLOAD.fullmatch(scope["path"]):
            limit = self._max_upload_bytes
        else:
            limit = self._max_body_bytes
            _as_json(scope)
        await self._app(scope, _limited(receive, headers.get(b"content-length"), limit), send)


def _as_json(scope: Scope) -> None:
    """Bodies are JSON here whatever curl calls them. No web page gains by it: a page cannot know the key."""
    others = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-type"]
    scope["headers"] = [*others, (b"content-type", b"application/json")]


def _limited(receive: Receive, content_length: bytes | None, limit: int) -> Receive:
    """``receive`` that raises ApiProblem 413 as soon as more than ``limit`` bytes were announced or came."""
    too_large = ApiProblem(413, f"the body is larger than {limit} bytes: send less at once", "too-large")
    announced = content_length is not None and content_length.isdigit() and int(content_length[:20]) > limit
    seen = 0

    async def receiving() -> Message:
        nonlocal seen
        if announced:
            raise too_large
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise too_large
        return message

    return receiving


def _unexpected(scope: Scope, error: Exception) -> ApiProblem:
    """503 while Postgres is away, else 500 with an id under which the log has the rest."""
    if _is_lost(error):
        log.warning("request refused: no database", path=scope["path"], error=type(error).__name__)
        return ApiProblem(
            503,
            "the database cannot be reached now: try again in a few seconds",
            "database",
            headers={"Retry-After": "5"},
        )
    incident = secrets.token_hex(8)
    log.error("request failed", method=scope["method"], path=scope["path"], incident=incident, exc_info=error)
    return ApiProblem(500, f"something went wrong inside the control plane; its log has it as incident {incident}")


def _is_lost(error: BaseException) -> bool:
    """Whether the database is away, starting, stopping or full of connections. Routes with files of their own handle
    their OSErrors themselves: what arrives here came from a socket to Postgres."""
    if isinstance(error, sa.exc.DBAPIError):
        state = str(getattr(error.orig, "sqlstate", None) or "")
        return error.connection_invalidated or state.startswith(_LOST_STATES)
    return isinstance(error, (OSError, TimeoutError, sa.exc.TimeoutError, asyncpg.PostgresConnectionError))
