"""Runs the parts of a program: started in order, stopped in the reverse order, and none may end by itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from slmfleet import logs
from slmfleet.errors import UserError

log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Service:
    """A part that runs until it is cancelled, and may take ``stop_s`` seconds to end then."""

    name: str
    run: Callable[[], Awaitable[object]]
    stop_s: float = 10.0


async def run_services(services: Sequence[Service], started: Callable[[], None], stop: asyncio.Event) -> None:
    """Run until ``stop``; ``started`` is called once all of them had their first turn.

    A part that fails or returns ends the others and is raised (as an ExceptionGroup).
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_for_ever(service), name=service.name) for service in services]
        # One turn of the loop: each task is at its first wait, or has failed.
        await asyncio.sleep(0)
        started()
        await stop.wait()
        log.info("stopping")
        for service, task in reversed(list(zip(services, tasks, strict=True))):
            task.cancel()
            began = time.monotonic()
            done, _ = await asyncio.wait([task], timeout=service.stop_s)
            log.debug("a part stopped", part=service.name, seconds=round(time.monotonic() - began, 3))
            if not done:
                log.warning("a part does not stop in time", part=service.name, waited_s=service.stop_s)


async def _for_ever(service: Service) -> None:
    await service.run()
    raise UserError(f"the part {service.name} ended by itself; this is a bug of the control plane, see its log")


def stop_on_signals(stop: asyncio.Event) -> None:
    """SIGINT or SIGTERM sets ``stop``; a second one ends the program at once."""
    loop = asyncio.get_running_loop()

    def ask() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
