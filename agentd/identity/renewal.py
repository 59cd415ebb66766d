"""The daemon's side of renewal: know when, start the child that does it, try again when it fails."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable
from pathlib import Path

from agentd.identity.files import Identity, load, renewal_at
from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)

# The wall clock may jump, and the deadline with it: look again at least this often.
LONGEST_SLEEP_S = 3600.0
CHILD_TIMEOUT_S = 120.0


def retry_delay_s(failures: int, chance: float) -> float:
    """One minute, doubling up to an hour, with a quarter of jitter; ``chance`` is in [0, 1)."""
    return float(min(3600, 60 * 2 ** min(failures - 1, 6))) * (0.75 + 0.5 * chance)


def next_look_s(now_s: float, identity: Identity) -> float:
    """Seconds until the next look; 0 when renewal is due."""
    return min(max(renewal_at(identity.not_before_s, identity.not_after_s) - now_s, 0.0), LONGEST_SLEEP_S)


async def renew_in_child(state_dir: Path) -> str:
    """Renew; "" on success, else the sentence that says why not."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agentd.identity.renew",
        str(state_dir),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            _, said = await child.communicate()
    except TimeoutError:
        return f"no answer within {CHILD_TIMEOUT_S:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return "" if child.returncode == 0 else said.decode(errors="replace").strip()[-500:] or "the renewal ended badly"


async def keep_renewed(state_dir: Path, clock: Callable[[], float], renewed: Callable[[Identity], None]) -> None:
    """Renew for ever; ``renewed`` is called with each new identity. ``clock``: seconds since 1970."""
    failures = 0
    while True:
        identity = load(state_dir)
        if identity is None:
            raise UserError(f"the identity in {state_dir} is gone: enrol the node again")
        wait_s = next_look_s(clock(), identity)
        if wait_s > 0:
            await asyncio.sleep(wait_s)
            continue
        problem = await renew_in_child(state_dir)
        if problem:
            failures += 1
            log.warning("certificate not renewed", reason=problem, failures=failures, expires=identity.not_after_s)
            await asyncio.sleep(retry_delay_s(failures, random.random()))
            continue
        failures = 0
        fresh = load(state_dir)
        if fresh is not None:
            log.info("certificate renewed", expires=fresh.not_after_s)
            renewed(fresh)
        # Whatever life the server gives its certificates: no loop without a pause.
        await asyncio.sleep(1.0)
