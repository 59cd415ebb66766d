"""``kill -9`` of agentd, control plane, broker and PostgreSQL at random points: nothing lost, nothing twice, converges.

Every run draws a victim, a moment and how long it stays dead from a fixed seed. After every ``BATCH`` runs the fleet
must agree again and the third party counts; a failure names the seed and the kills since the last count.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
from collections import Counter

import pytest

from tests.reliability.forms import LONG
from tests.reliability.site import MODEL, Site, quietly, site
from tests.support.processes import wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt, pytest.mark.system]

RUNS = int(os.environ.get("SLMFLEET_KILLS", "200" if LONG else "4"))
SEED = int(os.environ.get("SLMFLEET_SEED", "1"))
BATCH = 10 if LONG else 4
VICTIMS = ("agentd", "controlplane", "broker", "postgres")
LONGEST_LIFE_S = 1.5
LONGEST_DEATH_S = 1.0


@pytest.mark.timeout(120 if not LONG else 60 * RUNS)
def test_whatever_is_killed_nothing_is_lost_and_all_converges() -> None:
    chance = random.Random(SEED)
    kills: Counter[str] = Counter()
    took: list[float] = []
    with site() as fleet:
        node = fleet.add_node("edge-1")
        fleet.serve_model()
        told: list[str] = []
        for run in range(1, RUNS + 1):
            # Each of the four in turn, in an order by chance: a short form meets all of them too.
            if run % len(VICTIMS) == 1:
                order = chance.sample(VICTIMS, len(VICTIMS))
            victim = order[(run - 1) % len(VICTIMS)]
            moment_s, dead_s = chance.uniform(0, LONGEST_LIFE_S), chance.uniform(0, LONGEST_DEATH_S)
            told.append(f"run {run}: {victim} after {moment_s:.3f} s, dead for {dead_s:.3f} s")
            _change(fleet, run)
            threading.Event().wait(moment_s)
            _kill(fleet, victim, dead_s)
            kills[victim] += 1
            if run % BATCH == 0 or run == RUNS:
                story = f"seed {SEED}; " + "; ".join(told)
                took.append(_settle(fleet, story))
                told.clear()
        found = fleet.await_rows(node)
        numbered = node.numbered.last
    print(
        f"kills: {RUNS} with seed {SEED} ({dict(kills)}), {sum(numbered.values())} rows in {len(numbered)} numberings, "
        f"{found.rows} stored, {found.dropped} dropped, {len(found.twice)} twice; "
        f"settled in {statistics.median(took):.1f} s (median), {max(took):.1f} s (longest)"
    )


def _change(fleet: Site, number: int) -> None:
    """A change of desired state, which the kill may meet anywhere on its way."""
    quietly(lambda: fleet.deploy(f"round-{number % 3}-{number % 2}"))
    if number % 3 == 0:
        quietly(lambda: fleet.client.call("DELETE", f"/deployments/round-{(number + 1) % 3}-{number % 2}"))


def _kill(fleet: Site, victim: str, dead_s: float) -> None:
    pause = threading.Event()
    match victim:
        case "agentd":
            node = fleet.nodes["edge-1"]
            node.kill()
            pause.wait(dead_s)
            node.start(wait=False)
        case "controlplane":
            fleet.kill_server()
            pause.wait(dead_s)
            fleet.start_server(wait=False)
        case "broker":
            fleet.kill_broker()
            pause.wait(dead_s)
            fleet.broker.start()
        case "postgres":
            fleet.kill_postgres()
            pause.wait(dead_s)
            fleet.postgres.start()


def _settle(fleet: Site, story: str) -> float:
    """Everybody agrees, the model answers, and the numbers are right; how long the agreement took, in seconds."""
    node = fleet.nodes["edge-1"]
    try:
        took_s = fleet.await_agreement()
        wait_until(lambda: quietly(lambda: node.asker().ask(MODEL)) == "w0 w1 w2 ", "the node serves", 60)
        found = fleet.await_rows(node)
        assert found.twice == []
        assert found.dropped == 0
    except AssertionError as error:
        raise AssertionError(f"{story}\n{error}\n{fleet.story(node)}") from None
    return took_s
