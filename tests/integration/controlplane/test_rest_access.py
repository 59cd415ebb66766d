"""Who may do what: keys, roles, tokens, and what an error never tells."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import APIRoute

import slmfleet
from controlplane.artifacts.store import BlobStore, StoreFull
from controlplane.db import api_keys, migrate
from controlplane.db.engine import make_engine
from controlplane.node_api import tokens as enrollment
from controlplane.rest.app import build_rest
from controlplane.rest.auth import Authenticator, Unauthorized
from controlplane.rest.context import ServerInfo
from tests.support.rest import FINGERPRINT, PROBLEM, Api, run

pytestmark = pytest.mark.postgres


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of every route that the application serves, in the schema or not."""
    stack: list[tuple[str, Any]] = [("", route) for route in app.router.routes]
    while stack:
        prefix, route = stack.pop()
        if hasattr(route, "effective_route_contexts"):
            for inner in route.effective_route_contexts():
                yield from ((method, inner.path) for method in inner.methods or ())
        elif isinstance(route, APIRoute) or hasattr(route, "methods"):
            yield from ((method, prefix + route.path) for method in route.methods or ())
        else:
            stack += [(prefix + route.path, inner) for inner in getattr(route, "routes", None) or ()]


def test_every_route_of_the_api_refuses_the_anonymous_and_the_gateways_keys(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        served = {item for item in routes_of(api.app) if item[1].startswith("/api/")}
        described = {
            (method.upper(), path)
            for path, item in api.app.openapi()["paths"].items()
            for method in item
            if "/api/" in path
        }
        assert described <= served
        assert len(served) >= 35
        key = (await api.call("POST", "/api-keys", 201, {"name": "gw", "role": "gateway"}))["key"]
        for method, path in sorted(served | {("GET", "/api/v1/nothing/here"), ("POST", "/api/")}):
            url = path.replace("{sha256}", "ab" * 32).replace("{", "").replace("}", "")
            for headers, status in (({"authorization": ""}, 401), ({"authorization": f"Bearer {key}"}, 403)):
                answer = await api.client.request(method, url, headers=headers, content=b"{")
                assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), (method, path)
            assert answer.json()["type"] == "urn:slmfleet:problem:role"
        assert await api.query("SELECT * FROM blobs") == []

    run(migrated_postgres_url, test)


def test_what_is_open_is_open(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/assets/swagger-ui-bundle.js"):
            answer = await api.client.get(path, headers={"authorization": ""})
            assert answer.status_code == 200, path
        page = (await api.client.get("/docs")).text
        assert "http://" not in page
        assert "https://" not in page
        for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
            assert f"docs/assets/{asset}" in page
        described = (await api.client.get("/openapi.json")).json()
        assert {"Model", "Agent", "Group", "Deployment", "DeploymentSpec"} <= set(described["components"]["schemas"])
        for reference in json.dumps(described).split('"$ref": "')[1:]:
            name = reference.split('"')[0].removeprefix("#/components/schemas/")
            assert name in described["components"]["schemas"]

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(
    "header",
    ["", "Basic abc", "Bearer", "Bearer  ", "Bearer slmfleet_admin_wrong", "slmfleet_admin_x", "Bearer " + "x" * 9000,
     "Bearer \xe9\xff"],
)  # fmt: skip
def test_bad_keys(migrated_postgres_url: str, header: str) -> None:
    async def test(api: Api) -> None:
        answer = await api.client.get("/api/v1/info", headers=[(b"authorization", header.encode("latin-1"))])
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (
            "Bearer slmfleet_..." in answer.json()["detail"] or "unknown, expired or revoked" in answer.json()["detail"]
        )

    run(migrated_postgres_url, test)


def test_keys_are_made_listed_and_revoked(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        made = await api.call("POST", "/api-keys", 201, {"name": "ada", "role": "admin", "ttlSeconds": "1h"})
        assert made["key"].startswith("slmfleet_admin_")
        assert made["expiresAt"] > made["createdAt"]
        mine = {"authorization": f"Bearer {made['key']}"}
        assert (await api.call("GET", "/info", headers=mine))["version"] == slmfleet.__version__
        listed = await api.call("GET", "/api-keys")
        assert [item["name"] for item in listed["items"]] == ["ada", "tests"]
        (row,) = await api.query("SELECT * FROM api_keys WHERE name = 'ada'")
        for text in (str(listed), str(row), str(await api.call("GET", "/audit"))):
            assert made["key"] not in text
        assert "ada" in (await api.call("POST", "/api-keys", 409, {"name": "ada", "role": "admin"}))["detail"]
        await api.call("POST", "/api-keys", 422, {"name": "bob", "role": "root"})
        await api.call("DELETE", f"/api-keys/{made['id']}", 409, headers=mine)
        await api.call("DELETE", f"/api-keys/{made['id']}", 204)
        await api.call("GET", "/info", 401, headers=mine)
        await api.call("DELETE", f"/api-keys/{made['id']}", 404)

    run(migrated_postgres_url, test)


def test_a_known_key_costs_no_query_until_its_time_is_over(migrated_postgres_url: str) -> None:
    async def main() -> None:
        engine, now, queries = make_engine(migrated_postgres_url), [0.0], []
        sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *arguments: queries.append(arguments[2]))
        try:
            async with engine.begin() as connection:
                lasting = await api_keys.create(connection, "lasting", "gateway")
                short = await api_keys.create(connection, "short", "admin", 3.0)
            assert lasting
            assert short
            known = Authenticator(engine, cache_s=10.0, cache_size=2, clock=lambda: now[0])
            principal = await known.authenticate(f"Bearer {lasting[1]}")
            assert (principal.name, principal.role, principal.is_admin) == ("lasting", "gateway", False)
            await known.authenticate(f"bearer {short[1]}")
            queries.clear()
            assert await known.authenticate(f"Bearer {lasting[1]}") == principal
            assert queries == []
            now[0] = 4.0
            await known.authenticate(f"Bearer {lasting[1]}")
            assert queries == []
            await known.authenticate(f"Bearer {short[1]}")
            assert len(queries) == 1
            async with engine.begin() as connection:
                await connection.execute(sa.text("UPDATE api_keys SET expires_at = now() WHERE name = 'short'"))
                await connection.execute(sa.text("UPDATE api_keys SET revoked_at = now() WHERE name = 'lasting'"))
            now[0] = 11.0
            for _, secret in (lasting, short):
                with pytest.raises(Unauthorized):
                    await known.authenticate(f"Bearer {secret}")
        finally:
            await engine.dispose()

    asyncio.run(main())


def test_a_replaced_key_ends_the_old_one(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        async with api.engine.begin() as connection:
            fresh = await api_keys.replace(connection, "tests", "admin")
        api.authenticator.forget()
        await api.call("GET", "/info", 401)
        await api.call("GET", "/info", headers={"authorization": f"Bearer {fresh}"})

    run(migrated_postgres_url, test)


def test_enrolment_tokens(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        made = await api.call(
            "POST", "/enrollment-tokens", 201, {"ttlSeconds": 60, "uses": 3, "labels": {"site": "lyon"}}
        )
        token = enrollment.parse(made["token"])
        assert (token.id, token.fingerprint) == (made["id"], FINGERPRINT)
        assert made | {"usesLeft": 3, "labels": {"site": "lyon"}, "state": "active"} == made
        (row,) = await api.query("SELECT * FROM enrollment_tokens")
        assert row["secret_sha256"] == enrollment.hash_secret(token.secret)
        answer = await api.client.post("/api/v1/enrollment-tokens")
        assert answer.status_code == 201
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["usesLeft"] == 1
        used = (await api.call("POST", "/enrollment-tokens", 201, {}))["id"]
        old = (await api.call("POST", "/enrollment-tokens", 201, {}))["id"]
        await api.query("UPDATE enrollment_tokens SET uses_left = 0 WHERE id = :id", id=used)
        await api.query("UPDATE enrollment_tokens SET expires_at = now() WHERE id = :id", id=old)
        await api.call("DELETE", f"/enrollment-tokens/{made['id']}", 204)
        await api.call("DELETE", f"/enrollment-tokens/{made['id']}", 404)
        listed = await api.call("GET", "/enrollment-tokens")
        assert [item["state"] for item in listed["items"]] == ["expired", "used", "active", "revoked"]
        assert token.secret not in str(listed)
        assert token.secret not in str(await api.call("GET", "/audit"))
        page = await api.call("GET", "/enrollment-tokens", limit=3)
        last = await api.call("GET", "/enrollment-tokens", limit=3, cursor=page["nextCursor"])
        assert [item["id"] for item in last["items"]] == [made["id"]]

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(
    "body",
    [{"ttlSeconds": 0}, {"ttlSeconds": "soon"}, {"uses": 0}, {"uses": True}, {"labels": {"a b": "c"}}, {"use": 1}],
)
def test_bad_token_requests(migrated_postgres_url: str, body: dict[str, Any]) -> None:
    async def test(api: Api) -> None:
        await api.call("POST", "/enrollment-tokens", 422, body)
        assert await api.query("SELECT * FROM enrollment_tokens") == []

    run(migrated_postgres_url, test)


def test_uploads(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        content = b"weights" * 1000
        digest = hashlib.sha256(content).hexdigest()
        for _ in range(2):
            answer = await api.client.put(f"/api/v1/uploads/{digest}", content=content)
            assert (answer.status_code, answer.json()) == (200, {"sha256": digest, "sizeBytes": len(content)})
        assert api.blobs.path(digest).read_bytes() == content
        assert [(row["sha256"], row["size_bytes"]) for row in await api.query("SELECT * FROM blobs")] == [
            (digest, len(content))
        ]
        other = "00" * 32
        answer = await api.client.put(f"/api/v1/uploads/{other}", content=content)
        assert answer.status_code == 422
        assert answer.json()["type"] == "urn:slmfleet:problem:digest-mismatch"
        assert not api.blobs.has(other)
        await api.call("PUT", "/uploads/short", 422)
        assert len(await api.query("SELECT * FROM blobs")) == 1

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(StoreFull("the artifact store is full: free space"), 507, "the artifact store is full"),
     (PermissionError(13, "no", "/srv/blobs"), 500, "incident")],
)  # fmt: skip
def test_an_upload_that_the_disk_refuses(migrated_postgres_url: str, error: Exception, status: int, told: str) -> None:
    class Refusing:
        async def write(self, sha256: str, chunks: AsyncIterator[bytes]) -> int:
            raise error

    async def test(api: Api) -> None:
        answer = await api.client.put(f"/api/v1/uploads/{'ab' * 32}", content=b"x")
        assert answer.status_code == status
        assert told in answer.json()["detail"]
        assert "/srv" not in answer.text
        assert await api.query("SELECT * FROM blobs") == []

    run(migrated_postgres_url, test, blobs=Refusing())


def test_bodies_are_bounded_whatever_they_announce(migrated_postgres_url: str) -> None:
    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b"x" * 100

    async def test(api: Api) -> None:
        for path, method in (("/api/v1/apply", "POST"), (f"/api/v1/uploads/{'ab' * 32}", "PUT")):
            for content in (b"x" * 2001, pieces(21)):
                answer = await api.client.request(
                    method, path, content=content, headers={"content-type": "application/json"}
                )
                assert (answer.status_code, answer.headers["content-type"]) == (413, PROBLEM), path
                assert "larger than" in answer.json()["detail"]
        assert not api.blobs.has("ab" * 32)

    run(migrated_postgres_url, test, max_body_bytes=1000, max_upload_bytes=2000)


def test_errors_of_the_framework_are_problems_too(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.call("GET", "/nothing", 404)
        await api.call("GET", "/nodes/", 404)
        answer = await api.client.delete("/api/v1/info")
        assert (answer.status_code, answer.headers["content-type"], answer.headers["allow"]) == (405, PROBLEM, "GET")
        assert (await api.client.get("/nothing")).headers["content-type"] == PROBLEM

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"documents": [1],\n  "x": }', "expecting value at line 2, column 8"),
        (b"{", "expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{"a": 1} b', "extra data at line 1, column 10"),
        (b'"\xff"', "its byte 2 is not UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"documents": [' + b"9" * 5000 + b"]}", "a number in it has too many digits"),
    ],
)
def test_a_body_that_is_no_json_says_where(migrated_postgres_url: str, content: bytes, why: str) -> None:
    async def test(api: Api) -> None:
        for method, path in (("POST", "/apply"), ("PUT", "/groups/shops"), ("PATCH", "/nodes/edge-1")):
            for kind in ("application/json", "application/x-www-form-urlencoded", None):
                headers = {"content-type": kind} if kind else {}
                answer = await api.client.request(method, f"/api/v1{path}", content=content, headers=headers)
                assert (answer.status_code, answer.headers["content-type"]) == (400, PROBLEM)
                problem = answer.json()
                assert problem["detail"] == f"the body is no JSON: {why}"
                assert problem["type"] == "urn:slmfleet:problem:invalid-json"

    run(migrated_postgres_url, test)


def test_json_is_json_whatever_the_client_calls_it(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        manifest = {"apiVersion": "slmfleet/v1", "kind": "Group", "metadata": {"name": "all"}, "spec": {"selector": ""}}
        headers = {"content-type": "application/x-www-form-urlencoded"}
        answer = await api.client.put("/api/v1/groups/all", content=json.dumps(manifest), headers=headers)
        assert answer.status_code == 201

    run(migrated_postgres_url, test)


def test_what_nobody_expected_is_logged_and_not_told(
    migrated_postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        async def explain(self, name: str) -> list[dict[str, Any]]:
            raise ZeroDivisionError("the secret inside")

    async def test(api: Api) -> None:
        with caplog.at_level(logging.ERROR):
            problem = await api.call("GET", "/deployments/kiosks/explain", 500)
        assert "secret inside" not in str(problem)
        incident = problem["detail"].rpartition(" ")[2]
        (record,) = [record for record in caplog.records if record.name == "controlplane.rest.guard"]
        assert incident in str(vars(record)["slmfleet_fields"])
        assert record.exc_info is not None

    run(migrated_postgres_url, test, explainer=Broken())


def test_without_its_database_it_lives_and_says_what_is_wrong(tmp_path: Path) -> None:
    async def main() -> None:
        engine = make_engine(f"postgresql://nobody@/none?host={tmp_path}")
        app = build_rest(
            engine,
            authenticator=Authenticator(engine),
            blobs=BlobStore(tmp_path),
            ca_fingerprint=FINGERPRINT,
            info=ServerInfo(5.0, 15.0),
        )
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://fleet") as client:
            assert (await client.get("/healthz")).status_code == 200
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["reason"]) == (503, "the database cannot be reached")
            answer = await client.get("/api/v1/nodes", headers={"authorization": "Bearer slmfleet_admin_x"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert str(tmp_path) not in answer.text
        await engine.dispose()

    asyncio.run(main())


def test_it_is_ready_only_with_its_own_schema(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        assert (await api.client.get("/readyz")).status_code == 200
        await api.query("UPDATE alembic_version SET version_num = '9999'")
        answer = await api.client.get("/readyz")
        assert answer.status_code == 503
        assert "does not know" in answer.json()["reason"]
        await api.query("DELETE FROM alembic_version")
        assert "controlplane migrate" in (await api.client.get("/readyz")).json()["reason"]
        assert migrate.head()

    run(migrated_postgres_url, test)


def test_info(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        info = await api.call("GET", "/info")
        assert info["timeline"]
        assert info | {"beatSeconds": 5.0, "ttlSeconds": 15.0, "gateway": "http://127.0.0.1:8080/v1"} == info
        assert info["endpoints"] == {"node_api": "127.0.0.1:8444"}

    run(migrated_postgres_url, test)
