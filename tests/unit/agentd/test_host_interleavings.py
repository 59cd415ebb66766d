"""Random interleavings of everything that can happen to a model host, in virtual time, with workers that are late,
dead, hung or say things twice: no request is lost or hangs, no model is loaded twice, no budget is broken, references
and memory return to zero."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from agentd.device.pressure import Memory
from agentd.models import events as on
from agentd.models.host import Host
from agentd.models.planner import Evict
from agentd.models.settings import HostSettings, Tuning
from agentd.models.ticket import Ticket
from agentd.models.types import (
    Done,
    GenerateRequest,
    GenerationFailed,
    LoadableModel,
    ModelKey,
    ModelState,
    Refused,
)
from slmfleet.v1.worker_pb2 import WorkerRequest
from tests.support.fake_workers import FakeLauncher, Habits
from tests.support.host_invariants import Watch
from tests.support.virtual_time import run_virtual

# 500 take ten seconds; SLMFLEET_INTERLEAVINGS draws more. In groups, since a thousand tests are slow to collect; a
# failure names its seed.
RUNS = int(os.environ.get("SLMFLEET_INTERLEAVINGS", "500"))
GROUPS = 20
DEEDS = (
    *("ask",) * 6, "cut", "models", "kill", "unload", "load", "leave a load", "tune", "press", "probe",
)  # fmt: skip
KEYS = [ModelKey(f"m{n}", "1", "v") for n in range(4)]


def draw_models(chance: random.Random) -> list[LoadableModel]:
    return [
        LoadableModel(
            key,
            "fake",
            # The host changes its worker when the files change: seldom, or nothing else would be seen.
            Path(f"/nowhere/{int(chance.random() < 0.2)}"),
            100,
            warm=chance.random() < 0.2,
            keep_alive_s=chance.choice([None, 0, 0.5, 20, -1]),
            priority=chance.randint(0, 100),
        )
        for key in KEYS
        if chance.random() < 0.9
    ]


async def ask(host: Host, chance: random.Random, ends: list[str]) -> None:
    """One caller: reads all, or leaves early in one of the two ways."""
    request = GenerateRequest(
        chance.choice(KEYS),
        {"messages": []},
        timeout_s=chance.uniform(1, 40),
        queue_timeout_s=chance.uniform(0.5, 30),
        priority=chance.randint(0, 100),
        keep_alive_s=chance.choice([None, None, 0, 3, -1]),
    )
    # Which of those that ask at the same moment is heard when: between any two steps of the others.
    for _ in range(chance.randint(0, 8)):
        await asyncio.sleep(0)
    leave_after = chance.choice([None, None, None, 0, 2])
    stream = host.generate(request)
    try:
        seen = 0
        async for item in stream:
            if isinstance(item, Done):
                ends.append(item.finish_reason)
                return
            seen += 1
            if leave_after is not None and seen > leave_after:
                ends.append("left")
                return
        ends.append("LOST: an answer without an end")
    except (Refused, GenerationFailed) as error:
        ends.append(error.code)
    finally:
        await stream.aclose()


async def scenario(seed: int, watch: Watch) -> None:
    chance = random.Random(seed)
    harsh = chance.choice([0.0, 0.02, 0.1])
    habits = Habits(harsh, harsh, harsh, harsh, harsh, harsh, chance.choice([0.0, 0.5]), harsh, harsh, harsh)
    launcher = FakeLauncher(chance, habits, limit=200)
    places = chance.choice([0, 1, 2])
    limit = chance.choice([0, 150, 250])
    settings = HostSettings(
        max_loaded_models=places,
        max_memory_bytes=limit,
        max_queued=4,
        load_timeout_s=20,
        max_concurrent=chance.choice([0, 1, 2]),
        # With a short one, many models go just when they are asked for.
        keep_alive_s=chance.choice([0, 1, 300]),
    )
    memory = Memory(10**12, 10**12)
    host = Host(settings, launcher, memory=lambda: memory)
    watch.hosts.append(host)
    ends: list[str] = []
    running = asyncio.create_task(host.run())
    await asyncio.sleep(0)
    host.set_models([LoadableModel(key, "fake", Path("/nowhere/0"), 100) for key in KEYS])
    asked = 0
    async with asyncio.timeout(3000), asyncio.TaskGroup() as group:
        for _ in range(chance.randint(5, 40)):
            match chance.choice(DEEDS):
                case "ask":
                    for _ in range(chance.choice([1, 1, 3])):
                        group.create_task(ask(host, chance, ends))
                        asked += 1
                case "cut":
                    caller = group.create_task(ask(host, chance, []))
                    asyncio.get_running_loop().call_later(chance.uniform(0, 5), caller.cancel)
                case "models":
                    host.set_models(draw_models(chance))
                case "kill" if launcher.alive:
                    chance.choice(list(launcher.alive.values())).kill()
                case "unload":
                    group.create_task(quietly(host.unload(chance.choice(KEYS))))
                case "load":
                    group.create_task(quietly(host.load(chance.choice(KEYS))))
                case "leave a load":
                    caller = group.create_task(quietly(host.load(chance.choice(KEYS))))
                    asyncio.get_running_loop().call_later(chance.uniform(0, 5), caller.cancel)
                case "tune":
                    host.tune(Tuning(max_concurrent=chance.choice([0, 1]), keep_alive_cap_s=chance.choice([None, 1.0])))
                case "press":
                    memory = Memory(10**12, chance.choice([10**12, 10**12, settings.reserve_bytes - 50]))
                case "probe":
                    assert await host.probe() == ""
            await asyncio.sleep(chance.choice([0, 0, 0.01, 1, 10]))
    assert len(ends) == asked
    assert not [end for end in ends if end.startswith("LOST")]
    memory = Memory(10**12, 10**12)
    assert launcher.most_alive <= min(places or 9, limit // launcher.memory if limit else 9)
    # After all that, nothing is held: no reference, and with nothing assigned no worker and no memory.
    async with asyncio.timeout(200):
        while any(status.in_flight or status.queued for status in host.status()):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(1)
    assert not watch.lost()
    host.set_models([])
    async with asyncio.timeout(1000):
        while host.status():  # noqa: ASYNC110
            await asyncio.sleep(1)
    assert not launcher.alive
    assert host.granted_bytes() == 0
    assert await host.probe() == ""
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert not launcher.faults
    assert not watch.broken
    assert host.owner_failures == 0


async def quietly(call) -> None:
    with contextlib.suppress(Refused):
        await call


@pytest.mark.parametrize("group", range(GROUPS))
def test_nothing_is_lost_and_nothing_is_left(group: int, monkeypatch: pytest.MonkeyPatch):
    events = evictions = 0
    for seed in range(group, RUNS, GROUPS):
        with monkeypatch.context() as patch:
            watch = Watch(patch)
            try:
                run_virtual(scenario(seed, watch))
            except BaseException as error:
                error.add_note(f"seed {seed}; broken: {watch.broken[:5]}")
                raise
            events += watch.events
            evictions += watch.evictions
    # Or the scenarios have become so tame that they prove nothing.
    assert events > 50 * (RUNS // GROUPS)
    assert evictions or RUNS < 10 * GROUPS


@pytest.mark.parametrize("use", ["a request runs", "a request came at the same moment", "it is warm by now"])
def test_a_model_in_use_declines_to_go_and_the_planner_hears_of_it(use: str, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        watch = Watch(monkeypatch)
        launcher = FakeLauncher(random.Random(1))
        host = Host(HostSettings(max_loaded_models=1), launcher, memory=lambda: Memory(10**12, 10**12))
        watch.hosts.append(host)
        running = asyncio.create_task(host.run())
        await asyncio.sleep(0)
        model = LoadableModel(KEYS[0], "fake", Path("/nowhere/0"), 100)
        host.set_models([model])
        await host.load(model.key)
        if use == "a request runs":
            host._post(model.key, on.Submit(Ticket(GenerateRequest(model.key, {}), WorkerRequest(), 0.0)))
            await asyncio.sleep(0)
        elif use == "a request came at the same moment":
            # The request is in the inbox, and then the planner's question.
            host._post(model.key, on.Submit(Ticket(GenerateRequest(model.key, {}), WorkerRequest(), 0.0)))
        else:
            host.set_models([replace(model, warm=True)])
        host._scheduler._apply(Evict(model.key, "a test asks"))
        await asyncio.sleep(0.01)
        assert [status.state for status in host.status()] == [ModelState.READY]
        assert not host._scheduler._asked_to_go
        assert launcher.started == 1
        running.cancel()
        await asyncio.wait([running])
        assert not watch.broken

    run_virtual(main())
