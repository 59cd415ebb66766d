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
from agentd.models.measured import Measurement
from agentd.models.owner import Owner
from agentd.models.planner import Action, Budget, Evict, Holding, Load, Queue, Refuse, Wish, Yield, plan
from agentd.models.types import LoadableModel, ModelKey, ModelState
from slmfleet import logs

log = logs.get(__name__)
_LOOK_AGAIN_S = 2.0
# While something is loaded and nobody waits: other programs may need the memory.
_LOOK_AT_MEMORY_S = 5.0


@dataclass(slots=True)
class _Grant:
    memory_bytes: int
    mapped_bytes: int
    load_seconds: float
    # False until the owner has begun the load: such a grant goes with its wish.
    taken: bool = False


class Scheduler:
    """The Broker of all owners."""

    def __init__(self, owners: Mapping[ModelKey, Owner], budget: Callable[[], Budget]) -> None:
        self._owners = owners
        self._budget = budget
        self._wishes: dict[ModelKey, Wish] = {}
        # The number that the owner gave its newest wish.
        self._numbers: dict[ModelKey, int] = {}
        self._prepared: dict[ModelKey, Prepared] = {}
        self._grants: dict[ModelKey, _Grant] = {}
        # What models took when they were loaded last: better than any estimate.
        self._measured: dict[ModelKey, Measurement] = {}
        self._asked_to_go: set[ModelKey] = set()
        self._waiting_reasons: dict[ModelKey, str] = {}
        self._wake = asyncio.Event()
        self._probes: list[asyncio.Future[None]] = []

    # The Broker.

    def want(self, model: LoadableModel, prepared: Prepared, wish: int) -> None:
        measured = self._measured.get(model.key)
        known = measured is not None and measured.shape == prepared.shape
        self._prepared[model.key] = prepared
        self._numbers[model.key] = wish
        self._wishes[model.key] = Wish(
            key=model.key,
            memory_bytes=measured.memory_bytes if measured and known else prepared.estimate.total,
            asked_at_s=asyncio.get_running_loop().time(),
            priority=model.priority,
            explanation="as measured at its last load" if known else str(prepared.estimate),
        )
        self._wake.set()

    def unwant(self, model: LoadableModel) -> None:
        self._wishes.pop(model.key, None)
        self._waiting_reasons.pop(model.key, None)
        grant = self._grants.get(model.key)
        if grant is not None and not grant.taken:
            del self._grants[model.key]
        self._wake.set()

    def taken(self, model: LoadableModel) -> None:
        self._grants[model.key].taken = True

    def correct(self, model: LoadableModel, memory_bytes: int, load_seconds: float) -> None:
        grant, prepared = self._grants.get(model.key), self._prepared.get(model.key)
        if grant is None or prepared is None or not memory_bytes:
            return
        before = self._measured.get(model.key)
        peak = max(memory_bytes, before.memory_bytes if before and before.shape == prepared.shape else 0)
        self._measured[model.key] = Measurement(prepared.shape, peak, load_seconds)
        if peak > grant.memory_bytes:
            grant.memory_bytes = peak
            self._wake.set()
        grant.load_seconds = load_seconds

    def release(self, model: LoadableModel) -> None:
        self._grants.pop(model.key, None)
        self._asked_to_go.discard(model.key)
        self._wake.set()

    def declined(self, model: LoadableModel) -> None:
        self._asked_to_go.discard(model.key)
        self._wake.set()

    def changed(self) -> None:
        self._wake.set()

    def forget(self, key: ModelKey) -> None:
        """Its owner is gone, and with it its worker: nothing may be left in the books."""
        for book in (self._wishes, self._numbers, self._prepared, self._grants, self._waiting_reasons):
            book.pop(key, None)
        self._asked_to_go.discard(key)
        self._wake.set()

    def remember(self, measured: Mapping[ModelKey, Measurement]) -> None:
        """What was measured in an earlier life; what was in this one counts more."""
        self._measured.update({key: m for key, m in measured.items() if key not in self._measured})

    @property
    def measured(self) -> Mapping[ModelKey, Measurement]:
        """What every model took that was loaded, in this life or an earlier one."""
        return self._measured

    # The loop.

    async def run(self) -> None:
        """Plan and apply after each change, until cancelled."""
        while True:
            timeout = _LOOK_AGAIN_S if self._wishes else _LOOK_AT_MEMORY_S if self._grants else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            self._wake.clear()
            if self._wishes or self._grants:
                self._plan(asyncio.get_running_loop().time())
            for answer in self._probes:
                if not answer.done():
                    answer.set_result(None)
            self._probes.clear()

    def _plan(self, now: float) -> None:
        try:
            budget = self._budget()
        except OSError:
            # Out of file descriptors, say. Owners and requests go on; the timer tries again.
            log.error("cannot read how much memory there is", exc_info=True)
            return
        for action in plan(self._holdings(), tuple(self._wishes.values()), budget, now):
            self._apply(action)

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
        if owner is None or owner.ended:
            self._wishes.pop(action.key, None)
            return
        match action:
            case Load(key, memory_bytes, reason):
                del self._wishes[key]
                self._waiting_reasons.pop(key, None)
                load_seconds = self._measured[key].load_seconds if key in self._measured else 1.0
                self._grants[key] = _Grant(memory_bytes, self._prepared[key].mapped_bytes, load_seconds)
                log.info("plan: load", model=str(key), reason=reason)
                owner.post(on.Granted(self._numbers[key]))
            case Evict(key, reason):
                self._asked_to_go.add(key)
                log.info("plan: evict", model=str(key), reason=reason)
                owner.post(on.Evict(reason))
            case Yield(key, reason):
                self._asked_to_go.add(key)
                log.info("plan: yield", model=str(key), reason=reason)
                owner.post(on.Yield(reason))
            case Queue(key, reason):
                if self._waiting_reasons.get(key) != reason:
                    self._waiting_reasons[key] = reason
                    log.info("plan: queue", model=str(key), reason=reason)
            case Refuse(key, reason):
                del self._wishes[key]
                self._waiting_reasons.pop(key, None)
                log.warning("plan: refuse", model=str(key), reason=reason)
                owner.post(on.Denied(self._numbers[key], reason))
