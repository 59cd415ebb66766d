"""What the server says of itself: information, health, readiness, and files that are uploaded to it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from sqlalchemy.dialects.postgresql import insert

import slmfleet
from controlplane.artifacts.store import DigestMismatch, StoreFull
from controlplane.db import audit, migrate, objects, tables
from controlplane.db.engine import hint
from controlplane.domain.names import SHA256_PATTERN
from controlplane.rest.context import Caller, Context
from controlplane.rest.problems import ApiProblem
from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)
# Seconds in which the database must answer a readiness probe.
_READY_TIMEOUT_S = 2.0


def router(context: Context) -> APIRouter:
    """Routes of the API about the server itself."""
    routes = APIRouter()

    @routes.get("/info", tags=["server"], summary="Version, timing and addresses")
    async def info() -> dict[str, Any]:
        async with context.engine.connect() as connection:
            timeline = await objects.timeline(connection)
        return {
            "version": slmfleet.__version__,
            "timeline": timeline,
            "beatSeconds": context.info.beat_s,
            "ttlSeconds": context.info.ttl_s,
            "endpoints": dict(context.info.endpoints),
            "gateway": context.info.gateway,
        }

    _add_uploads(routes, context)
    return routes


def _add_uploads(routes: APIRouter, context: Context) -> None:
    @routes.put(
        "/uploads/{sha256}",
        tags=["uploads"],
        summary="Store the bytes of a file",
        openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}, "required": True}},
    )
    async def upload(
        sha256: Annotated[str, Path(pattern=SHA256_PATTERN, description="Hex SHA-256 of the bytes.")],
        request: Request,
        caller: Caller,
    ) -> dict[str, Any]:
        try:
            size = await context.blobs.write(sha256, request.stream())
        except DigestMismatch as error:
            raise ApiProblem(422, str(error), "digest-mismatch") from error
        except StoreFull as error:
            raise ApiProblem(507, str(error), "full") from error
        except OSError as error:
            # Not an OSError any more: the guard takes those for a database that is away.
            raise RuntimeError("the artifact store cannot be written") from error
        statement = insert(tables.blobs).values(sha256=sha256, size_bytes=size).on_conflict_do_nothing()
        async with context.engine.begin() as connection:
            await connection.execute(statement)
            await audit.record(connection, caller.name, "upload", f"blob/{sha256}", {"sizeBytes": size})
            await hint(connection, "spec")
        return {"sha256": sha256, "sizeBytes": size}


def probes(context: Context) -> APIRouter:
    """``/healthz`` and ``/readyz``, which anybody may ask."""
    routes = APIRouter(tags=["server"])

    @routes.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", summary="Whether requests can be served: the database answers and has the right schema")
    async def readyz() -> JSONResponse:
        reason = await _unready(context)
        if reason is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "2"})

    return routes


async def _unready(context: Context) -> str | None:
    try:
        async with asyncio.timeout(_READY_TIMEOUT_S), context.engine.connect() as connection:
            migrate.verdict(await migrate.current_of(connection))
    except UserError as error:
        return str(error)
    except (OSError, TimeoutError, sa.exc.SQLAlchemyError) as error:
        log.warning("not ready: no database", error=type(error).__name__)
        return "the database cannot be reached"
    return None
