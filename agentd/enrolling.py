"""Enrolment on the way to ``agentd run``: a child process does it, so that the daemon never carries its libraries."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable

from agentd.config import Config
from agentd.identity.files import Identity, load
from agentd.session.backoff import reconnect_delay_s
from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)

# Exit code of `agentd enroll` when the server can't be reached (EX_TEMPFAIL of sysexits.h).
UNREACHABLE = 75
CHILD_TIMEOUT_S = 120.0


async def ensure_enrolled(config: Config, tell: Callable[[str], None]) -> Identity:
    """The node's identity, after an enrolment where there is none yet.

    Waits for a server that can't be reached, for ever, telling ``tell`` before each attempt. Raises UserError when
    there is nothing to enrol with, or the server refuses.
    """
    identity = load(config.state_dir)
    failures = 0
    while identity is None:
        if not config.server or not config.token_file:
            raise UserError(
                f"this node is not enrolled (no identity in {config.state_dir}): run `agentd enroll --server host:port "
                "--token-file FILE`, or set server and token_file in the configuration"
            )
        tell(f"enrolling at {config.server}")
        code, said = await _enroll_in_child(config)
        if code not in (0, UNREACHABLE):
            raise UserError(said)
        if code == UNREACHABLE:
            failures += 1
            delay_s = reconnect_delay_s(failures + 1, random.random())
            log.warning("cannot enrol yet", reason=said, failures=failures, next_try_s=round(delay_s, 1))
            await asyncio.sleep(delay_s)
        identity = load(config.state_dir)
    return identity


async def _enroll_in_child(config: Config) -> tuple[int, str]:
    arguments = ["--state-dir", str(config.state_dir), "--server", config.server, "--token-file", config.token_file,
                 "--name", config.name]  # fmt: skip
    if config.labels:
        arguments += ["--labels", ",".join(f"{key}={value}" for key, value in config.labels.items())]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agentd", "enroll", "--under-lock", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CHILD_TIMEOUT_S):
            _, said = await child.communicate()
    except TimeoutError:
        return UNREACHABLE, f"{config.server} did not answer within {CHILD_TIMEOUT_S:g} s"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    sentence = said.decode(errors="replace").strip().removeprefix("agentd: ")
    return child.returncode or 0, sentence[-500:]
