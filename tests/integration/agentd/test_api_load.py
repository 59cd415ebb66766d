"""The local API under more than it can serve, and with clients that leave: real workers with a stub backend."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from agentd.models.settings import HostSettings
from agentd.models.types import LoadableModel
from slmfleet.v1 import state_pb2 as pb
from tests.support.api_rig import ApiRig, agent, with_api
from tests.support.models import loadable
from tests.support.processes import eventually
from tests.support.stub_backend import host_options, write_stub

HI: Any = [{"role": "user", "content": "hello"}]


def stub(folder: Path, name: str = "stub", **options: Any) -> LoadableModel:
    return loadable(write_stub(folder / f"{name}.json", **options), "stub", name)


def settings(**more: Any) -> HostSettings:
    return HostSettings(**{**host_options(), **more})


def words(count: int, **options: Any) -> Any:
    """A chat that the stub answers with so many words, at its own pace."""
    content = json.dumps(options) if options else "hello"
    return {"model": "stub", "messages": [{"role": "user", "content": content}], "max_tokens": count}


async def metrics(rig: ApiRig) -> str:
    return (await rig.http.get("/metrics")).text


def test_embeddings_as_numbers_and_as_base64(tmp_path: Path) -> None:
    async def test(rig: ApiRig) -> None:
        # The client asks for base64 unless it is told otherwise.
        packed = await rig.openai.embeddings.create(model="stub", input=["four", "sixsix"])
        plain = await rig.openai.embeddings.create(model="stub", input=["four", "sixsix"], encoding_format="float")
        assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data] == [[4, 1], [6, 1]]
        assert packed.usage.prompt_tokens == 2
        assert (await rig.openai.embeddings.create(model="stub", input="x", dimensions=2)).data[0].embedding == [1, 1]
        with pytest.raises(openai.BadRequestError, match="can only be 2") as caught:
            await rig.openai.embeddings.create(model="stub", input="x", dimensions=1)
        assert caught.value.param == "dimensions"
        for wrong in ([], "", [1, 2], ["a", ""], ["a"] * 2049):
            with pytest.raises(openai.BadRequestError) as refused:
                await rig.openai.embeddings.create(model="stub", input=wrong)  # type: ignore[arg-type]
            assert refused.value.param == "input"

    with_api([stub(tmp_path)], test, settings=settings())


def test_a_full_queue_says_when_to_come_back_from_what_it_measured(tmp_path: Path) -> None:
    async def test(rig: ApiRig) -> None:
        one = words(20, tokens_per_s=10)
        await rig.openai.chat.completions.create(**one)  # takes 2 s: from here on the host knows how long
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(rig.openai.chat.completions.create(**one)) for _ in range(3)]
            await eventually(lambda: rig.api.in_flight == 3, "three requests are there")
            await eventually(lambda: rig.host.status()[0].queued == 2, "two of them wait")
            assert re.search(r"agentd_queue_length\{.*\} 2\n", await metrics(rig))
            with pytest.raises(openai.RateLimitError) as caught:
                await rig.openai.chat.completions.create(**one)
            assert caught.value.code == "queue_full"
            # Two wait and this one would be the third, each for about two seconds.
            assert 4 <= int(caught.value.response.headers["retry-after"]) <= 9
        assert all(task.result().choices[0].finish_reason == "length" for task in asked)
        page = await metrics(rig)
        assert re.search(r'agentd_refusals_total\{.*reason="queue_full"\} 1\n', page)
        assert re.search(r"agentd_queue_seconds_count\{.*\} 4\n", page)

    with_api([stub(tmp_path, slots=1)], test, settings=settings(max_queued=2))


def test_an_agents_own_limit_is_told_with_retry_after(tmp_path: Path) -> None:
    model = stub(tmp_path, tokens_per_s=20)
    limits = pb.AgentLimits(max_concurrent=1, max_queued=0, timeout_s=30)

    async def test(rig: ApiRig) -> None:
        one = {**words(20), "model": "agent/greeter"}
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(rig.openai.chat.completions.create(**one))
            await eventually(lambda: rig.host.status()[0].in_flight == 1, "one runs")
            with pytest.raises(openai.RateLimitError) as caught:
                await rig.openai.chat.completions.create(**one)
            assert caught.value.code == "agent_queue_full"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        assert first.result().choices

    with_api([model], test, settings=settings(), targets=[agent(model, "greeter", limits=limits)])


def test_a_model_that_loads_for_long_says_so(tmp_path: Path) -> None:
    model = stub(tmp_path, load_s=30)

    async def test(rig: ApiRig) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            await rig.openai.chat.completions.create(**{**words(2), "model": "agent/impatient"})
        assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
        assert "has been loading for" in caught.value.message
        assert int(caught.value.response.headers["retry-after"]) >= 1

    targets = [agent(model, "impatient", limits=pb.AgentLimits(queue_timeout_s=1.5))]
    with_api([model], test, settings=settings(stop_grace_s=0.2), targets=targets)


def test_an_answer_that_takes_too_long_is_504_and_in_a_stream_an_event(tmp_path: Path) -> None:
    model = stub(tmp_path, tokens_per_s=10)

    async def test(rig: ApiRig) -> None:
        one = {**words(1000), "model": "agent/slow"}
        with pytest.raises(openai.InternalServerError) as caught:
            await rig.openai.chat.completions.create(**one)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        stream = await rig.openai.chat.completions.create(**one, stream=True)
        with pytest.raises(openai.APIError, match="not complete after"):
            async for _ in stream:
                pass
        async with rig.openai.responses.stream(model="agent/slow", input="hello") as events:
            kinds = [event.type async for event in events]
        assert kinds[-1] == "response.failed"

    with_api([model], test, settings=settings(), targets=[agent(model, "slow", limits=pb.AgentLimits(timeout_s=1.0))])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_client_that_leaves_ends_the_work_within_a_token(tmp_path: Path, path: str) -> None:
    """At 20 tokens a second a token takes 50 ms: that is what the slot may stay taken."""

    async def test(rig: ApiRig) -> None:
        body: dict[str, Any] = {"model": "stub", "stream": True}
        body |= {
            "/v1/chat/completions": {"messages": HI, "max_tokens": 1000},
            "/v1/completions": {"prompt": "hello", "max_tokens": 1000},
            "/v1/responses": {"input": "hello", "max_output_tokens": 1000},
        }[path]
        async with rig.http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_bytes())
            assert rig.host.status()[0].in_flight == 1
        loop = asyncio.get_running_loop()
        left = loop.time()
        await eventually(lambda: rig.host.status()[0].in_flight == 0, "its slot is free", 5)
        took = loop.time() - left
        # A token, and what a busy machine adds.
        assert took < 1.0, took
        assert rig.api.in_flight == 0
        assert rig.host.totals()[rig.host.status()[0].key].requests_cancelled == 1

    with_api([stub(tmp_path, tokens_per_s=20)], test, settings=settings())


def test_a_model_that_fails_while_it_answers(tmp_path: Path) -> None:
    async def test(rig: ApiRig) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            await rig.openai.chat.completions.create(**words(9, fail="error"))
        assert (caught.value.status_code, caught.value.code) == (503, "generation_failed")
        stream = await rig.openai.chat.completions.create(**words(9, fail="dead"), stream=True)
        with pytest.raises(openai.APIError, match="the model failed while it answered"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError) as after:
            await rig.openai.chat.completions.create(**words(2))
        assert after.value.code == "model_backing_off"
        assert int(after.value.response.headers["retry-after"]) >= 1

    with_api([stub(tmp_path)], test, settings=settings())


def test_answers_of_many_at_once_are_not_mixed_up(tmp_path: Path) -> None:
    async def test(rig: ApiRig) -> None:
        async def ask(count: int) -> str:
            stream = await rig.openai.chat.completions.create(**words(count), stream=True)
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

        answers = await asyncio.gather(*(ask(count) for count in range(1, 25)))
        assert answers == ["".join(f"w{n} " for n in range(count)) for count in range(1, 25)]

    with_api([stub(tmp_path, slots=4)], test, settings=settings())
