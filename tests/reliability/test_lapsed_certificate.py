"""A certificate that ran out while the node was offline: it serves all the while, and renews by itself on return."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from agentd.identity.files import load
from tests.integration.agentd.test_agentd_daemon import document
from tests.reliability.asking import Asker
from tests.reliability.forms import long_only
from tests.support.fake_controlplane import FakeControlPlane, desired_state
from tests.support.processes import Child, free_port

pytestmark = [pytest.mark.system, long_only]

LIFE_S = 6.0
# Back-off of at most 30 s, and the renewal itself.
BACK_S = 60.0


@pytest.mark.timeout(150)
def test_a_certificate_that_ran_out_is_renewed_on_return(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeControlPlane(tmp_path) as plane:
            await plane.enrol(tmp_path / "state")
            plane.desired = desired_state(document(plane), 1)
            plane.certificate_days = LIFE_S / 86400
            port = free_port()
            arguments = ["run", "--state-dir", tmp_path / "state", "--api-listen", f"127.0.0.1:{port}"]
            with Child([sys.executable, "-m", "tests.support.fake_host", *arguments]) as child:
                asker = Asker(("127.0.0.1", port), None)
                link = await plane.connection()
                await link.condition("a1", "Warm", reason="Loaded")
                await _shorten(plane, tmp_path / "state")
                child.process.kill()
                child.wait_for_exit()
            with Child([sys.executable, "-m", "tests.support.fake_host", *arguments]) as child:
                child.wait_for_line(" ready api=")
                lapsed = load(tmp_path / "state")
                assert lapsed is not None
                await plane.stop_servers()
                with asker.all_along("shop") as asked:
                    await asyncio.sleep(max(0.0, lapsed.not_after_s - time.time()) + 1.0)
                    assert (await asyncio.to_thread(asker.status))["connected"] is False
                    plane.certificate_days = 30.0
                    before = len(plane.connections.items)
                    began = time.monotonic()
                    await plane.start_servers()
                    await plane.connections.wait(lambda _: True, after=before, timeout_s=BACK_S)
                    back_s = time.monotonic() - began
                renewed = load(tmp_path / "state")
                assert renewed is not None
                assert renewed.not_after_s > time.time() + 86400
                assert asked.failures == []
                assert asked.answered > 10
                print(
                    f"lapsed certificate: back {back_s:.1f} s after the control plane, {asked.answered} local answers"
                )

    asyncio.run(test())


async def _shorten(plane: FakeControlPlane, state: Path) -> None:
    """Renew now, for the short life that the control plane gives."""
    from agentd.identity.enroll import renew

    await asyncio.to_thread(renew, state)
