"""Nodes: read, relabel, drain, revoke."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from controlplane.db import audit, events, objects, tables
from controlplane.db.engine import hint
from controlplane.db.objects import Order
from controlplane.domain.manifests import MAX_LABELS, LabelKey, LabelValue
from controlplane.domain.problems import Problem
from controlplane.rest import paging, preconditions, views
from controlplane.rest.context import Caller, Context, ObjectName
from controlplane.rest.paging import DEFAULT_LIMIT, Cursor, Limit, SelectorQuery
from controlplane.rest.preconditions import IfMatch
from controlplane.rest.problems import invalid, not_found

nodes = tables.nodes


class NodePatch(BaseModel):
    """What is absent stays. A label with the value null is removed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    labels: Annotated[dict[LabelKey, LabelValue | None], Field(max_length=MAX_LABELS)] = {}
    drained: bool | None = None


def router(context: Context) -> APIRouter:
    """All routes of nodes but their events and metrics."""
    routes = APIRouter(tags=["nodes"])
    _add_reads(routes, context)
    _add_writes(routes, context)
    return routes


def _add_reads(routes: APIRouter, context: Context) -> None:
    @routes.get("/nodes", summary="List nodes, by name")
    async def list_nodes(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, selector: SelectorQuery = "") -> Any:
        order = Order((nodes.c.name,))
        query = objects.nodes().where(objects.selected(nodes.c.labels, paging.parse(selector)))
        async with context.engine.connect() as connection:
            page = await objects.page(connection, query, order, paging.decode(cursor, order.columns), limit)
            replicas = await objects.replicas_of_nodes(connection, [row.id for row in page.rows])
        return paging.answer(page, lambda row: views.node(row, replicas[row.id]))

    @routes.get("/nodes/{name}", summary="Read one node")
    async def get_node(name: ObjectName) -> JSONResponse:
        async with context.engine.connect() as connection:
            return await _read(connection, name)


def _add_writes(routes: APIRouter, context: Context) -> None:
    @routes.patch("/nodes/{name}", summary="Relabel or drain a node")
    async def patch_node(name: ObjectName, patch: NodePatch, caller: Caller, if_match: IfMatch = None) -> JSONResponse:
        async with context.engine.begin() as connection:
            row = await _locked(connection, name)
            preconditions.check(if_match, row.resource_version, f"node {name}")
            await _patch(connection, row, patch, caller.name)
            return await _read(connection, name)

    @routes.delete("/nodes/{name}", summary="Revoke and forget a node", status_code=204)
    async def delete_node(name: ObjectName, caller: Caller, if_match: IfMatch = None) -> Response:
        async with context.engine.begin() as connection:
            row = await _locked(connection, name)
            preconditions.check(if_match, row.resource_version, f"node {name}")
            # Its certificates go with it: what is not known is not let in.
            await connection.execute(sa.delete(nodes).where(nodes.c.id == row.id))
            await audit.record(connection, caller.name, "delete", f"node/{name}", {"id": row.id})
            await hint(connection, f"node:{row.id}")
            await hint(connection, "spec")
        return Response(status_code=204)


async def _read(connection: AsyncConnection, name: str) -> JSONResponse:
    row = (await connection.execute(objects.nodes().where(nodes.c.name == name))).one_or_none()
    if row is None:
        raise not_found("node", name)
    replicas = await objects.replicas_of_nodes(connection, [row.id])
    headers = {"ETag": preconditions.etag(row.resource_version)}
    return JSONResponse(views.node(row, replicas[row.id]), headers=headers)


async def _locked(connection: AsyncConnection, name: str) -> sa.Row[Any]:
    query = sa.select(nodes).where(nodes.c.name == name, nodes.c.revoked_at.is_(None)).with_for_update()
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise not_found("node", name)
    return row


async def _patch(connection: AsyncConnection, row: sa.Row[Any], patch: NodePatch, actor: str) -> None:
    """Write what differs, and wake the controllers; a patch that changes nothing writes nothing."""
    labels = {key: value for key, value in (row.labels | patch.labels).items() if value is not None}
    drained = row.drained if patch.drained is None else patch.drained
    if len(labels) > MAX_LABELS:
        raise invalid(
            [Problem("/labels", f"the node would have {len(labels)} labels: at most {MAX_LABELS} are allowed")]
        )
    if (labels, drained) == (row.labels, row.drained):
        return
    await connection.execute(
        sa.update(nodes)
        .where(nodes.c.id == row.id)
        .values(
            labels=labels,
            drained=drained,
            updated_at=sa.func.now(),
            resource_version=nodes.c.resource_version + 1,
        )
    )
    if drained != row.drained:
        reason, sentence = ("Drained", "takes no new work") if drained else ("Undrained", "takes work again")
        await events.record(connection, "info", f"node/{row.name}", reason, f"By {actor}: the node {sentence}.")
    await audit.record(connection, actor, "patch", f"node/{row.name}", patch.model_dump(exclude_unset=True))
    await hint(connection, f"node:{row.id}")
    await hint(connection, "spec")
