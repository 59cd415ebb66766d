"""The daemon's side of renewal: know when, start the child that does it, try again when it fails."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable
from pathlib import Path

from agentd.identity.files import Identity, load, renewal_at
from agentd.session.backoff import reconnect_delay_s
from slmfleet import logs
from slmfleet.config import parse_address
from slmfleet.errors import UserError

log = logs.get(__name__)

# The wall clock may jump, and the deadline with it: look again at least this often.
LONGEST_SLEEP_S = 3600.0
CHILD_TIMEOUT_S = 120.0
REACH_S = 5.0


def retry_delay_s(failures: int, chance: float, left_s: float, reached: bool) -> float:
    """Seconds until the next attempt, after so many in a row that were refused (``reached``) or met nobody.

    One minute, doubling up to an hour, with a quarter of jitter, but not past the certificate's end, ``left_s`` from
    now. After that no session can tell that the control plane is back, so a node that meets nobody looks as often as a
    session would. ``chance`` is in [0, 1).
    """
    if left_s <= 0 and not reached:
        return max(1.0, reconnect_delay_s(failures, chance))
    delay_s = float(min(3600, 60 * 2 ** min(failures - 1, 6))) * (0.75 + 0.5 * chance)
    return min(delay_s, left_s) if left_s > 0 else delay_s


def next_look_s(now_s: float, identity: Identity) -> float:
    """Seconds until the next look; 0 when renewal is due."""
    return min(max(renewal_at(identity.not_before_s, identity.not_after_s) - now_s, 0.0), LONGEST_SLEEP_S)


async def reachable(address: str) -> bool:
    """Whether something accepts connections there: much cheaper to find out than by a child that tries to renew."""
    try:
        host, port = parse_address(address)
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, ValueError):
        return False
    writer.close()
    return True


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
    reached = True
    while True:
        identity = load(state_dir)
        if identity is None:
            raise UserError(f"the identity in {state_dir} is gone: enrol the node again")
        wait_s = next_look_s(clock(), identity)
        if wait_s > 0:
            await asyncio.sleep(wait_s)
            continue
        where, had_reached = identity.endpoints.enrollment, reached
        reached = await reachable(where)
        problem = await renew_in_child(state_dir) if reached else f"{where} is out of reach"
        if problem:
            # Attempts that met nobody are another count than those that were refused.
            failures = failures + 1 if reached == had_reached else 1
            # The first failure in a row and then each doubling: a month offline must not fill the log.
            if failures & (failures - 1) == 0:
                log.warning("certificate not renewed", reason=problem, failures=failures, expires=identity.not_after_s)
            await asyncio.sleep(retry_delay_s(failures, random.random(), identity.not_after_s - clock(), reached))
            continue
        failures = 0
        fresh = load(state_dir)
        if fresh is not None:
            log.info("certificate renewed", expires=fresh.not_after_s)
            renewed(fresh)
        # Whatever life the server gives its certificates: no loop without a pause.
        await asyncio.sleep(1.0)
