"""The thin loop around the planner: it alone holds the books of granted memory.

Owners write wishes and releases into it; each change wakes it; it plans and tells the owners. A timer stands behind
the wake-ups while anybody waits, because other programs free memory without telling.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentd.models import events as on
from agentd.models.launcher import Prepared
from agentd.models.owner import Owner
from agentd.models.planner import Action, Budget, Evict, Holding, Load, Queue, Refuse, Wish, plan
from agentd.models.types import LoadableModel, ModelKey, ModelState
from slmfleet import logs

log = logs.get(__name__)
_LOOK_AGAIN_S = 2.0


@dataclass(slots=True)
class _Grant:
    memory_bytes: int
    mapped_bytes: int
    load_seconds: float


class Scheduler:
    """The Broker of all owners."""

    def __init__(self, owners: Mapping[ModelKey, Owner], budget: Callable[[], Budget]) -> None:
        self._owners = owners
        self._budget = budget
        self._wishes: dict[ModelKey, Wish] = {}
        self._prepared: dict[ModelKey, Prepared] = {}
        self._grants: dict[ModelKey, _Grant] = {}
        # What models took when they were loaded last: better than any estimate.
        self._measured: dict[ModelKey, tuple[int, int, float]] = {}
        self._asked_to_go: set[ModelKey] = set()
        self._waiting_reasons: dict[ModelKey, str] = {}
        self._wake = asyncio.Event()
        self._probes: list[asyncio.Future[None]] = []

    # The Broker.

    def want(self, model: LoadableModel, prepared: Prepared) -> None:
        if model.key in self._wishes:
            return
        context, measured, _ = self._measured.get(model.key, (0, 0, 0.0))
        fresh = prepared.context_tokens != context or not measured
        memory = prepared.estimate.total if fresh else measured
        self._prepared[model.key] = prepared
        self._wishes[model.key] = Wish(
            key=model.key,
            memory_bytes=memory,
            asked_at_s=asyncio.get_running_loop().time(),
            priority=model.priority,
            explanation=str(prepared.estimate) if fresh else "as measured at its last load",
        )
        self._wake.set()

    def unwant(self, model: LoadableModel) -> None:
        self._wishes.pop(model.key, None)
        self._waiting_reasons.pop(model.key, None)
        self._wake.set()

    def correct(self, model: LoadableModel, memory_bytes: int, load_seconds: float) -> None:
        grant, prepared = self._grants.get(model.key), self._prepared.get(model.key)
        if grant is None or prepared is None or not memory_bytes:
            return
        _, before, _ = self._measured.get(model.key, (0, 0, 0.0))
        peak = max(before, memory_bytes)
        self._measured[model.key] = (prepared.context_tokens, peak, load_seconds)
        grant.memory_bytes, grant.load_seconds = max(grant.memory_bytes, peak), load_seconds

    def release(self, model: LoadableModel) -> None:
        self._grants.pop(model.key, None)
        self._asked_to_go.discard(model.key)
        self._wake.set()

    def changed(self) -> None:
        self._asked_to_go.clear()
        self._wake.set()

    # The loop.

    async def run(self) -> None:
        """Plan and apply after each change, until cancelled."""
        while True:
            timeout = _LOOK_AGAIN_S if self._wishes else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            self._wake.clear()
            if self._wishes:
                now = asyncio.get_running_loop().time()
                for action in plan(self._holdings(), tuple(self._wishes.values()), self._budget(), now):
                    self._apply(action)
            for answer in self._probes:
                if not answer.done():
                    answer.set_result(None)
            self._probes.clear()

    def probe(self) -> asyncio.Future[None]:
        """Done when the loop has gone round once more."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._probes.append(answer)
        self._wake.set()
        return answer

    def granted_bytes(self) -> int:
        """Memory that is granted to workers now."""
        return sum(grant.memory_bytes for grant in self._grants.values())

    def _holdings(self) -> list[Holding]:
        return [self._holding(key, grant) for key, grant in self._grants.items()]

    def _holding(self, key: ModelKey, grant: _Grant) -> Holding:
        owner = self._owners.get(key)
        state = owner.state if owner else ModelState.STOPPING
        if key in self._asked_to_go:
            state = ModelState.STOPPING
        elif state in (ModelState.UNLOADED, ModelState.BACKING_OFF):
            # Granted, and its owner has not got round to it.
            state = ModelState.LOADING
        return Holding(
            key=key,
            memory_bytes=grant.memory_bytes,
            state=state,
            mapped_bytes=grant.mapped_bytes,
            references=owner.references if owner else 0,
            pinned=owner.model.warm if owner else False,
            priority=owner.model.priority if owner else 0,
            last_used_s=owner.last_used_s if owner else 0.0,
            load_seconds=grant.load_seconds,
        )

    def _apply(self, action: Action) -> None:
        owner = self._owners.get(action.key)
        if owner is None:
            self._wishes.pop(action.key, None)
            return
        match action:
            case Load(key, memory_bytes, reason):
                del self._wishes[key]
                self._waiting_reasons.pop(key, None)
                _, _, load_seconds = self._measured.get(key, (0, 0, 1.0))
                self._grants[key] = _Grant(memory_bytes, self._prepared[key].mapped_bytes, load_seconds)
                log.info("plan: load", model=str(key), reason=reason)
                owner.post(on.Granted())
            case Evict(key, reason):
                self._asked_to_go.add(key)
                log.info("plan: evict", model=str(key), reason=reason)
                owner.post(on.Evict(reason))
            case Queue(key, reason):
                if self._waiting_reasons.get(key) != reason:
                    self._waiting_reasons[key] = reason
                    log.info("plan: queue", model=str(key), reason=reason)
            case Refuse(key, reason):
                del self._wishes[key]
                self._waiting_reasons.pop(key, None)
                log.warning("plan: refuse", model=str(key), reason=reason)
                owner.post(on.Denied(reason))
