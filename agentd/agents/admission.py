"""How many requests of one agent run and wait: its own limits, before the model host is asked."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agentd.device.clock import boottime_s
from agentd.models.types import Refused
from slmfleet.v1 import state_pb2 as pb

_SMOOTHING = 0.3


def retry_after_s(ahead: int, places: int, usual_s: float) -> float:
    """When a place may be free: the requests ahead, shared by the places, at their usual length; 1 to 60 s."""
    return float(min(60, max(1, math.ceil(ahead / max(places, 1) * usual_s))))


class _Gate:
    """Places of one agent. A place that is freed goes to the first in the queue, so nobody overtakes."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.usual_s = 5.0

    def leave(self, took_s: float) -> None:
        self.usual_s += _SMOOTHING * (took_s - self.usual_s)
        self.running -= 1
        while self.waiting:
            first = self.waiting.popleft()
            if not first.done():
                self.running += 1
                first.set_result(None)
                return


class Admission:
    """Gates by agent name."""

    def __init__(self) -> None:
        self._gates: dict[str, _Gate] = {}

    @asynccontextmanager
    async def place(self, agent: pb.AgentManifest | None) -> AsyncIterator[float]:
        """Hold a place while a request runs; gives the seconds that it waited. Raises Refused (429).

        No agent, or a limit of 0, means no limit here.
        """
        if agent is None or not agent.limits.max_concurrent:
            yield 0.0
            return
        gate = self._gates.setdefault(agent.name, _Gate())
        began_s = boottime_s()
        await self._enter(gate, agent)
        entered_s = boottime_s()
        try:
            yield entered_s - began_s
        finally:
            gate.leave(boottime_s() - entered_s)

    async def _enter(self, gate: _Gate, agent: pb.AgentManifest) -> None:
        limits = agent.limits
        if gate.running < limits.max_concurrent and not gate.waiting:
            gate.running += 1
            return
        hint_s = retry_after_s(len(gate.waiting) + 1, limits.max_concurrent, gate.usual_s)
        if len(gate.waiting) >= limits.max_queued:
            raise Refused(
                429,
                "agent_queue_full",
                f"the agent {agent.name!r} serves {gate.running} requests and {len(gate.waiting)} wait (the most that "
                "its limits allow): try again later",
                hint_s,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        gate.waiting.append(turn)
        try:
            async with asyncio.timeout(limits.queue_timeout_s or None):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # The place was handed over at the moment we gave up: hand it on.
                gate.leave(gate.usual_s)
            turn.cancel()
            if isinstance(error, TimeoutError):
                raise Refused(
                    429, "agent_queue_timeout",
                    f"no place at the agent {agent.name!r} became free within {limits.queue_timeout_s:g} s", hint_s,
                ) from None  # fmt: skip
            raise
