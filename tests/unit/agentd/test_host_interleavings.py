"""Random interleavings of everything that can happen to a model host, in virtual time, with workers that are late,
dead, hung or say things twice: no request is lost or hangs, no model is loaded twice, no budget is broken, references
and memory return to zero."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import pytest

from agentd.device.pressure import Memory
from agentd.models.host import Host
from agentd.models.settings import HostSettings
from agentd.models.types import Done, GenerateRequest, GenerationFailed, LoadableModel, ModelKey, Refused
from tests.support.fake_workers import FakeLauncher, Habits
from tests.support.virtual_time import run_virtual

# A thousand take half a minute: CI draws fewer, SLMFLEET_INTERLEAVINGS more.
RUNS = int(os.environ.get("SLMFLEET_INTERLEAVINGS", "40"))
KEYS = [ModelKey(f"m{n}", "1", "v") for n in range(4)]


def draw_models(chance: random.Random) -> list[LoadableModel]:
    return [
        LoadableModel(
            key,
            "fake",
            Path(f"/nowhere/{chance.randint(0, 1)}"),
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


async def scenario(seed: int) -> None:
    chance = random.Random(seed)
    harsh = chance.choice([0.0, 0.02, 0.1])
    habits = Habits(harsh, harsh, harsh, harsh, harsh, harsh, chance.choice([0.0, 0.5]), harsh)
    launcher = FakeLauncher(chance, habits)
    places = chance.choice([0, 1, 2])
    limit = chance.choice([0, 150, 250])
    settings = HostSettings(max_loaded_models=places, max_memory_bytes=limit, max_queued=4, load_timeout_s=20)
    host = Host(settings, launcher, memory=lambda: Memory(10**12, 10**12))
    ends: list[str] = []
    running = asyncio.create_task(host.run())
    await asyncio.sleep(0)
    host.set_models([LoadableModel(key, "fake", Path("/nowhere/0"), 100) for key in KEYS])
    asked = 0
    async with asyncio.timeout(3000), asyncio.TaskGroup() as group:
        for _ in range(chance.randint(5, 40)):
            match chance.choice(["ask", "ask", "ask", "ask", "cut", "models", "kill", "unload", "load", "probe"]):
                case "ask":
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
                case "probe":
                    assert await host.probe() == ""
            await asyncio.sleep(chance.choice([0, 0, 0.01, 1, 10]))
    assert len(ends) == asked
    assert not [end for end in ends if end.startswith("LOST")]
    assert launcher.most_alive <= min(places or 9, limit // launcher.memory if limit else 9)
    # After all that, nothing is held: no reference, and with nothing assigned no worker and no memory.
    async with asyncio.timeout(200):
        while any(status.in_flight or status.queued for status in host.status()):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(1)
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


async def quietly(call) -> None:
    with contextlib.suppress(Refused):
        await call


@pytest.mark.parametrize("seed", range(RUNS))
def test_nothing_is_lost_and_nothing_is_left(seed: int):
    run_virtual(scenario(seed))
