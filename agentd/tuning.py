"""The bounds of the model host that change while it runs: the control plane's settings of this node, and the power
profile's. Each only tightens what the node's own configuration allows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from agentd.device import power
from agentd.device.power import Choice, Readings
from agentd.models.settings import Tuning, tightest
from agentd.telemetry.events import EventLog
from slmfleet import logs
from slmfleet.v1 import state_pb2 as pb

log = logs.get(__name__)
LOOK_EVERY_S = 15.0


class Tunable(Protocol):
    """What is asked of the model host."""

    def tune(self, tuning: Tuning) -> None:
        """Bounds from now on."""
        ...


def combine(settings: pb.NodeSettings | None, profile: Tuning) -> Tuning:
    """The tighter one of each bound. Pure."""
    told = settings or pb.NodeSettings()
    return Tuning(
        max_memory_bytes=tightest(told.max_memory_bytes, profile.max_memory_bytes),
        max_loaded_models=tightest(told.max_loaded_models, profile.max_loaded_models),
        max_concurrent=tightest(told.max_concurrent_agents, profile.max_concurrent),
        keep_alive_cap_s=profile.keep_alive_cap_s,
        threads=profile.threads,
        slots=profile.slots,
    )


class Tuner:
    """Looks at the device and the desired state, and tells the host."""

    def __init__(
        self,
        host: Tunable,
        settings: Callable[[], pb.NodeSettings | None],
        events: EventLog,
        read: Callable[[], Readings],
        setting: str,
        threads: int,
    ) -> None:
        self._host = host
        self._settings = settings
        self._events = events
        self._read = read
        self._setting = setting
        self._threads = threads
        self.choice = power.choose(setting, Readings())

    def apply(self) -> None:
        """The desired state may have changed: nothing is read of the device."""
        self._host.tune(combine(self._settings(), power.tuning(self.choice.profile, self._threads)))

    async def look(self) -> Choice:
        """Read, choose, tell the host."""
        before = self.choice
        if self._setting == "auto":
            self.choice = power.choose("auto", await asyncio.to_thread(self._read), before.profile)
        self.apply()
        if self.choice.profile is not before.profile:
            log.info("power profile", profile=self.choice.profile.value, reason=self.choice.reason)
            message = f"the power profile is {self.choice.profile.value} now: {self.choice.reason}"
            await self._events.record("info", "PowerProfile", message)
        return self.choice

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)
