"""Apply, read, replace and delete of groups, models, agents and deployments, over HTTP on a real database."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import sqlalchemy as sa

from controlplane.db import tables
from controlplane.db.engine import Hints
from tests.support.rest import Api, run

pytestmark = pytest.mark.postgres
SHA = "cd" * 32


def document(kind: str, name: str, spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "slmfleet/v1", "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}


def model(version: str = "1", name: str = "smol", source: str = "file:model.gguf", **metadata: Any) -> dict[str, Any]:
    files = [{"source": source, "sha256": SHA}]
    spec = {"version": version, "variants": [{"name": "q4", "format": "gguf", "files": files}]}
    return document("Model", name, spec, **metadata)


def agent(
    instructions: str = "You greet.", name: str = "greeter", ref: str = "smol", **metadata: Any
) -> dict[str, Any]:
    return document("Agent", name, {"instructions": instructions, "model": {"ref": ref}}, **metadata)


def deployment(name: str = "kiosks", **spec: Any) -> dict[str, Any]:
    return document("Deployment", name, spec or {"agent": "greeter", "replicas": 2})


def group(selector: str = "site=lyon", name: str = "shops", **metadata: Any) -> dict[str, Any]:
    return document("Group", name, {"selector": selector}, **metadata)


FLEET = [model(), agent(), group(), deployment()]


def test_an_apply_makes_everything_and_an_equal_one_nothing(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        results = await api.apply(*FLEET)
        assert [(item["kind"], item["name"], item["action"]) for item in results] == [
            ("Model", "smol", "created"),
            ("Agent", "greeter", "created"),
            ("Group", "shops", "created"),
            ("Deployment", "kiosks", "created"),
        ]
        before = await api.call("GET", "/deployments/kiosks")
        assert [item["action"] for item in await api.apply(*FLEET)] == ["unchanged"] * 4
        assert await api.call("GET", "/deployments/kiosks") == before
        assert before["spec"] | {"agent": "greeter", "replicas": 2, "onDisconnect": "replace"} == before["spec"]
        assert before["status"] | {"revision": 1, "ready": 0} == before["status"]
        assert before["metadata"]["resourceVersion"] == "1"
        trail = await api.call("GET", "/audit")
        assert [(item["actor"], item["action"], item["object"]) for item in trail["items"]][::-1] == [
            ("tests", "apply", "model/smol"),
            ("tests", "apply", "agent/greeter"),
            ("tests", "apply", "group/shops"),
            ("tests", "apply", "deployment/kiosks"),
        ]

    run(migrated_postgres_url, test)


def test_what_is_read_can_be_applied_again(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(*FLEET)
        for path in ("models/smol", "agents/greeter", "groups/shops", "deployments/kiosks"):
            shown = await api.call("GET", f"/{path}")
            assert (await api.apply(shown))[0]["action"] == "unchanged"
            await api.call("PUT", f"/{path}", 200, shown)
            assert await api.call("GET", f"/{path}") == shown

    run(migrated_postgres_url, test)


def test_a_dry_run_says_the_same_and_writes_nothing(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        planned = await api.apply(*FLEET, dry_run=True)
        assert (await api.call("GET", "/models"))["items"] == []
        assert await api.apply(*FLEET) == planned

    run(migrated_postgres_url, test)


def test_one_bad_document_stops_the_whole_apply(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        bad = agent()
        bad["spec"]["instruction"] = "x"
        problem = await api.apply(model(), bad, status=422)
        assert problem["type"] == "urn:slmfleet:problem:invalid-manifest"
        assert problem["errors"] == [
            {
                "pointer": "/documents/1/spec/instruction",
                "message": 'unknown field "instruction": did you mean instructions?',
            }
        ]
        problem = await api.apply(model(), deployment(), status=422)
        assert problem["errors"][0]["pointer"] == "/documents/1/spec/agent"
        assert (await api.call("GET", "/models"))["items"] == []
        for body in ({}, {"documents": []}, {"documents": [1]}, {"documents": [{}], "x": 1}, [], None):
            await api.call("POST", "/apply", 422, body)

    run(migrated_postgres_url, test)


def test_a_selector_that_matches_nothing_is_refused_unless_that_is_allowed(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.query(sa.insert(tables.nodes).values(id="n1", name="edge-1", labels={"site": "lyon"}))
        lost = [*FLEET[:2], group("site=lyonn"), deployment(agent="greeter", group="shops")]
        sentence = 'selector "site=lyonn" matches no node now (labels seen: site=lyon)'
        for dry_run in (True, False):
            problem = await api.apply(*lost, status=422, dry_run=dry_run, allow_unmatched=False)
            assert problem["type"] == "urn:slmfleet:problem:unmatched-selector"
            assert [item["pointer"] for item in problem["errors"]] == [
                "/documents/2/spec/selector",
                "/documents/3/spec/group",
            ]
            assert problem["errors"][0]["message"] == (
                f"{sentence}: correct it, or repeat with allowUnmatched=true (fleetctl apply --allow-unmatched) if its "
                "nodes are yet to enrol"
            )
        assert [await api.call("GET", f"/{path}") for path in ("models", "groups", "deployments")] == [
            {"items": [], "nextCursor": None}
        ] * 3
        await api.call("PUT", "/groups/shops", 422, group("site=lyonn"))
        results = await api.apply(*lost, allow_unmatched=True)
        assert [item["warnings"] for item in results] == [[], [], [sentence], [sentence]]
        # Nothing changes, so nothing is refused; what changes is, and what is as wanted now is not.
        assert [item["action"] for item in await api.apply(*lost, allow_unmatched=False)] == ["unchanged"] * 4
        await api.apply(deployment(agent="greeter", group="shops", replicas=2), status=422, allow_unmatched=False)
        await api.apply(group("site=lyon"), allow_unmatched=False)
        await api.apply(deployment(agent="greeter", group="shops", replicas=2), allow_unmatched=False)
        answer = await api.client.put("/api/v1/groups/shops?allowUnmatched=true", json=group("site=lyonn"))
        assert answer.status_code == 200
        assert answer.headers["warning"].startswith('299 - "selector \\"site=lyonn\\" matches no node now')

    run(migrated_postgres_url, test)


def test_every_node_there_will_be_may_be_none_today(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        results = await api.apply(*FLEET[:2], deployment(), allow_unmatched=False)
        assert results[2]["warnings"] == ["the empty selector matches no node now (no node has enrolled yet)"]

    run(migrated_postgres_url, test)


def test_model_versions_are_immutable_and_listed(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(model())
        problem = await api.apply(model(source="file:other.gguf"), status=409)
        assert problem["type"] == "urn:slmfleet:problem:version-immutable"
        assert "raise spec.version" in problem["detail"]
        problem = await api.call("PUT", "/models/smol", 409, model(source="file:other.gguf"))
        assert problem["errors"][0]["pointer"] == ""
        await api.apply(model("2"))
        versions = (await api.call("GET", "/models/smol/versions"))["items"]
        assert [(item["version"], item["phase"]) for item in versions] == [("2", "pending"), ("1", "pending")]
        assert (await api.call("GET", "/models/smol"))["status"]["version"] == "2"
        await api.query("UPDATE model_versions SET phase = 'failed', message = 'no such file' WHERE version = '2'")
        (result,) = await api.apply(model("2", source="file:right.gguf"))
        assert result["action"] == "changed"
        (fixed, _) = (await api.call("GET", "/models/smol/versions"))["items"]
        assert (fixed["phase"], fixed["message"]) == ("pending", "")
        assert fixed["spec"]["variants"][0]["files"][0]["source"] == "file:right.gguf"

    run(migrated_postgres_url, test)


def test_revisions_follow_what_they_pin(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(*FLEET, agent(name="fixed", ref="smol@1"), deployment("fixed", agent="fixed"))
        (result,) = await api.apply(model("2"))
        assert result["action"] == "changed"
        newest, first = (await api.call("GET", "/deployments/kiosks/revisions"))["items"]
        assert (newest["revision"], newest["model"]["version"]) == (2, "2")
        assert (first["revision"], first["model"]["version"]) == (1, "1")
        assert newest["agent"] == first["agent"]
        assert newest["spec"]["replicas"] == 2
        assert len((await api.call("GET", "/deployments/fixed/revisions"))["items"]) == 1
        await api.call("PUT", "/agents/greeter", 200, agent("Hello."))
        await api.call("PUT", "/deployments/kiosks", 200, deployment(agent="greeter", replicas=3))
        assert (await api.call("GET", "/deployments/kiosks"))["status"]["revision"] == 4
        await api.call("PUT", "/deployments/kiosks", 200, deployment(agent="greeter", replicas=3))
        assert (await api.call("GET", "/deployments/kiosks"))["status"]["revision"] == 4
        events = (await api.call("GET", "/deployments/kiosks/events"))["items"]
        assert [item["reason"] for item in events] == ["RevisionCreated"] * 4
        assert events[-1]["message"].startswith("revision 1: agent greeter (")
        back = await api.call("PUT", "/agents/greeter", 200, agent())
        assert back["status"]["number"] == 1
        versions = (await api.call("GET", "/agents/greeter/versions"))["items"]
        assert [item["number"] for item in versions] == [2, 1]
        assert versions[1]["digest"] == back["status"]["digest"]

    run(migrated_postgres_url, test)


@pytest.mark.parametrize(("path", "made"), [("models", model()), ("groups", group(""))])
def test_put_makes_and_replaces_one_object(migrated_postgres_url: str, path: str, made: dict[str, Any]) -> None:
    async def test(api: Api) -> None:
        name = made["metadata"]["name"]
        await api.call("PUT", f"/{path}/{name}", 201, made)
        labelled = copy.deepcopy(made)
        labelled["metadata"] |= {"labels": {"team": "a"}, "annotations": {"note": "é, \u20ac"}}
        shown = await api.call("PUT", f"/{path}/{name}", 200, labelled)
        assert shown["metadata"]["labels"] == {"team": "a"}
        assert shown["metadata"]["annotations"] == {"note": "é, \u20ac"}
        assert shown["metadata"]["resourceVersion"] == "2"
        problem = await api.call("PUT", f"/{path}/other", 422, made)
        assert problem["errors"] == [{"pointer": "/metadata/name", "message": f"is {name}, but the path says other"}]
        problem = await api.call("PUT", f"/{path}/greeter", 422, agent())
        assert problem["errors"][0]["pointer"] == "/kind"
        await api.call("PUT", f"/{path}/Bad_Name", 422, made)
        assert (await api.call("PUT", f"/{path}/{name}", 422, {}))["errors"][0]["pointer"] == ""

    run(migrated_postgres_url, test)


def test_etag_and_if_match(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        path = "/groups/shops"
        await api.call("PUT", path, 412, group(), headers={"if-match": "*"}, allowUnmatched=True)
        await api.call("PUT", path, 201, group(), allowUnmatched=True)
        etag = (await api.client.get(f"/api/v1{path}")).headers["etag"]
        assert etag == '"1"'
        await api.call("PUT", path, 200, group("site=turin"), headers={"if-match": etag}, allowUnmatched=True)
        problem = await api.call("PUT", path, 412, group("site=paris"), headers={"if-match": etag}, allowUnmatched=True)
        assert 'its ETag is "2" now' in problem["detail"]
        await api.call("DELETE", path, 412, headers={"if-match": etag})
        assert (await api.call("GET", path))["spec"]["selector"] == "site=turin"
        await api.call("PUT", path, 200, group("site=paris"), headers={"if-match": '"1", "2"'}, allowUnmatched=True)
        await api.call("DELETE", path, 204, headers={"if-match": '"3"'})
        await api.call("GET", path, 404)

    run(migrated_postgres_url, test)


def test_what_is_in_use_is_not_deleted(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(*FLEET[:3], deployment(agent="greeter", group="shops"), deployment("bare", model="smol@1"))
        problem = await api.call("DELETE", "/models/smol", 409)
        assert problem["type"] == "urn:slmfleet:problem:in-use"
        assert "in use by agent greeter, deployment bare:" in problem["detail"]
        assert "in use by deployment kiosks:" in (await api.call("DELETE", "/agents/greeter", 409))["detail"]
        assert "in use by deployment kiosks:" in (await api.call("DELETE", "/groups/shops", 409))["detail"]
        await api.query("INSERT INTO nodes (id, name) VALUES ('n1', 'edge-1')")
        for name in ("kiosks", "bare"):
            await api.query(
                "INSERT INTO assignments (id, deployment, revision, node_id) VALUES (:id, :name, 1, 'n1')",
                id=f"id-{name}",
                name=name,
            )
        await api.call("DELETE", "/deployments/kiosks", 204)
        assert [row["deployment"] for row in await api.query("SELECT * FROM assignments")] == ["bare"]
        assert [row["deployment"] for row in await api.query("SELECT * FROM revisions")] == ["bare"]
        await api.call("DELETE", "/deployments/kiosks", 404)
        for path in ("agents/greeter", "groups/shops", "deployments/bare", "models/smol"):
            await api.call("DELETE", f"/{path}", 204)
        assert await api.query("SELECT * FROM model_versions") == []
        (newest, *_) = (await api.call("GET", "/audit"))["items"]
        assert (newest["action"], newest["object"]) == ("delete", "model/smol")

    run(migrated_postgres_url, test)


def test_lists_are_paged_in_order_and_filtered(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        names = [f"g{number:02}" for number in range(7)]
        await api.apply(*(group(name=name, labels={"odd": str(int(name[1:]) % 2)}) for name in reversed(names)))
        found, cursor = [], None
        for _ in range(4):
            page = await api.call("GET", "/groups", limit=2, **({"cursor": cursor} if cursor else {}))
            found += [item["metadata"]["name"] for item in page["items"]]
            cursor = page["nextCursor"]
        assert found == names
        assert cursor is None
        odd = await api.call("GET", "/groups", selector="odd in (1)", limit=500)
        assert [item["metadata"]["name"] for item in odd["items"]] == ["g01", "g03", "g05"]
        problem = await api.call("GET", "/groups", 400, selector="odd in 1")
        assert 'expected "(" at character 8' in problem["detail"]
        for bad in ("x", "AAAA", "W10", "WzFd", "WyJcdTAwMDAiXQ", "é"):
            await api.call("GET", "/groups", 400, cursor=bad)
        for limit in (0, 501, "many"):
            problem = await api.call("GET", "/groups", 422, limit=limit)
            assert "query parameter limit" in problem["detail"]

    run(migrated_postgres_url, test)


@pytest.mark.parametrize("path", ["models", "agents", "groups", "deployments"])
def test_what_is_not_there_is_404(migrated_postgres_url: str, path: str) -> None:
    async def test(api: Api) -> None:
        for method in ("GET", "DELETE"):
            problem = await api.call(method, f"/{path}/none", 404)
            assert problem["detail"] == f"there is no {path[:-1]} none"
        for more in {"models": ["versions"], "agents": ["versions"], "groups": []}.get(
            path, ["revisions", "replicas", "events", "explain"]
        ):
            await api.call("GET", f"/{path}/none/{more}", 404)

    run(migrated_postgres_url, test)


def test_replicas_and_why(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(*FLEET[:3], deployment(agent="greeter", selector="tier=demo"))
        await api.query(
            """INSERT INTO nodes (id, name, labels) VALUES ('n1', 'edge-1', '{"tier": "demo"}'),
               ('n2', 'edge-2', '{"tier": "demo"}'), ('n3', 'edge-3', '{}')"""
        )
        await api.query(
            """INSERT INTO assignments (id, deployment, revision, node_id, reason) VALUES
               ('a1', 'kiosks', 1, 'n2', 'most free memory'), ('a2', 'kiosks', 1, 'n1', 'the other one')"""
        )
        await api.query(
            """INSERT INTO assignment_statuses
               (assignment_id, revision, observed_generation, staged, ready, warm, degraded, bytes_done, bytes_total)
               VALUES ('a1', 1, 3, true, true, false, false, 7, 9)"""
        )
        page = await api.call("GET", "/deployments/kiosks/replicas", limit=1)
        (waiting,) = page["items"]
        assert waiting | {"id": "a2", "node": "edge-1", "ready": False, "conditions": [], "bytesTotal": 0} == waiting
        page = await api.call("GET", "/deployments/kiosks/replicas", limit=1, cursor=page["nextCursor"])
        (ready,) = page["items"]
        assert ready | {"id": "a1", "node": "edge-2", "ready": True, "warm": False, "bytesDone": 7} == ready
        assert page["nextCursor"] is None
        why = {item["node"]: item for item in (await api.call("GET", "/deployments/kiosks/explain"))["items"]}
        assert [item["chosen"] for item in why.values()] == [True, True, False]
        assert list(why) == ["edge-1", "edge-2", "edge-3"]
        assert "most free memory" in why["edge-2"]["reason"]
        assert why["edge-3"]["reason"]
        status = {"revision": 1, "desired": 2, "ready": 1, "message": "1 of 2 replicas are ready"}
        table = tables.deployments
        await api.query(sa.update(table).values(status=status, current_revision=2))
        shown = (await api.call("GET", "/deployments/kiosks"))["status"]
        assert shown | status | {"revision": 2, "observedRevision": 1} == shown

    run(migrated_postgres_url, test)


def test_a_live_explainer_is_asked(migrated_postgres_url: str) -> None:
    class Live:
        async def explain(self, name: str) -> list[dict[str, Any]]:
            return [{"node": "edge-1", "chosen": True, "reason": {"kiosks": "because"}[name]}]

    async def test(api: Api) -> None:
        assert (await api.call("GET", "/deployments/kiosks/explain"))["items"][0]["reason"] == "because"
        await api.call("GET", "/deployments/other/explain", 404)

    run(migrated_postgres_url, test, explainer=Live())


def test_writes_wake_the_controllers_and_what_changes_nothing_does_not(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()
        hints = Hints(api.engine)
        hints.subscribe(heard.put_nowait)
        listening = asyncio.create_task(hints.run(), name="hints")
        assert await heard.get() == ""
        await api.apply(*FLEET)
        assert await asyncio.wait_for(heard.get(), 10) == "spec"
        await api.apply(*FLEET)
        await api.call("DELETE", "/deployments/kiosks", 204)
        assert await asyncio.wait_for(heard.get(), 10) == "spec"
        await api.apply(deployment(), dry_run=True)
        await api.call("PUT", "/groups/last", 201, group(name="last"), allowUnmatched=True)
        assert await asyncio.wait_for(heard.get(), 10) == "spec"
        assert heard.empty()
        listening.cancel()

    run(migrated_postgres_url, test)


def test_applies_at_once_do_not_mix(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        await api.apply(*FLEET)
        await asyncio.gather(*(api.apply(agent(f"Number {number}.")) for number in range(8)))
        revisions = (await api.call("GET", "/deployments/kiosks/revisions"))["items"]
        assert [item["revision"] for item in revisions] == list(range(9, 0, -1))
        current = await api.call("GET", "/agents/greeter")
        assert revisions[0]["agent"]["digest"] == current["status"]["digest"]
        assert current["status"]["number"] == 9

    run(migrated_postgres_url, test)


def test_schemas_are_served(migrated_postgres_url: str) -> None:
    async def test(api: Api) -> None:
        schema = await api.call("GET", "/schemas/Deployment")
        assert schema["properties"]["spec"]["$ref"] == "#/$defs/DeploymentSpec"
        await api.call("GET", "/schemas/Pod", 404)

    run(migrated_postgres_url, test)
