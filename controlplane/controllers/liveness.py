"""Writes the verdict on each node: ``nodes.state``, an event for each change, a hint for those who follow the node."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from controlplane.controllers.base import Controller
from controlplane.controllers.leadership import Leadership
from controlplane.db import fleet, leaders
from controlplane.domain.liveness import LivenessPolicy, Verdict, assess
from slmfleet import logs

log = logs.get(__name__)


class LivenessController(Controller):
    """See ``controlplane/domain/liveness.py`` for what it decides.

    Load, plan and apply are one transaction here: the plan takes microseconds a node, and a verdict should not be
    older than it must be.
    """

    name = "liveness"

    def __init__(self, engine: AsyncEngine, leadership: Leadership, policy: LivenessPolicy) -> None:
        super().__init__(engine, leadership)
        self._policy = policy
        self.interval_s = policy.beat_s

    async def reconcile(self, epoch: int) -> float | None:
        """Assess every node; the next pass is due when time alone changes a verdict."""
        async with leaders.fenced(self._engine, self.name, epoch) as connection:
            now, nodes = await fleet.load_liveness(connection)
            verdicts = [(node, assess(now, self._policy, node.facts)) for node in nodes]
            changed = [pair for pair in verdicts if _differs(*pair)]
            if changed:
                await fleet.write_verdicts(connection, changed)
        for node, verdict in changed:
            if node.state is not verdict.state:
                log.info("node state", node=node.name, was=node.state, state=verdict.state, reason=verdict.reason)
        due = min((verdict.recheck_at for _, verdict in verdicts if verdict.recheck_at is not None), default=None)
        return None if due is None else due - now


def _differs(node: fleet.NodeFacts, verdict: Verdict) -> bool:
    return node.state is not verdict.state or node.reason != verdict.reason
