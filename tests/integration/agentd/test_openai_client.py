"""The local API with the real ``openai`` client, real workers and a real (tiny) model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from agentd.models.types import LoadableModel, ModelState
from tests.support.api_rig import ApiRig, agent, with_api
from tests.support.hosts import reached
from tests.support.models import loadable, make_tiny_gguf, smollm2_gguf

pytestmark = pytest.mark.model
HI: Any = [{"role": "user", "content": "hi"}]
SHAPE = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf"), "gguf")


@pytest.fixture
def smol(tmp_path: Path) -> LoadableModel:
    return loadable(smollm2_gguf(tmp_path), "gguf", "smol", context_tokens=1024)


def test_chat_whole_and_streamed_say_the_same(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        options: Any = {"model": "tiny", "messages": HI, "max_completion_tokens": 12, "temperature": 0, "seed": 1}
        whole = await rig.openai.chat.completions.create(**options)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        facts: Any = whole.model_extra["slmfleet"]  # type: ignore[index]
        assert facts["timings"]["decode_s"] > 0
        assert facts["timings"]["load_s"] > 0
        stream = await rig.openai.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12
        assert chunks[-1].model_extra["slmfleet"]["timings"]["load_s"] == 0  # type: ignore[index]
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert said == whole.choices[0].message.content

    with_api([tiny], test)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_differ_and_one_seed_repeats_them(tiny: LoadableModel, stream: bool) -> None:
    async def ask(rig: ApiRig) -> list[str]:
        options: Any = {"model": "tiny", "messages": HI, "max_tokens": 16, "temperature": 2, "seed": 7, "n": 3}
        texts = ["", "", ""]
        if stream:
            answer = await rig.openai.chat.completions.create(**options, stream=True)
            async for chunk in answer:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            whole = await rig.openai.chat.completions.create(**options)
            assert [choice.index for choice in whole.choices] == [0, 1, 2]
            assert whole.usage is not None
            assert whole.usage.completion_tokens <= 48
            texts = [choice.message.content or "" for choice in whole.choices]
        return texts

    async def test(rig: ApiRig) -> None:
        first = await ask(rig)
        assert len(set(first)) == 3
        assert await ask(rig) == first

    with_api([tiny], test)


def test_logprobs(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        answer = await rig.openai.chat.completions.create(
            model="tiny", messages=HI, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 4
        for entry in logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 2
            assert entry.logprob == max(top.logprob for top in entry.top_logprobs)

    with_api([tiny], test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_asked_for_comes_even_from_noise(tiny: LoadableModel, stream: bool, choice: Any) -> None:
    async def test(rig: ApiRig) -> None:
        options: Any = {
            "model": "tiny", "messages": HI, "tools": [WEATHER], "tool_choice": choice, "temperature": 0,
            "max_tokens": 200, "logit_bias": {},
        }  # fmt: skip
        name, arguments, reason, content = "", "", "", ""
        if stream:
            async for chunk in await rig.openai.chat.completions.create(**options, stream=True):
                for one in chunk.choices:
                    content += one.delta.content or ""
                    for call in one.delta.tool_calls or ():
                        assert call.function is not None
                        name += call.function.name or ""
                        arguments += call.function.arguments or ""
                    reason = one.finish_reason or reason
        else:
            one = (await rig.openai.chat.completions.create(**options)).choices[0]
            assert one.message.tool_calls
            (only,) = one.message.tool_calls
            assert only.type == "function"
            assert only.id.startswith("call_")
            name, arguments, reason = only.function.name, only.function.arguments, one.finish_reason
            content = one.message.content or ""
        assert (name, content) == ("get_weather", "")
        # Noise may pad JSON with white space up to the limit.
        assert reason in ("length", "tool_calls" if choice == "required" else "stop")
        if reason != "length":
            assert json.loads(arguments)["city"] in ("Paris", "Rome")

    with_api([tiny], test)


def test_a_small_model_calls_a_tool_and_reads_its_result(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        messages: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
        answer = await rig.openai.chat.completions.create(
            model="smol", messages=messages, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=60
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message
        assert message.tool_calls
        assert message.tool_calls[0].type == "function"
        assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
        messages += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is 31 degrees and sunny."},
        ]
        last = await rig.openai.chat.completions.create(
            model="smol", messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=30
        )
        assert last.choices[0].message.content

    with_api([smol], test)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_may_be_called_reach_a_model_whose_template_knows_none(smol: LoadableModel, stream: bool) -> None:
    """Without care llama.cpp leaves the tools out of the prompt in silence."""

    async def test(rig: ApiRig) -> None:
        options: Any = {"model": "smol", "messages": HI, "temperature": 0, "max_tokens": 60}
        plain = await rig.openai.chat.completions.create(**options)
        assert plain.usage is not None
        if stream:
            content = calls = ""
            told = 0
            async for chunk in await rig.openai.chat.completions.create(
                **options, tools=[WEATHER], stream=True, stream_options={"include_usage": True}
            ):
                for choice in chunk.choices:
                    content += choice.delta.content or ""
                    calls += "".join(c.function.name or "" for c in choice.delta.tool_calls or () if c.function)
                told = chunk.usage.prompt_tokens if chunk.usage else told
        else:
            answer = await rig.openai.chat.completions.create(**options, tools=[WEATHER])
            assert answer.usage is not None
            told = answer.usage.prompt_tokens
            message = answer.choices[0].message
            content = message.content or ""
            calls = "".join(c.function.name for c in message.tool_calls or () if c.type == "function")
        assert told > plain.usage.prompt_tokens + 30
        # One of both, and none of the JSON that bound it.
        assert bool(content) != bool(calls)
        assert calls in ("", "get_weather")
        assert not content.startswith("{")

    with_api([smol], test)


def test_json_schema_binds_and_one_that_can_not_is_refused(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        def form(schema: Any) -> Any:
            return {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}

        options: Any = {"model": "smol", "messages": HI, "temperature": 0, "max_tokens": 60}
        answer = await rig.openai.chat.completions.create(**options, response_format=form(SHAPE))
        assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)
        json_object = await rig.openai.chat.completions.create(**options, response_format={"type": "json_object"})
        assert (json_object.choices[0].message.content or "").lstrip().startswith("{")
        for schema in ({"type": "nonsense"}, {"not": {}}, {"$ref": "#/$defs/none"}):
            with pytest.raises(openai.BadRequestError) as caught:
                await rig.openai.chat.completions.create(**options, response_format=form(schema))
            assert caught.value.code == "invalid_schema"

    with_api([smol], test)


def test_completions_go_on_from_the_prompt(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        options: Any = {"model": "smol", "temperature": 0, "max_tokens": 6}
        one = await rig.openai.completions.create(prompt="The capital of France is", **options, logprobs=2)
        assert "Paris" in one.choices[0].text
        logprobs = one.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == one.choices[0].text
        assert logprobs.text_offset is not None
        assert logprobs.text_offset[1] == len(logprobs.tokens[0])
        two = await rig.openai.completions.create(
            prompt=["One, two,", "The capital of France is"], echo=True, **options
        )
        assert [choice.index for choice in two.choices] == [0, 1]
        assert two.choices[0].text.startswith("One, two, ")
        assert two.choices[1].text == "The capital of France is" + one.choices[0].text
        assert two.usage is not None
        assert two.usage.completion_tokens == 12
        texts, usage = ["", ""], None
        prompts = ["One, two,", "The capital of France is"]
        options["stream_options"] = {"include_usage": True}
        async for chunk in await rig.openai.completions.create(prompt=prompts, stream=True, **options):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            usage = chunk.usage or usage
        assert texts[1] == one.choices[0].text
        assert usage is not None
        assert usage.completion_tokens == 12

    with_api([smol], test)


def test_responses_whole(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        answer = await rig.openai.responses.create(
            model="smol", instructions="Be brief.", input="Say hello.", temperature=0, max_output_tokens=40
        )
        assert answer.object == "response"
        assert answer.output_text
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        assert answer.status in ("completed", "incomplete")
        # The answer is sent back as the next input, as stateless clients do.
        again = await rig.openai.responses.create(
            model="smol", temperature=0, max_output_tokens=10,
            input=[{"role": "user", "content": "Say hello."}, *[item.model_dump() for item in answer.output],
                   {"role": "user", "content": [{"type": "input_text", "text": "Again."}]}],
        )  # fmt: skip
        assert again.usage is not None
        assert again.usage.input_tokens > answer.usage.input_tokens
        cut = await rig.openai.responses.create(model="smol", input="Tell a story.", max_output_tokens=3, temperature=0)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"

    with_api([smol], test)


def test_responses_streamed(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        async with rig.openai.responses.stream(
            model="smol", input="Say hello.", temperature=0, max_output_tokens=12
        ) as stream:
            events = [event async for event in stream]
        last: Any = getattr(events[-1], "response")  # noqa: B009  # of the last event's type
        kinds = [event.type for event in events]
        deltas = [kind for kind in kinds if kind == "response.output_text.delta"]
        assert deltas
        assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
            f"response.{last.status}",
        ]  # fmt: skip
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == last.output_text

    with_api([smol], test)


def test_responses_call_functions_and_keep_to_schemas(smol: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        tool: Any = {"type": "function", "strict": False, **WEATHER["function"]}
        options: Any = {"model": "smol", "temperature": 0, "max_output_tokens": 60}
        answer = await rig.openai.responses.create(
            input="Weather in Paris?", tools=[tool], tool_choice="required", **options
        )
        (call,) = answer.output
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)["city"] in ("Paris", "Rome")) == ("get_weather", True)
        async with rig.openai.responses.stream(
            input="Weather in Paris?", tools=[tool], tool_choice={"type": "function", "name": "get_weather"}, **options
        ) as stream:
            kinds = [event.type async for event in stream]
        assert "response.function_call_arguments.delta" in kinds
        assert kinds[-3:] == [
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        after = await rig.openai.responses.create(
            input=[{"role": "user", "content": "Weather in Paris?"}, call.model_dump(),
                   {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}], **options,
        )  # fmt: skip
        assert after.output_text
        form: Any = {"format": {"type": "json_schema", "name": "shape", "schema": SHAPE}}
        shaped = await rig.openai.responses.create(input="Is water wet?", text=form, **options)
        assert isinstance(json.loads(shaped.output_text)["ok"], bool)

    with_api([smol], test)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ],
)
def test_what_responses_can_not_do_is_said(tiny: LoadableModel, fields: Any, param: str) -> None:
    async def test(rig: ApiRig) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await rig.openai.responses.create(**{"model": "tiny", "input": "hi", **fields})
        assert caught.value.param == param

    with_api([tiny], test)


def test_loading_and_unloading_by_hand(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        assert (await rig.http.get("/api/models/status")).json()["data"][0]["state"] == "unloaded"
        loaded = await rig.http.post("/api/models/load", json={"model": "tiny"})
        assert (loaded.status_code, loaded.json()["state"]) == (200, "ready")
        assert loaded.json()["memory_bytes"] > 1 << 20
        unloaded = await rig.http.post("/api/models/unload", json={"model": "tiny"})
        assert (unloaded.json()["state"], unloaded.json()["pid"]) == ("unloaded", None)
        missing = await rig.http.post("/api/models/load", json={"model": "tinny"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        assert "did you mean 'tiny'" in missing.json()["error"]["message"]
        assert (await rig.http.get("/api/models/load")).status_code == 405

    with_api([tiny], test)


def test_keep_alive_of_a_request(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        options: Any = {"model": "tiny", "messages": HI, "max_tokens": 2}
        await rig.openai.chat.completions.create(**options, extra_body={"keep_alive": 0})
        await reached(rig.host, tiny.key, ModelState.UNLOADED)
        await rig.openai.chat.completions.create(**options, extra_body={"keep_alive": "10m"})
        assert (await rig.http.get("/api/models/status")).json()["data"][0]["state"] == "ready"

    with_api([tiny], test)


def test_errors_have_the_types_of_the_client(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        chat = rig.openai.chat.completions
        with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'") as missing:
            await chat.create(model="tinyy", messages=HI)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens .* holds 512") as long:
            await chat.create(model="tiny", messages=[{"role": "user", "content": "x" * 3000}])
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await chat.create(model="tiny", messages=HI, temperature=3)
        with pytest.raises(openai.APIStatusError) as large:
            await chat.create(model="tiny", messages=[{"role": "user", "content": "x" * (1 << 20)}])
        assert (large.value.status_code, large.value.code) == (413, "request_too_large")
        for body, kind, status in (
            (b"{", "application/json", 400),
            (b"{}", "text/plain", 415),
            (b"[]", "application/json", 400),
        ):
            answer = await rig.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
        with pytest.raises(openai.BadRequestError, match="is an agent"):
            await rig.openai.completions.create(model="agent/greeter", prompt="x")
        listed = [model.id async for model in await rig.openai.models.list()]
        assert listed == ["agent/greeter", "greeter-deployment", "tiny"]
        assert (await rig.openai.models.retrieve("tiny")).owned_by == "slmfleet"

    with_api([tiny], test, targets=[agent(tiny, "greeter")])


def test_a_client_that_leaves_frees_its_slot_at_once(tiny: LoadableModel) -> None:
    async def test(rig: ApiRig) -> None:
        long: Any = {"model": "tiny", "messages": HI, "max_tokens": 100000, "temperature": 2,
                     "extra_body": {"ignore_eos": True}}  # fmt: skip
        stream = await rig.openai.chat.completions.create(**long, stream=True)
        await anext(aiter(stream))
        await stream.close()
        # One slot: the next answer can only come when the first is over.
        async with asyncio.timeout(10):
            await rig.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
        assert rig.host.totals()[tiny.key].requests_cancelled == 1

    with_api([tiny], test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_every_endpoint_names_the_model_it_lacks(tiny: LoadableModel, path: str) -> None:
    async def test(rig: ApiRig) -> None:
        body = {"model": "nobody", "messages": HI} if "chat" in path else {"model": "nobody", "input": "hi"}
        body = {"model": "nobody", "prompt": "hi"} if path == "/v1/completions" else body
        answer = await rig.http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    with_api([tiny], test)
