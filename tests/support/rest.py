"""The REST API in this process, on a real database, called as a client calls it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.artifacts.store import BlobStore
from controlplane.db import api_keys
from controlplane.db.engine import make_engine
from controlplane.rest.app import build_rest
from controlplane.rest.auth import Authenticator
from controlplane.rest.context import ServerInfo

FINGERPRINT = "ab" * 32
PROBLEM = "application/problem+json"


@dataclass
class Api:
    """A client with an admin key, and what is behind it."""

    client: httpx2.AsyncClient
    app: FastAPI
    engine: AsyncEngine
    authenticator: Authenticator
    blobs: BlobStore

    async def call(
        self,
        method: str,
        path: str,
        status: int = 200,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **q: Any,
    ) -> Any:
        """The JSON of an answer that must have ``status``; ``path`` is under /api/v1. An error must be a problem."""
        answer = await self.client.request(method, f"/api/v1{path}", json=body, params=q, headers=dict(headers or {}))
        assert answer.status_code == status, answer.text
        if status >= 400:
            assert answer.headers["content-type"] == PROBLEM
            problem = answer.json()
            assert problem["status"] == status
            assert problem["detail"]
            return problem
        return answer.json() if answer.content else None

    async def apply(
        self, *documents: Any, status: int = 200, dry_run: bool = False, allow_unmatched: bool = True
    ) -> Any:
        """POST /apply; its results, or the problem. Few tests have nodes, so selectors need not match any."""
        body = {"documents": list(documents)}
        answer = await self.call("POST", "/apply", status, body, dryRun=dry_run, allowUnmatched=allow_unmatched)
        return answer["results"] if status == 200 else answer

    async def query(self, statement: Any, **values: Any) -> list[Any]:
        """Rows (as dicts) of a statement, committed."""
        async with self.engine.begin() as connection:
            query = sa.text(statement) if isinstance(statement, str) else statement
            result = await connection.execute(query, values)
            return [dict(row) for row in result.mappings()] if result.returns_rows else []


@contextlib.asynccontextmanager
async def serving(url: str, **options: Any) -> AsyncIterator[Api]:
    """The API over the migrated database at ``url``; ``options`` go to ``build_rest``."""
    engine = make_engine(url)
    folder = tempfile.TemporaryDirectory(prefix="slmfleet-blobs-")
    blobs = BlobStore(Path(folder.name))
    blobs.prepare()
    try:
        async with engine.begin() as connection:
            secret = await api_keys.replace(connection, "tests", "admin")
        authenticator = Authenticator(engine)
        info = ServerInfo(5.0, 15.0, {"node_api": "127.0.0.1:8444"}, "http://127.0.0.1:8080/v1")
        parts = {"authenticator": authenticator, "blobs": blobs, "ca_fingerprint": FINGERPRINT, "info": info}
        app = build_rest(engine, **(parts | options))
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://fleet",
            headers={"authorization": f"Bearer {secret}"},
        ) as client:
            yield Api(client, app, engine, authenticator, blobs)
    finally:
        await engine.dispose()
        folder.cleanup()


def run(url: str, test: Callable[[Api], Awaitable[None]], **options: Any) -> None:
    """Run ``test`` with the API."""

    async def main() -> None:
        async with serving(url, **options) as api:
            await test(api)

    asyncio.run(main())
