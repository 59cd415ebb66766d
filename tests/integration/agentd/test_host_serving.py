"""The model host with real workers and real (tiny) models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agentd.models.host import Host
from agentd.models.process import resident_bytes
from agentd.models.settings import HostSettings
from agentd.models.types import Chunk, Done, LoadableModel, ModelState, Refused
from tests.support.hosts import answer, reached, request, running, status_of
from tests.support.models import find_model, loadable, make_tiny_gguf, smollm2_gguf

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(params=["gguf", "onnx-genai"])
def tiny(request: pytest.FixtureRequest, gguf_file: Path) -> LoadableModel:
    entry = gguf_file if request.param == "gguf" else find_model("tiny-onnx-int4")
    return loadable(entry, request.param)


@pytest.fixture
def gguf(gguf_file: Path) -> LoadableModel:
    return loadable(gguf_file, "gguf")


def test_answers_and_counts(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            items = [item async for item in host.generate(request(tiny.key, "hi there", 12))]
            *chunks, done = items
            assert isinstance(done, Done)
            assert chunks[0].delta["role"] == "assistant"
            assert all(isinstance(chunk, Chunk) for chunk in chunks)
            assert done.finish_reason == "length"
            assert done.output_tokens == 12
            assert done.prompt_tokens > 8
            assert done.timings.load_s > 0
            again, end = await answer(host, request(tiny.key, "hi there", 12))
            assert again == "".join(chunk.delta.get("content") or "" for chunk in chunks)
            assert end.timings.load_s == 0
            status = status_of(host, tiny.key)
            assert status.state is ModelState.READY
            assert status.memory_bytes > 10**7
            counters = host.take_counters()[tiny.key]
            assert (counters.requests_ok, counters.output_tokens, counters.loads) == (2, 24, 1)
            assert counters.first_token_s.count == 2
            assert host.take_counters()[tiny.key].requests_ok == 0
            assert host.totals()[tiny.key].requests_ok == 2
            assert await host.probe() == ""
            return status.pid

    pid = asyncio.run(scenario())
    assert resident_bytes(pid) == 0


def test_prompt_that_does_not_fit_is_refused_with_the_counts(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            with pytest.raises(
                Refused, match=r"the prompt has \d+ tokens and this model's context holds 512"
            ) as caught:
                await answer(host, request(tiny.key, "hi there " * 200))
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            await answer(host, request(tiny.key))

    asyncio.run(scenario())


def test_json_schema_binds_the_answer(tiny: LoadableModel):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}

    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            text, done = await answer(host, request(tiny.key, "hi", 400, response_format=form))
            # Noise may pad JSON with white space up to the limit; what there is, is JSON of this shape all the same.
            if done.finish_reason == "stop":
                assert isinstance(json.loads(text)["ok"], bool)
            else:
                assert text.strip()[:1] == "{"
            bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
            with pytest.raises(Refused, match="nonsense") as caught:
                await answer(host, request(tiny.key, "hi", 4, response_format=bad))
            assert caught.value.status == 400

    asyncio.run(scenario())


def test_stop_sequence_ends_the_answer(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            text, _ = await answer(host, request(tiny.key, "hi", 64))
            # A piece of the greedy answer that is plain text in every tokenizer.
            stop = next(c for c in text[4:] if c.isascii() and c.isprintable())
            cut, done = await answer(host, request(tiny.key, "hi", 64, stop=[stop]))
            assert done.finish_reason == "stop"
            assert cut == text[: text.index(stop)]

    asyncio.run(scenario())


def test_closing_the_iterator_frees_the_worker(tiny: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [tiny]) as host:
            stream = host.generate(request(tiny.key, "hi", 400))
            await anext(stream)
            await stream.aclose()
            # One slot: the next answer can only come if the first is over.
            async with asyncio.timeout(10):
                await answer(host, request(tiny.key, "hi", 4))
            assert host.take_counters()[tiny.key].requests_cancelled == 1
            assert status_of(host, tiny.key).in_flight == 0

    asyncio.run(scenario())


def test_unload_gives_the_memory_back_and_load_brings_it_again(gguf: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [gguf]) as host:
            await host.load(gguf.key)
            pid = status_of(host, gguf.key).pid
            assert resident_bytes(pid) > 10**7
            await host.unload(gguf.key)
            assert resident_bytes(pid) == 0
            assert host.granted_bytes() == 0
            assert status_of(host, gguf.key).state is ModelState.UNLOADED
            await answer(host, request(gguf.key))
            counters = host.totals()[gguf.key]
            assert (counters.loads, counters.unloads, counters.crashes) == (2, 1, 0)

    asyncio.run(scenario())


def test_idle_model_goes_and_warm_one_stays(gguf: LoadableModel, gguf_file: Path):
    warm = loadable(gguf_file, "gguf", "warm", warm=True)

    async def scenario():
        async with running(Host(HostSettings(keep_alive_s=0.2)), [gguf, warm]) as host:
            await reached(host, warm.key, ModelState.READY)
            await answer(host, request(gguf.key))
            await reached(host, gguf.key, ModelState.UNLOADED)
            assert status_of(host, warm.key).state is ModelState.READY
            await answer(host, request(gguf.key, keep_alive_s=-1))
            await answer(host, request(gguf.key, keep_alive_s=0))
            await reached(host, gguf.key, ModelState.UNLOADED)

    asyncio.run(scenario())


def test_model_that_is_dropped_goes_and_comes_back(gguf: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [gguf]) as host:
            await answer(host, request(gguf.key))
            pid = status_of(host, gguf.key).pid
            host.set_models([])
            host.set_models([])
            with pytest.raises(Refused) as caught:
                await answer(host, request(gguf.key))
            assert caught.value.status == 404
            async with asyncio.timeout(10):
                while host.status():
                    await host.probe()
            assert resident_bytes(pid) == 0
            host.set_models([gguf])
            await answer(host, request(gguf.key))

    asyncio.run(scenario())


def test_two_models_where_one_fits(gguf: LoadableModel, gguf_file: Path):
    other = loadable(gguf_file, "gguf", "other")

    async def scenario():
        async with running(Host(HostSettings(max_loaded_models=1)), [gguf, other]) as host:
            asked = [answer(host, request(model.key)) for model in (gguf, other, gguf, other)]
            async with asyncio.timeout(30):
                assert len(await asyncio.gather(*asked)) == 4
            loaded = [s for s in host.status() if s.state is ModelState.READY]
            assert len(loaded) == 1

    asyncio.run(scenario())


def test_model_that_can_never_fit_is_refused_with_the_numbers(gguf: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings(max_memory_bytes=10**6)), [gguf]) as host:
            with pytest.raises(Refused, match=r"needs 3\d\.\d MB and the limit for all models is 1\.0 MB") as caught:
                await answer(host, request(gguf.key))
            assert (caught.value.status, caught.value.code) == (503, "insufficient_memory")
            assert caught.value.retry_after_s

    asyncio.run(scenario())


def test_real_model_speaks(tmp_path: Path):
    model = loadable(smollm2_gguf(tmp_path), "gguf", "smollm2", context_tokens=1024)

    async def scenario():
        async with running(Host(HostSettings()), [model]) as host:
            text, done = await answer(host, request(model.key, "Say hello.", 24))
            assert "Hello" in text
            assert done.output_tokens >= 3
            estimate, real = host.granted_bytes(), status_of(host, model.key).memory_bytes
            assert 0.6 < real / estimate <= 1.0

    asyncio.run(scenario())
