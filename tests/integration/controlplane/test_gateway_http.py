"""The gateway under a real HTTP server, with real clients, before real relays and a real Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import uvicorn

from controlplane.db import api_keys
from controlplane.gateway.app import Gateway, GatewayPolicy, build_gateway
from controlplane.rest.auth import Authenticator
from tests.support.fake_node import FakeNode, FakeRelay, Handler, NodeApiRig, NodeExchange, eventually, node_api

SSE = "text/event-stream; charset=utf-8"


class Front:
    """A gateway that listens, and its clients."""

    def __init__(self, rig: NodeApiRig, gateway: Gateway, url: str, key: str) -> None:
        self.rig = rig
        self.gateway = gateway
        self.url = url
        self.key = key
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        self.http = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=20)

    async def ask(self, model: str = "greeter", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
        return await self.http.post("/v1/chat/completions", json=body)

    async def deploy(self, name: str, *nodes: FakeNode, agent: str | None = "greeter", expose: Any = None) -> None:
        """A deployment with a replica that is ready and warm on each node."""
        digest = f"digest-{name}"
        pinned = {
            "agent": {"name": agent, "digest": digest} if agent else None,
            "model": {"name": "smol", "version": "1"},
        }
        await self.rig.execute("INSERT INTO deployments (name, current_revision) VALUES (:name, 1)", name=name)
        await self.rig.execute(
            "INSERT INTO revisions (deployment, number, pinned) VALUES (:name, 1, :pinned)",
            name=name,
            pinned=json.dumps(pinned),
        )
        if agent:
            await self.rig.execute(
                "INSERT INTO agents (name, current_digest) VALUES (:agent, :digest) ON CONFLICT DO NOTHING",
                agent=agent,
                digest=digest,
            )
            await self.rig.execute(
                """INSERT INTO agent_versions (agent, digest, number, spec)
                   VALUES (:agent, :digest, (SELECT count(*) + 1 FROM agent_versions), :spec)""",
                agent=agent,
                digest=digest,
                spec=json.dumps({"expose": expose} if expose is not None else {}),
            )
        for node in nodes:
            await self.rig.execute(
                "INSERT INTO assignments (id, deployment, revision, node_id) VALUES (:id, :name, 1, :node)",
                id=f"{name}-{node.name}",
                name=name,
                node=node.id,
            )
            await self.status(f"{name}-{node.name}")
        await self.refresh()

    async def status(
        self, assignment: str, *, ready: bool = True, warm: bool = True, done: int = 0, total: int = 0
    ) -> None:
        await self.rig.execute(
            """INSERT INTO assignment_statuses (assignment_id, revision, observed_generation, staged, ready, warm,
                 degraded, bytes_done, bytes_total)
               VALUES (:id, 1, 1, :ready, :ready, :warm, false, :done, :total)
               ON CONFLICT (assignment_id) DO UPDATE SET ready = excluded.ready, warm = excluded.warm,
                 bytes_done = excluded.bytes_done, bytes_total = excluded.bytes_total""",
            id=assignment,
            ready=ready,
            warm=warm,
            done=done,
            total=total,
        )

    async def refresh(self) -> None:
        await self.gateway._routes.refresh()


@contextlib.asynccontextmanager
async def front(url: str, folder: Path, policy: GatewayPolicy | None = None) -> AsyncIterator[Front]:
    async with node_api(url, folder) as rig:
        async with rig.engine.begin() as connection:
            made = await api_keys.create(connection, "app", "gateway")
            assert made is not None
        authenticator = Authenticator(rig.engine)
        gateway = build_gateway(rig.engine, rig.hints, rig.api.links, authenticator, policy)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(gateway, log_config=None, lifespan="off"))
        tasks = [asyncio.create_task(gateway.run()), asyncio.create_task(server.serve([listener]))]
        there = Front(rig, gateway, f"http://127.0.0.1:{listener.getsockname()[1]}", made[1])
        try:
            await there.refresh()
            yield there
        finally:
            server.should_exit = True
            await there.http.aclose()
            await there.openai.close()
            await asyncio.wait([tasks[1]])
            tasks[0].cancel()
            await asyncio.wait(tasks)


def scenario(url: str, folder: Path, test: Callable[[Front], Coroutine[Any, Any, None]], **policy: Any) -> None:
    async def run() -> None:
        async with front(url, folder, GatewayPolicy(**policy)) as there:
            await test(there)

    asyncio.run(run())


def event(text: str, **more: Any) -> bytes:
    chunk = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "greeter",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **more,
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def whole(text: str) -> bytes:
    return json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "greeter",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }
    ).encode()


def says(text: str) -> Handler:
    """A node that answers with one text, streaming when asked to."""

    async def handle(exchange: NodeExchange) -> None:
        body = json.loads(await exchange.read())
        if not body.get("stream"):
            await exchange.answer(200, whole(text), content_type="application/json")
            return
        await exchange.head(200, content_type=SSE)
        for word in text.split(" "):
            await exchange.data(event(word))
        await exchange.data(b"data: [DONE]\n\n")
        await exchange.end()

    return handle


def refuses(status: int, message: str, retry_after: str = "3") -> Handler:
    async def handle(exchange: NodeExchange) -> None:
        await exchange.read()
        body = json.dumps({"error": {"message": message, "type": "x", "code": "y", "param": None}}).encode()
        await exchange.answer(status, body, content_type="application/json", retry_after=retry_after)

    return handle


def test_the_openai_client_gets_answers(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        node = await there.rig.enrolled("edge-1")
        async with node.relay(says("hello from the edge")):
            await there.deploy("greeter", node)
            messages: Any = [{"role": "user", "content": "hi"}]
            raw = await there.openai.chat.completions.with_raw_response.create(model="greeter", messages=messages)
            assert raw.parse().choices[0].message.content == "hello from the edge"
            assert raw.headers["x-slmfleet-node"] == "edge-1"
            assert raw.headers["x-slmfleet-replica"] == "greeter-edge-1"
            assert raw.headers["x-slmfleet-reason"] == "the only warm replica with room"
            assert raw.headers["x-request-id"]

            stream = await there.openai.chat.completions.create(model="agent/greeter", messages=messages, stream=True)
            words = [chunk.choices[0].delta.content async for chunk in stream]
            assert words == ["hello", "from", "the", "edge"]

            assert [model.id async for model in there.openai.models.list()] == ["agent/greeter", "greeter"]
            assert (await there.openai.models.retrieve("greeter")).owned_by == "slmfleet"
            text = there.gateway.metrics_text()
            assert 'slmfleet_gateway_requests_total{target="greeter",result="ok"} 1' in text
            assert 'slmfleet_gateway_tokens_total{target="greeter",kind="completion"} 3' in text
            assert 'slmfleet_gateway_seconds_count{target="agent/greeter"} 1' in text

    scenario(migrated_postgres_url, tmp_path, test)


def test_every_path_is_passed_on_by_its_model(migrated_postgres_url: str, tmp_path: Path) -> None:
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "bare", "output": [],
                "status": "completed", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                "usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 4,
                          "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 9}}  # fmt: skip
    answers = {
        "/v1/completions": {"id": "c", "object": "text_completion", "created": 1, "model": "bare",
                            "choices": [{"index": 0, "text": "on", "finish_reason": "stop", "logprobs": None}]},
        "/v1/embeddings": {"object": "list", "model": "bare", "usage": {"prompt_tokens": 1, "total_tokens": 1},
                           "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]},
        "/v1/responses": response,
    }  # fmt: skip

    async def handle(exchange: NodeExchange) -> None:
        body = json.loads(await exchange.read())
        assert exchange.opening.method == "POST"
        if body.get("stream"):
            await exchange.head(200, content_type=SSE)
            first = {"type": "response.created", "sequence_number": 0, "response": {**response, "usage": None}}
            last = {"type": "response.completed", "sequence_number": 1, "response": response}
            for one in (first, last):
                await exchange.data(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode())
            await exchange.end()
            return
        await exchange.answer(200, json.dumps(answers[exchange.opening.path]).encode(), content_type="application/json")

    async def test(there: Front) -> None:
        node = await there.rig.enrolled("edge-1")
        async with node.relay(handle):
            await there.deploy("bare", node, agent=None)
            raw = await there.openai.completions.with_raw_response.create(model="bare", prompt="go")
            assert raw.parse().choices[0].text == "on"
            assert raw.headers["x-slmfleet-node"] == "edge-1"
            vectors = await there.openai.embeddings.create(model="bare", input="x", encoding_format="float")
            assert vectors.data[0].embedding == [0.5, 1.0]
            assert (await there.openai.responses.create(model="bare", input="hi")).status == "completed"
            async with there.openai.responses.stream(model="bare", input="hi") as stream:
                kinds = [one.type async for one in stream]
            assert kinds == ["response.created", "response.completed"]
            await eventually(lambda: 'kind="completion"} 8' in there.gateway.metrics_text())
            assert 'kind="prompt"} 11' in there.gateway.metrics_text()
            with pytest.raises(openai.NotFoundError, match="did you mean bare"):
                await there.openai.embeddings.create(model="bar", input="x")

    scenario(migrated_postgres_url, tmp_path, test)


def test_chunks_pass_as_they_come(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        go_on = asyncio.Event()

        async def handle(exchange: NodeExchange) -> None:
            await exchange.head(200, content_type=SSE)
            await exchange.data(event("one"))
            await go_on.wait()
            await exchange.data(event("two"))
            await exchange.end()

        node = await there.rig.enrolled("edge-1")
        async with node.relay(handle):
            await there.deploy("greeter", node)
            stream = await there.openai.chat.completions.create(
                model="greeter", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            chunks = aiter(stream)
            assert (await asyncio.wait_for(anext(chunks), 5)).choices[0].delta.content == "one"
            go_on.set()
            assert (await asyncio.wait_for(anext(chunks), 5)).choices[0].delta.content == "two"

    scenario(migrated_postgres_url, tmp_path, test)


def test_names_and_who_may_be_called(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        node = await there.rig.enrolled("edge-1")
        async with node.relay(says("yes")):
            await there.deploy("greeter", node)
            await there.deploy("private", node, agent="secretary", expose=["local"])
            await there.deploy("bare", node, agent=None)
            listed = [model["id"] for model in (await there.http.get("/v1/models")).json()["data"]]
            assert listed == ["agent/greeter", "bare", "greeter", "smol"]
            for name in (*listed, "smol@1"):
                assert (await there.ask(name)).status_code == 200
            for name in ("private", "agent/secretary", "smol@2", ""):
                assert (await there.ask(name)).status_code in (400, 404)
            error = (await there.ask("greter")).json()["error"]
            assert error["code"] == "model_not_found"
            assert error["param"] == "model"
            assert "did you mean greeter" in error["message"]
            # Nothing that callers made up becomes a label.
            assert "greter" not in there.gateway.metrics_text()

    scenario(migrated_postgres_url, tmp_path, test)


def test_bad_requests_are_told_so(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        node = await there.rig.enrolled("edge-1")
        async with node.relay(says("yes")) as relay:
            await there.deploy("greeter", node)
            post = there.http.post
            cases = [
                (await post("/v1/chat/completions", content=b"{"), 400, "invalid_json"),
                (await post("/v1/chat/completions", json=[]), 400, "missing_model"),
                (await post("/v1/chat/completions", json={"model": 5}), 400, "missing_model"),
                (await post("/v1/chat/completions", content=b"x" * 2000), 413, "request_too_large"),
                (await post("/v1/chat/completions", json={}, headers={"authorization": ""}), 401, "invalid_api_key"),
                (
                    await post("/v1/chat/completions", json={}, headers={"authorization": "Bearer x"}),
                    401,
                    "invalid_api_key",
                ),
                (await there.http.get("/v1/chat/completions"), 405, "method_not_allowed"),
                (await there.http.get("/v1/files"), 404, "not_found"),
                (await there.http.get("/v1/embeddings"), 405, "method_not_allowed"),
                (
                    await post("/v1/chat/completions", json={"model": "greeter"}, headers={"x-slmfleet-timeout": "x"}),
                    400,
                    "invalid_header",
                ),
            ]
            for response, status, code in cases:
                assert (response.status_code, response.json()["error"]["code"]) == (status, code)
                assert response.headers["x-request-id"]
            assert relay.served == 0

    scenario(migrated_postgres_url, tmp_path, test, max_request_bytes=1000)


def test_the_callers_key_does_not_travel_but_its_idempotency_key_does(
    migrated_postgres_url: str, tmp_path: Path
) -> None:
    async def test(there: Front) -> None:
        seen: list[dict[str, str]] = []

        async def handle(exchange: NodeExchange) -> None:
            seen.append({line.name: line.value for line in exchange.opening.headers})
            await exchange.answer(200, whole("x"), content_type="application/json", server="secret/1.0")

        node = await there.rig.enrolled("edge-1")
        async with node.relay(handle):
            await there.deploy("greeter", node)
            response = await there.http.post(
                "/v1/chat/completions", json={"model": "greeter"}, headers={"idempotency-key": "k1", "cookie": "a=b"}
            )
            assert response.status_code == 200
            assert "secret" not in response.headers.get("server", "")
            assert seen[0]["idempotency-key"] == "k1"
            assert seen[0]["x-request-id"] == response.headers["x-request-id"]
            assert not {"authorization", "cookie", "host"} & seen[0].keys()

    scenario(migrated_postgres_url, tmp_path, test)


def test_nobody_ready_says_why_and_when_to_come_back(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        one, two = await there.rig.enrolled("edge-1"), await there.rig.enrolled("edge-2")
        await there.deploy("greeter", one, two)
        await there.rig.execute("UPDATE nodes SET state = 'lost' WHERE name = 'edge-2'")
        async with one.relay(says("yes")):
            await there.status("greeter-edge-1", ready=False, done=40, total=100)
            await there.refresh()
            response = await there.ask()
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["message"] == "replicas of greeter: 1 downloading 40 %, 1 lost"
            # A status that a node reports reaches the gateway by its timer and hint alone.
            await there.status("greeter-edge-1", ready=True)
            async with asyncio.timeout(5):
                while (response := await there.ask()).status_code == 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert response.status_code == 200

    scenario(migrated_postgres_url, tmp_path, test)


def test_a_busy_replica_is_left_for_another(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        busy, free = await there.rig.enrolled("edge-1"), await there.rig.enrolled("edge-2")
        async with busy.relay(refuses(429, "the queue is full")):
            await there.deploy("greeter", busy, free)
            # Alone, its refusal is passed on as it is.
            response = await there.ask()
            assert response.status_code == 429
            assert response.headers["retry-after"] == "3"
            assert response.json()["error"]["message"] == "the queue is full"
            async with free.relay(says("mine")):
                for _ in range(10):
                    response = await there.ask()
                    assert response.status_code == 200
                    assert response.headers["x-slmfleet-node"] == "edge-2"

    scenario(migrated_postgres_url, tmp_path, test)


def test_a_node_that_dies_before_the_first_byte_is_not_noticed(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        dying, living = await there.rig.enrolled("edge-1"), await there.rig.enrolled("edge-2")
        relays: list[FakeRelay] = []
        began = asyncio.Event()

        async def die(exchange: NodeExchange) -> None:
            # The head alone is no byte of an answer.
            await exchange.head(200, content_type=SSE)
            began.set()
            await asyncio.Event().wait()

        async with dying.relay(die) as relay:
            relays.append(relay)
            await there.deploy("greeter", dying)
            asked = asyncio.create_task(there.ask(stream=True))
            await asyncio.wait_for(began.wait(), 5)
            async with living.relay(says("alive")):
                await there.rig.execute(
                    "INSERT INTO assignments (id, deployment, revision, node_id) VALUES ('second', 'greeter', 1, :id)",
                    id=living.id,
                )
                await relay.kill()
                # The request was made when there was one replica: it fails, clearly and at once.
                response = await asyncio.wait_for(asked, 5)
                assert response.status_code == 503
                assert "lost while it worked" in response.json()["error"]["message"]

        async with dying.relay(die) as relay, living.relay(says("alive")):
            await there.status("second")
            await there.status("greeter-edge-1", warm=True)
            await there.refresh()
            began.clear()
            # One of several goes to the dying node; all of them are answered.
            asked_all = [asyncio.create_task(there.ask(stream=True)) for _ in range(6)]
            await asyncio.wait_for(began.wait(), 5)
            await relay.kill()
            responses = await asyncio.wait_for(asyncio.gather(*asked_all), 10)
            assert [response.status_code for response in responses] == [200] * 6
            assert {response.headers["x-slmfleet-node"] for response in responses} == {"edge-2"}
            assert "slmfleet_gateway_retries_total" in there.gateway.metrics_text()

    scenario(migrated_postgres_url, tmp_path, test)


def test_a_node_that_dies_midway_ends_the_stream_with_an_error(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        dying, living = await there.rig.enrolled("edge-1"), await there.rig.enrolled("edge-2")

        async def half(exchange: NodeExchange) -> None:
            await exchange.head(200, content_type=SSE)
            # An event and a half: the half must not spoil the error event.
            await exchange.data(event("half") + event("an answer")[:20])
            await asyncio.Event().wait()

        async with dying.relay(half) as relay, living.relay(says("other")) as other:
            await there.deploy("greeter", dying)
            stream = await there.openai.chat.completions.create(
                model="greeter", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            chunks = aiter(stream)
            assert (await anext(chunks)).choices[0].delta.content == "half"
            await relay.kill()
            with pytest.raises(openai.APIError, match="broke off"):
                await anext(chunks)
            assert other.served == 0
            await eventually(lambda: 'result="broken"} 1' in there.gateway.metrics_text())

    scenario(migrated_postgres_url, tmp_path, test)


@pytest.mark.parametrize("began", [False, True])
def test_a_caller_that_leaves_stops_the_node(migrated_postgres_url: str, tmp_path: Path, began: bool) -> None:
    async def test(there: Front) -> None:
        async def tick(exchange: NodeExchange) -> None:
            if began:
                await exchange.head(200, content_type=SSE)
            while True:
                if began:
                    await exchange.data(event("tick"))
                await asyncio.sleep(0.01)

        node = await there.rig.enrolled("edge-1")
        async with node.relay(tick) as relay:
            await there.deploy("greeter", node)
            if began:
                body = {"model": "greeter", "stream": True}
                async with there.http.stream("POST", "/v1/chat/completions", json=body) as response:
                    assert (await anext(response.aiter_bytes())).startswith(b"data: ")
            else:
                asked = asyncio.create_task(there.ask(stream=True))
                await relay.has_served(1)
                asked.cancel()
            assert await asyncio.wait_for(relay.resets.get(), 5) == "cancelled"
            await eventually(lambda: 'result="cancelled"} 1' in there.gateway.metrics_text())
            assert "slmfleet_gateway_outstanding 0" in there.gateway.metrics_text()

    scenario(migrated_postgres_url, tmp_path, test)


@pytest.mark.parametrize("link_lost", [False, True])
def test_a_caller_that_leaves_with_the_whole_answer_was_answered(
    migrated_postgres_url: str, tmp_path: Path, link_lost: bool
) -> None:
    """Clients close the connection at ``[DONE]``, before the node has ended the exchange."""

    async def test(there: Front) -> None:
        left = asyncio.Event()

        async def handle(exchange: NodeExchange) -> None:
            await exchange.head(200, content_type=SSE)
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            await exchange.data(event("all of it", usage=usage) + b"data: [DONE]\n\n")
            await left.wait()
            if link_lost:
                await exchange.reset("internal", "lost its end")
            else:
                await exchange.end()

        node = await there.rig.enrolled("edge-1")
        async with node.relay(handle) as relay:
            await there.deploy("greeter", node)
            gone, serve = asyncio.Event(), Gateway.__call__

            async def watched(self: Gateway, scope: Any, receive: Any, send: Any) -> None:
                async def receiving() -> Any:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        gone.set()
                    return message

                await serve(self, scope, receiving, send)

            body = {"model": "greeter", "stream": True}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Gateway, "__call__", watched)
                async with there.http.stream("POST", "/v1/chat/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line == "data: [DONE]":
                            break
                # The gateway sees that the caller has left; then the node ends, too late to be passed on.
                await asyncio.wait_for(gone.wait(), 5)
                left.set()
            await eventually(lambda: 'result="ok"} 1' in there.gateway.metrics_text())
            told = there.gateway.metrics_text()
            assert "cancelled" not in told
            assert 'kind="completion"} 3' in told
            assert "slmfleet_gateway_outstanding 0" in told
            assert relay.resets.empty()

    scenario(migrated_postgres_url, tmp_path, test)


def test_a_deadline_ends_the_wait(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        async def hang(exchange: NodeExchange) -> None:
            assert 0 < exchange.opening.timeout_s <= 0.3
            await asyncio.Event().wait()

        node = await there.rig.enrolled("edge-1")
        async with node.relay(hang) as relay:
            await there.deploy("greeter", node)
            response = await there.http.post(
                "/v1/chat/completions", json={"model": "greeter"}, headers={"x-slmfleet-timeout": "0.3"}
            )
            assert response.status_code == 504
            assert await asyncio.wait_for(relay.resets.get(), 5) == "timeout"

    scenario(migrated_postgres_url, tmp_path, test)


def test_outstanding_work_is_bounded(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        let_go = asyncio.Event()

        async def wait(exchange: NodeExchange) -> None:
            await let_go.wait()
            await exchange.answer(200, whole("x"), content_type="application/json")

        node = await there.rig.enrolled("edge-1")
        async with node.relay(wait) as relay:
            await there.deploy("greeter", node)
            waiting = [asyncio.create_task(there.ask()) for _ in range(2)]
            await relay.has_served(2)
            refused = await there.ask()
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            let_go.set()
            assert [(await task).status_code for task in waiting] == [200, 200]

    scenario(migrated_postgres_url, tmp_path, test, most_per_replica=2)


def test_a_replica_that_keeps_failing_is_left_alone(migrated_postgres_url: str, tmp_path: Path) -> None:
    async def test(there: Front) -> None:
        bad, good = await there.rig.enrolled("edge-1"), await there.rig.enrolled("edge-2")
        async with bad.relay(refuses(500, "broken")) as broken, good.relay(says("fine")):
            await there.deploy("greeter", bad, good)
            for _ in range(30):
                assert (await there.ask()).status_code == 200
            assert broken.served == 3

    scenario(migrated_postgres_url, tmp_path, test)
