"""The long-lived tasks of the daemon: one that ends before it is told to is an error, as one that fails is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class PartEnded(Exception):
    """A part that must run until it is stopped returned."""


class Part:
    """One long-lived task. Made by ``start``."""

    def __init__(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> None:
        self._ending = False
        self.task = tasks.create_task(self._guard(work, name), name=name)

    async def _guard(self, work: Coroutine[Any, Any, None], name: str) -> None:
        await work
        if not self._ending:
            raise PartEnded(f"the part {name!r} ended by itself")

    async def end(self, grace_s: float = 0.0) -> None:
        """Stop it and wait until it is gone. With ``grace_s`` it was told to return in another way, and gets that long
        before it is cancelled."""
        await end_all([self], grace_s)


def start(tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> Part:
    """Run ``work`` as a part."""
    return Part(tasks, work, name)


async def end_all(parts: list[Part], grace_s: float = 0.0) -> None:
    """Stop several parts at once and wait until all are gone."""
    running = [part.task for part in parts]
    for part in parts:
        part._ending = True
    if grace_s:
        await asyncio.wait(running, timeout=grace_s)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
