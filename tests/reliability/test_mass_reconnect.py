"""A fleet that lost one line returns at once: the server stays responsive, and everybody is back in time."""

from __future__ import annotations

import asyncio
import os
import time

import httpx2
import pytest

from tests.reliability.crowd import Line, all_connected, crowd
from tests.reliability.forms import LONG, long_only
from tests.reliability.site import Site, site

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt, pytest.mark.system, long_only]

NODES = int(os.environ.get("SLMFLEET_CROWD", "2000" if LONG else "100"))
CUT_S = 60.0 if LONG else 2.0
BACK_S = 90.0
P99_S = 1.0


@pytest.mark.timeout(120 if not LONG else 900)
def test_a_whole_fleet_returns_at_once() -> None:
    with site(beat="5s") as fleet:
        asyncio.run(_storm(fleet))


async def _storm(fleet: Site) -> None:
    line = Line()
    async with crowd(fleet, NODES, line) as nodes:
        first_s = await all_connected(nodes, 300)
        line.cut()
        await asyncio.sleep(CUT_S)
        assert not any(node.connected for node in nodes)
        enough = asyncio.Event()
        asking = asyncio.create_task(_ask(fleet, enough), name="GET /api/v1/nodes")
        line.mend()
        began = time.monotonic()
        connected_s = await all_connected(nodes, BACK_S)
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + BACK_S - connected_s):
            while await _online(fleet) < NODES:  # noqa: ASYNC110  # the server tells nobody here
                await asyncio.sleep(0.5)
        back_s = time.monotonic() - began
        enough.set()
        took = sorted(await asking)
    p50, p99 = took[len(took) // 2], took[min(len(took) - 1, int(len(took) * 0.99))]
    print(
        f"mass reconnect: {NODES} nodes, first connected in {first_s:.1f} s; cut for {CUT_S:g} s; all connected "
        f"{connected_s:.1f} s and online {back_s:.1f} s after; GET /api/v1/nodes p50 {p50:.3f} s, p99 {p99:.3f} s, "
        f"max {took[-1]:.3f} s over {len(took)}"
    )
    assert back_s <= BACK_S
    assert p99 < P99_S


async def _ask(fleet: Site, enough: asyncio.Event) -> list[float]:
    """Seconds of each answer while the storm lasts, in a thread: this loop is busy with being the nodes."""
    loop = asyncio.get_running_loop()

    def work() -> list[float]:
        took = []
        with httpx2.Client(base_url=fleet.client.server, headers=fleet.client.headers, trust_env=False) as http:
            while not enough.is_set():
                began = time.monotonic()
                assert http.get("/api/v1/nodes", timeout=30).status_code == 200
                took.append(time.monotonic() - began)
                time.sleep(0.05)
        return took

    return await loop.run_in_executor(None, work)


async def _online(fleet: Site) -> int:
    def count() -> int:
        return sum(item["status"]["state"] == "online" for item in fleet.client.items("/nodes"))

    return await asyncio.to_thread(count)
