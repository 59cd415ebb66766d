"""What is going on: replicas of a deployment, why they are where they are, events, metrics, the audit trail."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter

from controlplane.db import objects, tables
from controlplane.db.objects import Order
from controlplane.rest import paging, views
from controlplane.rest.context import Context, ObjectName
from controlplane.rest.paging import DEFAULT_LIMIT, Cursor, Limit
from controlplane.rest.problems import not_found
from controlplane.rest.routes.declared import require


def router(context: Context) -> APIRouter:
    """All routes that only observe."""
    routes = APIRouter()
    _add_deployments(routes, context)
    _add_events(routes, context)
    _add_metrics(routes, context)
    return routes


def _add_deployments(routes: APIRouter, context: Context) -> None:
    @routes.get("/deployments/{name}/replicas", tags=["deployments"], summary="Replicas, by node")
    async def replicas(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        order = Order((tables.nodes.c.name,))
        query = objects.replicas().where(tables.assignments.c.deployment == name)
        async with context.engine.connect() as connection:
            await require(connection, tables.deployments, name)
            page = await objects.page(connection, query, order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.replica)

    @routes.get("/deployments/{name}/explain", tags=["deployments"], summary="Per node: chosen or not, and why")
    async def explain(name: ObjectName) -> Any:
        try:
            return {"items": await context.explainer.explain(name), "nextCursor": None}
        except KeyError:
            raise not_found("deployment", name) from None


def _add_events(routes: APIRouter, context: Context) -> None:
    table = tables.events

    async def listed(owner: sa.Table, name: str, limit: int, cursor: str | None) -> Any:
        order = Order((table.c.id,), descending=True)
        query = sa.select(table).where(table.c.object == f"{owner.name.removesuffix('s')}/{name}")
        async with context.engine.connect() as connection:
            await require(connection, owner, name)
            page = await objects.page(connection, query, order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.event)

    @routes.get("/nodes/{name}/events", tags=["nodes"], summary="Events of a node, newest first")
    async def node_events(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        return await listed(tables.nodes, name, limit, cursor)

    @routes.get("/deployments/{name}/events", tags=["deployments"], summary="Events of a deployment, newest first")
    async def deployment_events(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        return await listed(tables.deployments, name, limit, cursor)


def _add_metrics(routes: APIRouter, context: Context) -> None:
    metrics, trail, nodes = tables.node_metrics, tables.audit, tables.nodes

    @routes.get("/nodes/{name}/metrics", tags=["nodes"], summary="Telemetry rows of a node, newest first")
    async def node_metrics(name: ObjectName, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        order = Order((metrics.c.at, metrics.c.epoch, metrics.c.sequence), descending=True)
        async with context.engine.connect() as connection:
            node_id = (await connection.execute(sa.select(nodes.c.id).where(nodes.c.name == name))).scalar()
            if node_id is None:
                raise not_found("node", name)
            query = sa.select(metrics).where(metrics.c.node_id == node_id)
            page = await objects.page(connection, query, order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.metric)

    @routes.get("/audit", tags=["audit"], summary="Who wrote what, newest first")
    async def audit(limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Any:
        order = Order((trail.c.id,), descending=True)
        async with context.engine.connect() as connection:
            page = await objects.page(connection, sa.select(trail), order, paging.decode(cursor, order.columns), limit)
        return paging.answer(page, views.audit)
