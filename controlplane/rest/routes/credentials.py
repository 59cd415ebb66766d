"""Enrolment tokens and API keys: made once, shown once, revoked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from controlplane.db import api_keys, audit, objects, tables
from controlplane.db.objects import Order
from controlplane.domain.manifests import MAX_LABELS, Duration, LabelKey, LabelValue, Name
from controlplane.node_api import tokens as enrollment
from controlplane.rest import paging, views
from controlplane.rest.context import Caller, Context, ObjectId
from controlplane.rest.paging import DEFAULT_LIMIT, Cursor, Limit
from controlplane.rest.problems import ApiProblem, not_found

tokens, keys = tables.enrollment_tokens, tables.api_keys
_MAX_TTL_S = 366 * 86400
# What is shown once must not stay in any cache.
_ONCE = {"Cache-Control": "no-store"}


class TokenRequest(BaseModel):
    """How long and how often the token is good, and labels for the nodes that enrol with it."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)

    ttl_seconds: Annotated[Duration, Field(ge=1, le=_MAX_TTL_S)] = 3600.0
    uses: Annotated[int, Field(ge=1, le=100_000)] = 1
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=MAX_LABELS)] = {}


class KeyRequest(BaseModel):
    """A key for a person or a program."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)

    name: Name
    role: Literal["admin", "gateway"]
    ttl_seconds: Annotated[Duration, Field(ge=1, le=10 * _MAX_TTL_S)] | None = None


def router(context: Context) -> APIRouter:
    """All routes of tokens and keys."""
    routes = APIRouter()
    _add_tokens(routes, context)
    _add_keys(routes, context)
    return routes


def _token_rows() -> sa.Select[Any]:
    state = sa.case(
        (tokens.c.revoked_at.is_not(None), "revoked"),
        (tokens.c.expires_at <= sa.func.now(), "expired"),
        (tokens.c.uses_left <= 0, "used"),
        else_="active",
    )
    return sa.select(tokens, state.label("state"))


def _add_tokens(routes: APIRouter, context: Context) -> None:
    @routes.post("/enrollment-tokens", tags=["enrollment"], summary="Make a token; shown once", status_code=201)
    async def create_token(caller: Caller, body: TokenRequest | None = None) -> JSONResponse:
        wish, token = body or TokenRequest(), enrollment.new(context.ca_fingerprint)
        row = {
            "id": token.id,
            "secret_sha256": enrollment.hash_secret(token.secret),
            "labels": dict(wish.labels),
            "uses_left": wish.uses,
            "expires_at": sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, wish.ttl_seconds),
        }
        async with context.engine.begin() as connection:
            await connection.execute(sa.insert(tokens).values(row))
            detail = {"uses": wish.uses, "ttlSeconds": wish.ttl_seconds, "labels": dict(wish.labels)}
            await audit.record(connection, caller.name, "create", f"enrollment-token/{token.id}", detail)
            made = (await connection.execute(_token_rows().where(tokens.c.id == token.id))).one()
        return JSONResponse({**views.enrollment_token(made), "token": str(token)}, 201, _ONCE)

    @routes.get("/enrollment-tokens", tags=["enrollment"], summary="List tokens, newest first; without secrets")
    async def list_tokens(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        order = Order((tokens.c.created_at, tokens.c.id), descending=True)
        async with context.engine.connect() as connection:
            page = await objects.page(connection, _token_rows(), order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.enrollment_token)

    @routes.delete("/enrollment-tokens/{id}", tags=["enrollment"], summary="Revoke a token", status_code=204)
    async def delete_token(id: ObjectId, caller: Caller) -> Response:
        revoke = sa.update(tokens).where(tokens.c.id == id, tokens.c.revoked_at.is_(None))
        async with context.engine.begin() as connection:
            done = await connection.execute(revoke.values(revoked_at=sa.func.now()).returning(tokens.c.id))
            if done.first() is None:
                raise not_found("enrolment token that could be revoked:", id)
            await audit.record(connection, caller.name, "delete", f"enrollment-token/{id}")
        return Response(status_code=204)


def _add_keys(routes: APIRouter, context: Context) -> None:
    @routes.post("/api-keys", tags=["api-keys"], summary="Make an API key; shown once", status_code=201)
    async def create_key(body: KeyRequest, caller: Caller) -> JSONResponse:
        async with context.engine.begin() as connection:
            made = await api_keys.create(connection, body.name, body.role, body.ttl_seconds)
            if made is None:
                raise ApiProblem(409, f"there already is an API key {body.name}: take another name", "name-taken")
            key_id, secret = made
            await audit.record(connection, caller.name, "create", f"api-key/{body.name}", {"role": body.role})
            row = (await connection.execute(sa.select(keys).where(keys.c.id == key_id))).one()
        return JSONResponse({**views.api_key(row), "key": secret}, 201, _ONCE)

    @routes.get("/api-keys", tags=["api-keys"], summary="List API keys, by name; without the keys themselves")
    async def list_keys(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        order = Order((keys.c.name,))
        async with context.engine.connect() as connection:
            page = await objects.page(connection, sa.select(keys), order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.api_key)

    @routes.delete("/api-keys/{id}", tags=["api-keys"], summary="Revoke an API key", status_code=204)
    async def delete_key(id: ObjectId, caller: Caller) -> Response:
        if id == caller.id:
            raise ApiProblem(409, "this is the key that you are using: revoke it with another one", "own-key")
        async with context.engine.begin() as connection:
            name = await api_keys.revoke(connection, id)
            if name is None:
                raise not_found("API key", id)
            await audit.record(connection, caller.name, "delete", f"api-key/{name}")
        context.authenticator.forget()
        return Response(status_code=204)
