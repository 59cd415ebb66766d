"""The offline matrix of Azure IoT Edge's connectivity tests: cut the line, bring it back, again and again; every row is
numbered and a third party counts.

Minutes are compressed: see ``docs/reliability.md`` for the forms and how to run them.
"""

from __future__ import annotations

import threading

import pytest

from tests.reliability.counting import stored
from tests.reliability.forms import FORM, LONG
from tests.reliability.site import MODEL, Site, site
from tests.support import netns
from tests.support.processes import wait_until

pytestmark = [pytest.mark.postgres, pytest.mark.mqtt, pytest.mark.system]

# (minutes off, minutes on, runs)
MATRIX = ((5, 5, 5), (10, 10, 3), (15, 15, 3), (30, 30, 2), (5, 20, 3))
SPEED = {"": 300, "short": 60, "real": 1}[FORM]
ROWS = MATRIX if LONG else ((10, 5, 1),)


@pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())
@pytest.mark.timeout(180 if not LONG else 60 * 60 * 10)
def test_nothing_is_lost_or_counted_twice_over_the_matrix() -> None:
    with netns.network() as net, site(net.address) as fleet:
        node = fleet.add_node("edge-1", net.join())
        fleet.serve_model()
        changes = 0
        with node.asker().all_along(MODEL) as asked:
            for off, on, runs in ROWS:
                for _ in range(runs):
                    changes += 1
                    _one_cut(fleet, off * 60 / SPEED, on * 60 / SPEED, changes)
            took_s = fleet.await_agreement()
            newest = f"while-away-{changes}"
            wait_until(lambda: node.name in fleet.warm(newest), f"{newest} is served", 60)
            assert node.asker().ask(newest) == "w0 w1 w2 "
            fleet.await_rows(node)
            numbered = dict(node.numbered.last)
        node.stop()
        found = stored(fleet.postgres_url, node.id, node.name, numbered)
        print(
            f"matrix: {changes} cuts at {SPEED}x, {sum(numbered.values())} rows numbered, {found.rows} stored, "
            f"{asked.answered} local answers, slowest {asked.slowest_s:.2f} s, agreed {took_s:.1f} s after the last"
        )
        assert found.dropped == 0
        assert found.twice == []
        assert asked.failures == []
        assert asked.answered > changes


def _one_cut(fleet: Site, off_s: float, on_s: float, number: int) -> None:
    """Cut, change what the node should run, mend, and let it have the line for a while."""
    node = fleet.nodes["edge-1"]
    assert node.member is not None
    pause = threading.Event()
    node.member.cut()
    fleet.deploy(f"while-away-{number}")
    pause.wait(off_s)
    node.member.mend()
    pause.wait(on_s)
