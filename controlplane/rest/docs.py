"""``/docs``: Swagger UI, served from the wheel that carries it. FastAPI's own page loads it from a CDN, and the
networks that fleets live in are often closed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from controlplane.domain.manifests import KINDS, json_schema

_ASSETS = "/docs/assets"


def install(app: FastAPI) -> None:
    """Add ``/docs`` and its files to ``app``, which has docs of its own switched off."""
    _describe_manifests(app)
    app.mount(_ASSETS, StaticFiles(packages=[("fastapi_swagger", "resources")]), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # Relative addresses, so that the page also works behind a proxy that puts a prefix before it. No validator:
        # that is a service on the internet which would be sent the API's description.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon-32x32.png",
            swagger_ui_parameters={"persistAuthorization": True, "validatorUrl": None, "filter": True},
        )


def _describe_manifests(app: FastAPI) -> None:
    """Add the kinds of manifests to the OpenAPI document: routes take them as plain JSON, to give errors of our own."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            components = plain()["components"]["schemas"]
            for kind in KINDS:
                schema = json_schema(kind, "#/components/schemas/{model}")
                del schema["$schema"]
                components.update(schema.pop("$defs", {}))
                components[kind] = schema
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
