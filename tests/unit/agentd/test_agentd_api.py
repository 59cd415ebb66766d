"""The API as an ASGI application over a host without models: shapes, refusals, limits, leaving clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentd.agents.router import Catalog, Target
from agentd.api.app import Api
from agentd.api.chat import merge_delta
from agentd.api.guard import host_filter
from agentd.api.serving import Serving
from agentd.models.types import GenerationFailed, LoadableModel, ModelKey, Refused
from slmfleet.v1 import state_pb2 as pb
from tests.support.fake_host import FakeHost

KEY = ModelKey("m", "1", "q4")
MESSAGES = [{"role": "user", "content": "hi"}]


async def _ready() -> dict[str, bool]:
    return {"ready": True}


class Rig:
    """The application, its host, and requests to it."""

    def __init__(
        self, *, problem: str = "", drained: bool = False, max_requests: int = 10, queue_timeout_s: float = 5.0
    ) -> None:
        limits = pb.AgentLimits(max_concurrent=1, max_queued=1, queue_timeout_s=queue_timeout_s, timeout_s=20)
        greeter = pb.AgentManifest(name="greeter", instructions="Be nice.", expose=[1, 2], limits=limits)
        self.host = FakeHost()
        self.host.set_models([LoadableModel(KEY, "gguf", Path("x"), 1)])
        self.refused: list[ModelKey] = []
        catalog = Catalog((Target("a1", "shop", "m", "1", greeter, KEY, problem),), drained)
        self.api = Api(
            Serving(self.host, lambda: catalog, lambda key, _: self.refused.append(key)),
            lambda: catalog,
            ready=_ready,
            status=self._status,
            metrics=self._metrics,
            max_request_bytes=2000,
            max_requests=max_requests,
            host_allowed=host_filter("127.0.0.1"),
            created_s=1,
        )

    async def _status(self) -> dict[str, Any]:
        return {"name": "n"}

    async def _metrics(self) -> bytes:
        return b"agentd_info 1\n"

    async def call(
        self, method: str, path: str, body: bytes = b"", *, relayed: bool = False, kind: str = "application/json",
        left: asyncio.Event | None = None, sent: list[Any] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
        """(status, headers, body). ``left`` is set when the client goes away."""
        messages: list[Any] = [] if sent is None else sent
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        gone = left or asyncio.Event()

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", kind.encode())]}
        if relayed:
            scope["extensions"] = {"slmfleet.relay": {}}
        await self.api(scope, receive, send)
        if not messages:
            return 0, {}, b""
        headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        return messages[0]["status"], headers, b"".join(message["body"] for message in messages[1:])

    async def chat(self, relayed: bool = False, **fields: Any) -> tuple[int, dict[str, str], Any]:
        body = json.dumps({"model": "agent/greeter", "messages": MESSAGES, **fields}).encode()
        status, headers, answer = await self.call("POST", "/v1/chat/completions", body, relayed=relayed)
        return status, headers, answer if fields.get("stream") and status == 200 else json.loads(answer)


def with_rig(test: Callable[[Rig], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(10):
            await test(Rig(**options))

    asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    """Let other tasks run until ``true()``."""
    while not true():  # noqa: ASYNC110  # yields to tasks of this loop
        await asyncio.sleep(0)


def events(answer: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in answer.split(b"\n\n") if line]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


def test_a_whole_answer() -> None:
    async def test(rig: Rig) -> None:
        status, headers, answer = await rig.chat()
        assert (status, headers["content-type"]) == (200, "application/json")
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello, I am a fake."}
        assert answer["usage"]["total_tokens"] == 18
        assert answer["slmfleet"]["model"] == "m@1/q4"
        assert answer["slmfleet"]["tokens_per_second"] == 70.0
        assert set(answer["slmfleet"]["timings"]) == {"queue_s", "load_s", "prefill_s", "decode_s"}
        assert rig.host.requests[0].body["messages"][0] == {"role": "system", "content": "Be nice."}

    with_rig(test)


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_answer(include_usage: bool) -> None:
    async def test(rig: Rig) -> None:
        options = {"stream_options": {"include_usage": True}} if include_usage else {}
        status, headers, answer = await rig.chat(stream=True, **options)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        found = events(answer)
        assert found[-1] == "[DONE]"
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in found[:-1] if event["choices"])
        assert text == "Hello, I am a fake."
        reasons = [event["choices"][0]["finish_reason"] for event in found[:-1] if event["choices"]]
        assert reasons == [None] * 7 + ["stop"]
        assert len({event["id"] for event in found[:-1]}) == 1
        assert found[-2]["slmfleet"]["model"] == "m@1/q4"
        assert ("usage" in found[-2]) is include_usage

    with_rig(test)


def test_tool_calls_are_joined() -> None:
    async def test(rig: Rig) -> None:
        rig.host.deltas = [
            {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"a"'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
        ]
        _, _, answer = await rig.chat()
        message = answer["choices"][0]["message"]
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"a":1}'}

    with_rig(test)


def test_deltas_merge() -> None:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for delta in (
        {"role": "assistant", "content": "a"},
        {"content": None},
        {"reasoning_content": "r"},
        {"content": "b"},
    ):
        merge_delta(message, delta)
    assert message == {"role": "assistant", "content": "ab", "reasoning_content": "r"}


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Refused(429, "queue_full", "full", 2.5), 429, "3"),
        (Refused(503, "backing_off", "later", 10), 503, "10"),
        (Refused(400, "context_length_exceeded", "too long"), 400, None),
        (GenerationFailed("worker_died", "it died"), 503, "1"),
        (GenerationFailed("timeout", "too slow"), 504, "1"),
    ],
)
def test_refusals_of_the_host_have_openai_shape(error: Exception, status: int, retry: str | None) -> None:
    async def test(rig: Rig) -> None:
        rig.host.errors = [error, error]
        for stream in (False, True):
            found, headers, answer = await rig.chat(stream=stream)
            assert (found, headers.get("retry-after")) == (status, retry)
            assert set(answer["error"]) == {"message", "type", "code", "param"}
            assert answer["error"]["code"] == error.code  # type: ignore[attr-defined]

    with_rig(test)


def test_a_failure_in_the_middle_travels_in_the_stream_without_done() -> None:
    async def test(rig: Rig) -> None:
        rig.host.fail_after = GenerationFailed("worker_died", "the worker died")
        status, _, answer = await rig.chat(stream=True)
        found = events(answer)
        assert status == 200
        assert found[-1]["error"]["code"] == "worker_died"
        assert "[DONE]" not in found
        whole, _, body = await rig.chat()
        assert (whole, body["error"]["code"]) == (503, "worker_died")

    with_rig(test)


def test_a_client_that_leaves_ends_the_generation() -> None:
    async def test(rig: Rig) -> None:
        rig.host.may_go_on.clear()
        left = asyncio.Event()
        body = json.dumps({"model": "agent/greeter", "messages": MESSAGES, "stream": True}).encode()
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(rig.call("POST", "/v1/chat/completions", body, left=left))
            await rig.host.begun.wait()
            assert rig.api.in_flight == 1
            left.set()
            await request
        assert (rig.host.cancelled, rig.host.running, rig.api.in_flight) == (1, 0, 0)

    with_rig(test)


def test_an_agent_runs_what_its_limits_allow_queues_the_next_and_refuses_the_rest() -> None:
    async def test(rig: Rig) -> None:
        rig.host.may_go_on.clear()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(rig.chat())
            await rig.host.begun.wait()
            second = tasks.create_task(rig.chat())
            await until(lambda: rig.api.in_flight == 2)
            status, headers, answer = await rig.chat()
            assert (status, answer["error"]["code"]) == (429, "agent_queue_full")
            assert int(headers["retry-after"]) >= 1
            assert rig.refused == [KEY]
            assert len(rig.host.requests) == 1
            rig.host.may_go_on.set()
        assert (first.result()[0], second.result()[0]) == (200, 200)

    with_rig(test)


def test_waiting_for_a_place_has_an_end() -> None:
    async def test(rig: Rig) -> None:
        rig.host.may_go_on.clear()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(rig.chat())
            await rig.host.begun.wait()
            status, _, answer = await rig.chat()
            assert (status, answer["error"]["code"]) == (429, "agent_queue_timeout")
            rig.host.may_go_on.set()
        assert first.result()[0] == 200
        assert (await rig.chat())[0] == 200

    with_rig(test, queue_timeout_s=0.01)


@pytest.mark.parametrize(
    ("options", "fields", "status", "code"),
    [
        ({}, {"model": "nobody"}, 404, "model_not_found"),
        ({"problem": "its files wait"}, {}, 503, "model_not_ready"),
        ({"drained": True}, {}, 503, "node_drained"),
        ({"max_requests": 0}, {}, 503, "overloaded"),
        ({}, {"messages": [{"role": "user", "content": "x" * 3000}]}, 413, "request_too_large"),
        ({}, {"temperature": 9}, 400, "invalid_value"),
    ],
)
def test_requests_that_can_not_be_served(
    options: dict[str, Any], fields: dict[str, Any], status: int, code: str
) -> None:
    async def test(rig: Rig) -> None:
        found, _, answer = await rig.chat(**fields)
        assert (found, answer["error"]["code"]) == (status, code)
        assert rig.host.requests == []

    with_rig(test, **options)


def test_a_stopping_daemon_takes_nothing_new() -> None:
    async def test(rig: Rig) -> None:
        rig.api.stopping = True
        assert (await rig.chat())[0] == 503
        assert (await rig.call("GET", "/readyz"))[0] == 503
        assert (await rig.call("GET", "/healthz"))[0] == 200

    with_rig(test)


def test_routes() -> None:
    async def test(rig: Rig) -> None:
        listed = json.loads((await rig.call("GET", "/v1/models"))[2])
        assert [model["id"] for model in listed["data"]] == ["agent/greeter", "m", "shop"]
        assert json.loads((await rig.call("GET", "/v1/models/agent/greeter"))[2])["id"] == "agent/greeter"
        assert (await rig.call("GET", "/v1/models/none"))[0] == 404
        assert (await rig.call("GET", "/nothing"))[0] == 404
        assert (await rig.call("GET", "/v1/chat/completions"))[0] == 405
        assert (await rig.call("GET", "/metrics"))[2] == b"agentd_info 1\n"
        assert json.loads((await rig.call("GET", "/status"))[2]) == {"name": "n"}
        body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        assert (await rig.call("POST", "/v1/chat/completions", body, kind="text/plain"))[0] == 415

    with_rig(test)


def test_the_relay_reaches_only_what_is_exposed() -> None:
    async def test(rig: Rig) -> None:
        assert (await rig.chat(relayed=True))[0] == 200
        assert (await rig.chat(relayed=True, model="m"))[0] == 404
        for path in ("/metrics", "/status", "/healthz", "/readyz", "/api/models/status"):
            assert (await rig.call("GET", path, relayed=True))[0] == 404
        for path in ("/api/models/load", "/api/models/unload"):
            assert (await rig.call("POST", path, b'{"model": "shop"}', relayed=True))[0] == 404
        # How long a model takes this device's memory is not for callers far away.
        status, _, answer = await rig.chat(relayed=True, keep_alive=-1)
        assert (status, answer["error"]["param"]) == (400, "keep_alive")
        listed = json.loads((await rig.call("GET", "/v1/models", relayed=True))[2])
        assert [model["id"] for model in listed["data"]] == ["agent/greeter", "shop"]

    with_rig(test)
