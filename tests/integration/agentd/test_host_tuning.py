"""What changes while the host runs (bounds, measured memory), and what a warm model does first; real processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentd.models.host import Host
from agentd.models.measured import Measurement, from_json, to_json
from agentd.models.settings import HostSettings, Tuning
from agentd.models.types import LoadableModel, ModelKey, ModelState, Refused, RuntimeOptions
from tests.support import stub_backend
from tests.support.hosts import answer, reached, request, running, status_of
from tests.support.models import loadable, make_tiny_gguf

pytestmark = pytest.mark.model
MB = 10**6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(make_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf"), "gguf")


def stub(folder: Path, name: str = "stub", **options: Any) -> LoadableModel:
    return loadable(stub_backend.write_stub(folder / f"{name}.json", **options), "stub", name)


def settings(**more: Any) -> HostSettings:
    return HostSettings(**{**stub_backend.host_options(), **more})


async def most_at_once(host: Host, models: list[LoadableModel], each: int) -> int:
    """Serve ``each`` requests of each model; how many ran at the same time."""
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(status.in_flight for status in host.status()))

    async def ask(model: LoadableModel) -> None:
        async for _ in host.generate(request(model.key, max_tokens=5)):
            look()

    await asyncio.gather(*(ask(model) for model in models for _ in range(each)))
    return most


def test_a_node_runs_no_more_requests_at_once_than_it_may(tmp_path: Path):
    models = [stub(tmp_path, name, tokens_per_s=100, slots=2) for name in ("a", "b")]

    async def scenario():
        async with running(Host(settings(max_concurrent=3)), models) as host:
            for model in models:
                await host.load(model.key)
            assert await most_at_once(host, models, 4) == 3
            host.tune(Tuning(max_concurrent=1))
            assert await most_at_once(host, models, 3) == 1
            host.tune(Tuning(max_concurrent=9))
            assert await most_at_once(host, models, 4) == 3

    asyncio.run(scenario())


def test_bounds_from_outside_make_idle_models_go(tmp_path: Path):
    models = [replace(stub(tmp_path, name), priority=priority) for name, priority in (("a", 0), ("b", 100))]

    async def scenario():
        async with running(Host(settings()), models) as host:
            for model in models:
                await host.load(model.key)
            host.tune(Tuning(max_loaded_models=1))
            await reached(host, models[0].key, ModelState.UNLOADED)
            assert status_of(host, models[1].key).state is ModelState.READY
            host.tune(Tuning(max_memory_bytes=10 * MB))
            await reached(host, models[1].key, ModelState.UNLOADED)
            with pytest.raises(Refused, match=r"the limit for all models is 10\.0 MB"):
                await answer(host, request(models[0].key))

    asyncio.run(scenario())


def test_a_shorter_keep_alive_counts_at_once(tmp_path: Path):
    model = stub(tmp_path)

    async def scenario():
        async with running(Host(settings(keep_alive_s=600)), [model]) as host:
            await host.load(model.key)
            host.tune(Tuning(keep_alive_cap_s=0.1))
            await reached(host, model.key, ModelState.UNLOADED)

    asyncio.run(scenario())


def test_what_was_measured_is_remembered_by_the_next_life(tmp_path: Path):
    model = stub(tmp_path, memory_bytes=60 * MB)

    async def first() -> str:
        async with running(Host(settings()), [model]) as host:
            await host.load(model.key)
            return to_json(host.measured)

    text = asyncio.run(first())
    (measured,) = from_json(text).values()
    assert 60 * MB < measured.memory_bytes < 200 * MB
    assert measured.load_seconds > 0

    async def next_life(limit: int, known: str) -> None:
        host = Host(settings(max_memory_bytes=limit))
        host.remember(from_json(known))
        async with running(host, [model]):
            await host.load(model.key)

    # The estimate is 32 MB: what is known of the device refuses before the spawn.
    with pytest.raises(Refused, match="as measured at its last load"):
        asyncio.run(next_life(50 * MB, text))
    asyncio.run(next_life(50 * MB, "[]"))
    other = {model.key: replace(measured, shape="other files")}
    asyncio.run(next_life(50 * MB, to_json(other)))


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", "[[]]", "no json", '[["a","1","v","s","x",1]]'])
def test_unreadable_measurements_are_none(text: str | None):
    assert from_json(text) == {}


def test_measurements_survive_their_text():
    measured = {ModelKey("m", "1", "q4"): Measurement("s", 10, 0.5)}
    assert from_json(to_json(measured)) == measured


def test_a_warm_model_has_read_its_instructions_before_anybody_asks(tiny: LoadableModel):
    instructions = "You are a patient clerk in a shop for tools. " * 4
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": "hello"}]

    async def cached(model: LoadableModel) -> int:
        async with running(Host(HostSettings()), [model]) as host:
            # What warms it up is in its only slot by now.
            await reached(host, model.key, ModelState.READY)
            _, done = await answer(host, request(model.key, messages=messages, max_tokens=2))
            counted = host.totals()[model.key]
            assert (counted.requests_ok, counted.requests_failed, counted.requests_refused) == (1, 0, 0)
            return done.cached_tokens

    cold = asyncio.run(cached(replace(tiny, warm=True)))
    warm = asyncio.run(cached(replace(tiny, warm=True, warm_prompts=(instructions,))))
    assert warm >= 150 > cold


def test_a_models_own_runtime_settings_count(tiny: LoadableModel):
    own = RuntimeOptions(threads=1, slots=2, batch_tokens=32, kv_type="f32", gpu_layers=0, numa="distribute")
    two = replace(tiny, runtime=own)

    async def scenario():
        async with running(Host(HostSettings()), [two]) as host:
            await host.load(two.key)
            assert await most_at_once(host, [two], 3) == 2
            host.set_models([replace(two, runtime=RuntimeOptions(kv_type="q9"))])
            await reached(host, two.key, ModelState.UNLOADED)
            with pytest.raises(Refused, match="unknown key-value cache type 'q9'"):
                await host.load(two.key)

    asyncio.run(scenario())
