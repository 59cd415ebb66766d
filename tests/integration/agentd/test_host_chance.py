"""Random interleavings with real worker processes and a real tiny model: kill -9, SIGSTOP, callers that leave, loads,
unloads, changes of the desired state. The same must hold after every event as with fake workers in virtual time
(tests/unit/agentd/test_host_interleavings.py), and at the end every process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from dataclasses import replace

import pytest

from agentd.device.pressure import Memory
from agentd.models.host import Host
from agentd.models.process import start_time
from agentd.models.settings import BackoffSettings, HostSettings, Tuning
from agentd.models.types import Chunk, GenerationFailed, LoadableModel, Refused
from tests.support import stub_backend
from tests.support.host_invariants import Watch
from tests.support.hosts import request, running
from tests.support.models import loadable, make_tiny_gguf

pytestmark = pytest.mark.model
# As many as fit into the time; SLMFLEET_REAL_INTERLEAVINGS asks for a number of them, whatever that takes.
RUNS = int(os.environ.get("SLMFLEET_REAL_INTERLEAVINGS", "0"))
BUDGET_S = 12.0
# Hosts side by side: most of the time is waiting for what hangs.
HOSTS = 4
DEEDS = (*("ask",) * 6, "cut", "kill", "stop", "unload", "load", "models", "tune")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LoadableModel]:
    folder = tmp_path_factory.mktemp("models")
    tiny = loadable(make_tiny_gguf(folder / "tiny.gguf"), "gguf", "one")
    stub = loadable(stub_backend.write_stub(folder / "stub.json", tokens_per_s=50, slots=2), "stub", "stub")
    dying = stub_backend.write_stub(folder / "dying.json", tokens_per_s=50, fail="dead", after_tokens=12)
    return [tiny, replace(tiny, key=tiny.key._replace(model="two")), stub, loadable(dying, "stub", "dying")]


async def ask(host: Host, model: LoadableModel, chance: random.Random, ends: list[str]) -> None:
    leave_after = chance.choice([None, None, None, 0, 2])
    tokens = chance.choice([1, 8, 40])
    keep_alive = chance.choice([None, None, 0, -1])
    stream = host.generate(request(model.key, "hi", tokens, keep_alive_s=keep_alive, timeout_s=20, queue_timeout_s=8))
    seen = 0
    try:
        async for item in stream:
            seen += isinstance(item, Chunk)
            if leave_after is not None and seen > leave_after:
                ends.append("left")
                return
        ends.append("done")
    except (Refused, GenerationFailed) as error:
        ends.append(error.code)
    finally:
        await stream.aclose()


async def quietly(call) -> None:
    with contextlib.suppress(Refused):
        await call


async def scenario(seed: int, watch: Watch, models: list[LoadableModel], ends: list[str], pids: set[int]) -> None:
    chance = random.Random(seed)
    settings = HostSettings(
        **stub_backend.host_options(),
        backoff=BackoffSettings(0.05, 0.2),
        max_loaded_models=chance.choice([0, 1, 2]),
        max_concurrent=chance.choice([0, 0, 1]),
        max_queued=4,
        # Short, so that stopped processes are found out soon.
        hang_floor_s=1.0,
        prefill_chunk=4,
        stop_grace_s=0.5,
        load_timeout_s=10,
    )
    host = Host(settings, memory=lambda: Memory(10**12, 10**12))
    watch.hosts.append(host)
    asked = 0
    mine: list[str] = []
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(90), running(host, models):
        async with asyncio.TaskGroup() as group:
            for _ in range(chance.randint(5, 15)):
                alive = [status.pid for status in host.status() if status.pid]
                pids.update(alive)
                model = chance.choice(models)
                match chance.choice(DEEDS):
                    case "ask":
                        group.create_task(ask(host, model, chance, mine))
                        asked += 1
                    case "cut":
                        caller = group.create_task(ask(host, model, chance, []))
                        loop.call_later(chance.uniform(0, 0.5), caller.cancel)
                    case "kill" | "stop" as deed if alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(chance.choice(alive), signal.SIGKILL if deed == "kill" else signal.SIGSTOP)
                    case "unload":
                        group.create_task(quietly(host.unload(model.key)))
                    case "load":
                        group.create_task(quietly(host.load(model.key, timeout_s=20)))
                    case "models":
                        host.set_models([m for m in models if chance.random() < 0.8])
                    case "tune":
                        host.tune(Tuning(max_concurrent=chance.choice([0, 1]), max_loaded_models=chance.choice([0, 1])))
                await asyncio.sleep(chance.choice([0, 0, 0.01, 0.1, 0.3]))
        pids.update(status.pid for status in host.status() if status.pid)
        assert len(mine) == asked
        ends += mine
        assert await host.probe(timeout_s=10) == ""
        await drained(host)
        assert host.granted_bytes() == 0
        assert host.owner_failures == 0
        assert not watch.lost()
    watch.hosts.remove(host)


async def drained(host: Host) -> None:
    """Nothing is assigned any more: wait until no model is left."""
    changed = asyncio.Event()
    end = host.subscribe(lambda _: changed.set())
    host.set_models([])
    while host.status():
        with contextlib.suppress(TimeoutError):
            # An owner's very end is no change of a state.
            async with asyncio.timeout(0.05):
                await changed.wait()
        changed.clear()
    end()


@pytest.mark.timeout(0 if RUNS else 120)
def test_nothing_is_lost_and_nothing_is_left_with_real_workers(
    models: list[LoadableModel], monkeypatch: pytest.MonkeyPatch
):
    seeds = itertools.count()
    ends: list[str] = []
    pids: set[int] = set()
    watch = Watch(monkeypatch)
    began_s = time.monotonic()

    async def one_after_the_other() -> None:
        for seed in seeds:
            if seed >= RUNS if RUNS else time.monotonic() - began_s > BUDGET_S:
                return
            try:
                await scenario(seed, watch, models, ends, pids)
            except BaseException as error:
                error.add_note(f"seed {seed}; broken: {watch.broken[:5]}")
                raise

    async def side_by_side() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(HOSTS):
                group.create_task(one_after_the_other())

    asyncio.run(side_by_side())
    assert not watch.broken
    assert not [pid for pid in pids if start_time(pid)]
    served = ends.count("done")
    print(f"{next(seeds) - HOSTS} interleavings, {len(pids)} workers, {len(ends)} requests, {served} served")
    assert served > 10
