"""Groups, models, agents and deployments: apply, read, replace, delete, and their versions and revisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Body, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from controlplane.db import objects, tables
from controlplane.db.objects import Order
from controlplane.domain.changes import Action
from controlplane.domain.manifests import KINDS, json_schema
from controlplane.domain.problems import Problem
from controlplane.rest import apply as applying
from controlplane.rest import paging, preconditions, views
from controlplane.rest.context import Caller, Context, ObjectName
from controlplane.rest.paging import DEFAULT_LIMIT, Cursor, Limit, SelectorQuery
from controlplane.rest.preconditions import IfMatch
from controlplane.rest.problems import ApiProblem, invalid, not_found


@dataclass(frozen=True, slots=True)
class Collection:
    """One kind's place in the API: ``path`` in the URL, its rows, and how a row is shown."""

    kind: str
    path: str
    query: Callable[[], sa.Select[Any]]
    table: sa.Table
    show: Callable[[sa.Row[Any]], dict[str, Any]]


AllowUnmatched = Annotated[
    bool,
    Query(
        alias="allowUnmatched",
        description="A selector or group that matches no node now is a warning instead of a 422 problem.",
    ),
]

COLLECTIONS = (
    Collection("Group", "groups", lambda: sa.select(tables.groups), tables.groups, views.group),
    Collection("Model", "models", objects.models, tables.models, views.model),
    Collection("Agent", "agents", objects.agents, tables.agents, views.agent),
    Collection(
        "Deployment", "deployments", lambda: sa.select(tables.deployments), tables.deployments, views.deployment
    ),
)


class ApplyBody(BaseModel):
    """Manifests that are applied together, all or none."""

    model_config = ConfigDict(extra="forbid")

    documents: Annotated[list[Any], Field(min_length=1, max_length=applying.MAX_DOCUMENTS)]


def router(context: Context) -> APIRouter:
    """All routes of declared objects."""
    routes = APIRouter()
    _add_apply(routes, context)
    for collection in COLLECTIONS:
        _add_reads(routes, context, collection)
        _add_writes(routes, context, collection)
    _add_versions(routes, context)
    return routes


def _add_apply(routes: APIRouter, context: Context) -> None:
    @routes.post("/apply", tags=["apply"], summary="Apply manifests, all or none")
    async def apply(
        body: ApplyBody,
        caller: Caller,
        dry_run: Annotated[bool, Query(alias="dryRun", description="Check and plan, write nothing.")] = False,
        allow_unmatched: AllowUnmatched = False,
    ) -> dict[str, Any]:
        manifests = applying.parse_all(body.documents)
        results = await applying.apply(
            context.engine, manifests, caller.name, dry_run=dry_run, allow_unmatched=allow_unmatched
        )
        return {
            "results": [
                {"kind": item.kind, "name": item.name, "action": item.action, "warnings": list(item.warnings)}
                for item in results
            ]
        }

    @routes.get("/schemas/{kind}", tags=["apply"], summary="JSON Schema of a kind's manifests")
    async def schema(kind: str) -> dict[str, Any]:
        if kind not in KINDS:
            raise ApiProblem(404, f"there is no kind {kind}: it is one of {', '.join(KINDS)}", "not-found")
        return json_schema(kind)


def _add_reads(routes: APIRouter, context: Context, collection: Collection) -> None:
    kind, path, table = collection.kind, collection.path, collection.table

    @routes.get(f"/{path}", tags=[path], summary=f"List {path}, by name", operation_id=f"list_{path}")
    async def list_objects(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, selector: SelectorQuery = "") -> Any:
        order = Order((table.c.name,))
        query = collection.query().where(objects.selected(table.c.labels, paging.parse(selector)))
        async with context.engine.connect() as connection:
            page = await objects.page(connection, query, order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, collection.show)

    @routes.get(f"/{path}/{{name}}", tags=[path], summary=f"Read one {kind}", operation_id=f"get_{path}")
    async def get_object(name: ObjectName) -> JSONResponse:
        return await _read(context, collection, name)


async def _read(context: Context, collection: Collection, name: str, status: int = 200) -> JSONResponse:
    query = collection.query().where(collection.table.c.name == name)
    async with context.engine.connect() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise not_found(collection.kind.lower(), name)
    headers = {"ETag": preconditions.etag(row.resource_version)}
    return JSONResponse(collection.show(row), status, headers)


def _add_writes(routes: APIRouter, context: Context, collection: Collection) -> None:
    kind, path = collection.kind, collection.path

    @routes.put(
        f"/{path}/{{name}}",
        tags=[path],
        summary=f"Make or replace one {kind}",
        operation_id=f"put_{path}",
        responses={201: {"description": "It was made."}},
        openapi_extra={
            "requestBody": {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}}
        },
    )
    async def put_object(
        name: ObjectName,
        document: Annotated[Any, Body()],
        caller: Caller,
        allow_unmatched: AllowUnmatched = False,
        if_match: IfMatch = None,
    ) -> JSONResponse:
        (manifest,) = applying.parse_all([document], prefix="")
        if manifest.kind != kind:
            raise invalid([Problem("/kind", f"is {manifest.kind}, but the path is that of a {kind}")])
        if manifest.metadata.name != name:
            raise invalid([Problem("/metadata/name", f"is {manifest.metadata.name}, but the path says {name}")])
        (result,) = await applying.apply(
            context.engine, [manifest], caller.name, allow_unmatched=allow_unmatched, if_match=if_match, prefix=""
        )
        answer = await _read(context, collection, name, 201 if result.action is Action.CREATED else 200)
        for warning in result.warnings:
            answer.headers.append("Warning", f'299 - "{_quoted(warning)}"')
        return answer

    @routes.delete(
        f"/{path}/{{name}}", tags=[path], summary=f"Delete one {kind}", operation_id=f"delete_{path}", status_code=204
    )
    async def delete_object(name: ObjectName, caller: Caller, if_match: IfMatch = None) -> Response:
        await applying.delete(context.engine, kind, name, caller.name, if_match)
        return Response(status_code=204)


def _quoted(text: str) -> str:
    """As a quoted-string of a header (RFC 9110, 5.6.4)."""
    return text.replace("\\", "\\\\").replace('"', '\\"').encode("ascii", "replace").decode()


def _add_versions(routes: APIRouter, context: Context) -> None:
    models, agents, revisions = tables.model_versions, tables.agent_versions, tables.revisions

    @routes.get("/models/{name}/versions", tags=["models"], summary="Versions of a model, newest first")
    async def model_versions(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        query, order = sa.select(models).where(models.c.model == name), (models.c.created_at, models.c.version)
        return await _history(context, tables.models, name, query, order, cursor, limit, views.model_version)

    @routes.get("/agents/{name}/versions", tags=["agents"], summary="Versions of an agent, newest first")
    async def agent_versions(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        query, order = sa.select(agents).where(agents.c.agent == name), (agents.c.number,)
        return await _history(context, tables.agents, name, query, order, cursor, limit, views.agent_version)

    @routes.get("/deployments/{name}/revisions", tags=["deployments"], summary="Revisions, newest first")
    async def deployment_revisions(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        query, order = sa.select(revisions).where(revisions.c.deployment == name), (revisions.c.number,)
        return await _history(context, tables.deployments, name, query, order, cursor, limit, views.revision)


async def _history(
    context: Context,
    owner: sa.Table,
    name: str,
    query: sa.Select[Any],
    columns: tuple[sa.ColumnElement, ...],
    cursor: str | None,
    limit: int,
    show: Callable[[sa.Row[Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Newest first: what belongs to the object ``name`` of the table ``owner``. Raises ApiProblem 404."""
    async with context.engine.connect() as connection:
        await require(connection, owner, name)
        order = Order(columns, descending=True)
        page = await objects.page(connection, query, order, paging.decode(cursor, columns), limit)
    return paging.answer(page, show)


async def require(connection: Any, owner: sa.Table, name: str) -> None:
    """Raise ApiProblem 404 unless ``owner`` holds ``name``."""
    found = await connection.execute(sa.select(sa.literal(1)).where(owner.c.name == name))
    if found.first() is None:
        raise not_found(owner.name.removesuffix("s"), name)
