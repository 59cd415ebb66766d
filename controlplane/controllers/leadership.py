"""Holds the lead of one controller: elected through a row in Postgres, renewed at a third of the lease."""

from __future__ import annotations

import asyncio
import contextlib
import time

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.db import leaders
from slmfleet import logs

log = logs.get(__name__)
# What a database that is away, or that restarts, raises.
DATABASE_AWAY = (OSError, sa.exc.InterfaceError, sa.exc.OperationalError, sa.exc.TimeoutError)


class Leadership:
    """``epoch`` is the one that this process was elected with, or None. Advisory: only ``leaders.fenced`` decides."""

    def __init__(self, engine: AsyncEngine, name: str, holder: str, lease_s: float) -> None:
        self.name = name
        self.epoch: int | None = None
        self._engine = engine
        self._holder = holder
        self._lease_s = lease_s
        self._valid_until = 0.0
        self._held = asyncio.Event()
        self._look_again = asyncio.Event()

    async def held(self) -> int:
        """The epoch, as soon as this process leads."""
        while self.epoch is None:
            await self._held.wait()
        return self.epoch

    def lost(self, epoch: int) -> None:
        """A fenced write with ``epoch`` found another leader: look at once who leads."""
        if epoch == self.epoch:
            self._set(None)
        self._look_again.set()

    async def run(self) -> None:
        """Stand for election until cancelled; then let go at once, so that nobody waits for the lease to end."""
        try:
            while True:
                await self._elect()
                self._look_again.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._lease_s / 3):
                        await self._look_again.wait()
        finally:
            await self._release()

    async def _elect(self) -> None:
        asked = time.monotonic()
        try:
            async with self._engine.begin() as connection:
                epoch = await leaders.acquire(connection, self.name, self._holder, self._lease_s, self.epoch)
        except DATABASE_AWAY as error:
            log.warning("cannot renew a lead", controller=self.name, error=error)
            if asked >= self._valid_until:
                self._set(None)
            return
        self._valid_until = asked + self._lease_s
        self._set(epoch)

    def _set(self, epoch: int | None) -> None:
        if epoch != self.epoch:
            log.info("leads" if epoch is not None else "leads no longer", controller=self.name, epoch=epoch)
        self.epoch = epoch
        if epoch is None:
            self._held.clear()
        else:
            self._held.set()

    async def _release(self) -> None:
        epoch = self.epoch
        if epoch is None:
            return
        self._set(None)
        with contextlib.suppress(TimeoutError, *DATABASE_AWAY):
            async with asyncio.timeout(2.0):
                async with self._engine.begin() as connection:
                    await leaders.release(connection, self.name, epoch)
