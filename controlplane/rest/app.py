"""The REST API as one ASGI application; what it needs comes in as parameters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer
from sqlalchemy.ext.asyncio import AsyncEngine

import slmfleet
from controlplane.rest import docs, problems
from controlplane.rest.auth import Authenticator
from controlplane.rest.context import BlobWriter, Context, Explainer, ServerInfo
from controlplane.rest.explaining import PlanExplainer
from controlplane.rest.guard import Guard
from controlplane.rest.routes import credentials, declared, nodes, observed, server

PREFIX = "/api/v1"
MAX_BODY_BYTES = 8 * 2**20
MAX_UPLOAD_BYTES = 256 * 2**30
_PROBLEM = {
    "description": "A problem (RFC 9457).",
    "content": {
        problems.MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "errors": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"pointer": {"type": "string"}, "message": {"type": "string"}},
                        },
                    },
                },
            }
        }
    },
}


def build_rest(
    engine: AsyncEngine,
    *,
    authenticator: Authenticator,
    blobs: BlobWriter,
    ca_fingerprint: str,
    info: ServerInfo,
    explainer: Explainer | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
) -> FastAPI:
    """``/api/v1``, ``/docs``, ``/openapi.json``, ``/healthz`` and ``/readyz``; the gateway is mounted beside them.

    ``ca_fingerprint``: hex SHA-256 of the CA certificate (DER). Sizes in bytes. The caller owns ``engine``.
    """
    context = Context(
        engine=engine,
        authenticator=authenticator,
        blobs=blobs,
        explainer=explainer or PlanExplainer(engine),
        ca_fingerprint=ca_fingerprint,
        info=info,
    )
    app = FastAPI(
        title="slmfleet",
        version=slmfleet.__version__,
        description="The operator API of the control plane. Authorize with an API key of role admin.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(
        Guard, authenticator=authenticator, max_body_bytes=max_body_bytes, max_upload_bytes=max_upload_bytes
    )
    problems.install(app)
    app.include_router(_api(context))
    app.include_router(server.probes(context))
    docs.install(app)
    return app


def _api(context: Context) -> APIRouter:
    # The key is checked by the guard; naming the scheme here is what gives the docs their Authorize button.
    bearer = HTTPBearer(auto_error=False, description="An API key: slmfleet_admin_...")
    responses: dict[int | str, dict[str, Any]] = {"default": _PROBLEM}
    api = APIRouter(prefix=PREFIX, dependencies=[Security(bearer)], responses=responses)
    for module in (declared, nodes, observed, credentials, server):
        api.include_router(module.router(context))
    return api
