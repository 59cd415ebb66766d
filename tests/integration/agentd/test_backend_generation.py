"""What both text runtimes owe: constrained JSON or 400, logprobs, the prefix of the last request."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from agentd.models.host import Host
from agentd.models.settings import HostSettings
from agentd.models.types import Chunk, LoadableModel, Refused
from tests.support.hosts import answer, request, running
from tests.support.models import find_model, loadable, make_tiny_gguf

pytestmark = pytest.mark.model
RULES = "You are a careful assistant. " * 6


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf"), "gguf")


@pytest.fixture(params=["gguf", "onnx-genai"])
def tiny(request: pytest.FixtureRequest) -> LoadableModel:
    if request.param == "gguf":
        return request.getfixturevalue("gguf")
    return loadable(find_model("tiny-onnx-int4"), "onnx-genai")


def form(schema: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"not": {"type": "string"}},
        {"$ref": "#/$defs/none"},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"type": "object", "minProperties": 2},
        {"type": "string", "pattern": "("},
        None,
    ],
)
def test_schema_that_cannot_be_enforced_is_never_an_answer(tiny: LoadableModel, schema: object):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            with pytest.raises(Refused) as caught:
                await answer(host, request(tiny.key, "hi", 8, **form(schema)))
            assert (caught.value.status, caught.value.code) == (400, "invalid_schema")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        ({"enum": ["red", "green"]}, lambda value: value in ("red", "green")),
        ({"type": "string", "pattern": "^[ab]{2}$"}, lambda value: value in ("aa", "ab", "ba", "bb")),
        ({"type": "integer", "minimum": 5, "maximum": 7}, lambda value: 5 <= value <= 7),
        ({"$ref": "#/$defs/t", "$defs": {"t": {"const": 3}}}, lambda value: value == 3),
    ],
)
def test_schema_binds_even_a_model_of_noise(tiny: LoadableModel, schema: object, fits):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            for body in ({}, {"temperature": 1.5, "seed": 4}):
                text, done = await answer(host, request(tiny.key, "hi", 40, **form(schema), **body))
                assert done.finish_reason == "stop"
                assert fits(json.loads(text))
            # `true` asks for any JSON value, which is still no free text.
            text, _ = await answer(host, request(tiny.key, "hi", 1, **form(True)))
            assert text[:1] in '{["-0123456789tfn \n\t'

    asyncio.run(scenario())


def test_logprobs_are_those_of_the_answer(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            ask = request(tiny.key, "hi", 6, logprobs=True, top_logprobs=3)
            chunks = [item async for item in host.generate(ask) if isinstance(item, Chunk)]
            entries = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs["content"]]
            plain, _ = await answer(host, request(tiny.key, "hi", 6))
            return entries, "".join(chunk.delta.get("content") or "" for chunk in chunks), plain

    entries, text, plain = asyncio.run(scenario())
    assert text == plain
    assert len(entries) == 6
    for entry in entries:
        best = entry["top_logprobs"]
        assert len(best) == 3
        # Greedy: the token is the likeliest, and chances never add up to more than one.
        assert entry["logprob"] == pytest.approx(best[0]["logprob"], abs=1e-3)
        assert sum(math.exp(other["logprob"]) for other in best) <= 1.001


def test_several_answers_at_once_are_refused(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            with pytest.raises(Refused, match="`n` can only be 1"):
                await answer(host, request(tiny.key, n=2))

    asyncio.run(scenario())


def talk(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": RULES}, *said]


def test_common_prefix_is_read_once_and_changes_no_answer(tiny: LoadableModel):
    conversations = [talk("one?"), talk("two, then?"), talk("two, then?", "yes", "and three?"), talk("one?")]

    async def run(host: Host, messages, **more):
        return await answer(host, request(tiny.key, **{"max_tokens": 24, "messages": messages, **more}))

    async def scenario():
        fresh = []
        for messages in conversations:
            async with running(Host(HostSettings()), [tiny]) as host:
                fresh.append(await run(host, messages))
        async with running(Host(HostSettings()), [tiny]) as host:
            warm = [await run(host, messages) for messages in conversations]
            # Constrained in between, then free again.
            json_text, _ = await run(host, conversations[0], max_tokens=64, **form({"enum": ["a", "b"]}))
            again = await run(host, conversations[0])
        return fresh, warm, json_text, again

    fresh, warm, json_text, again = asyncio.run(scenario())
    for (text, done), (warm_text, warm_done) in zip(fresh, warm, strict=True):
        assert warm_text == text
        assert warm_done.prompt_tokens == done.prompt_tokens
    assert json.loads(json_text) in ("a", "b")
    assert again[0] == fresh[0][0]
    # The instructions alone are longer than this.
    assert warm[0][1].cached_tokens == 0
    assert all(done.cached_tokens > 100 for _, done in warm[1:])


def test_seed_gives_the_same_answer_again(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            ask = request(tiny.key, "hi", 16, messages=talk("go on"), temperature=1.2, seed=7)
            return [(await answer(host, ask))[0] for _ in range(3)]

    one, two, three = asyncio.run(scenario())
    assert one == two == three


def test_cancelled_answer_leaves_a_good_prefix(tiny: LoadableModel, tmp_path: Path):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            expected, _ = await answer(host, request(tiny.key, messages=talk("other?"), max_tokens=12))
            stream = host.generate(request(tiny.key, messages=talk("one?"), max_tokens=200))
            await anext(stream)
            await stream.aclose()
            text, done = await answer(host, request(tiny.key, messages=talk("other?"), max_tokens=12))
            assert text == expected
            assert done.cached_tokens > 100

    asyncio.run(scenario())
