"""From the ``model`` of an OpenAI request to what runs here: pure functions over a catalog made from the desired state.

``agent/<agent name>``, a deployment's name, or ``<model name>`` (``<model name>@<version>``). Where a bare name is both
a deployment and a model, the deployment wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from agentd.models.types import GenerateRequest, ModelKey
from slmfleet.v1 import state_pb2 as pb

DEFAULT_TIMEOUT_S = 120.0
DEFAULT_QUEUE_TIMEOUT_S = 30.0
DEFAULT_PRIORITY = 50
# Names in the answer to a request for an unknown one.
_MOST_LISTED = 20


@dataclass(frozen=True, slots=True)
class Target:
    """What a name stands for on this node. ``problem``: why it can't serve now, "" when it can."""

    assignment_id: str
    deployment: str
    model: str
    version: str
    agent: pb.AgentManifest | None
    key: ModelKey | None
    problem: str

    @property
    def gateway(self) -> bool:
        """Whether the gateway may call it. A bare model deployment has no device-side conversation to protect."""
        return self.agent is None or pb.EXPOSURE_GATEWAY in self.agent.expose

    @property
    def local(self) -> bool:
        """Whether programs on the device may call it."""
        return self.agent is None or pb.EXPOSURE_LOCAL in self.agent.expose


@dataclass(frozen=True, slots=True)
class Catalog:
    """All that this node can be asked for."""

    targets: Sequence[Target] = ()
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nothing here has that name (or the caller may not know of it)."""

    message: str


def build(
    document: pb.NodeDocument | None,
    chosen: Mapping[str, ModelKey],
    ready: Set[str],
    statuses: Sequence[pb.AssignmentStatus],
) -> Catalog:
    """The catalog of a desired state; ``chosen``, ``ready`` and ``statuses`` as in ``convergence.Plan``."""
    if document is None:
        return Catalog()
    messages = {
        status.id: condition.message
        for status in statuses for condition in status.conditions if condition.type == "Ready"
    }  # fmt: skip
    targets = [
        Target(
            assignment_id=item.id,
            deployment=item.deployment,
            model=item.model.name,
            version=item.model.version,
            agent=item.agent if item.HasField("agent") else None,
            key=chosen.get(item.id),
            problem="" if item.id in ready else messages.get(item.id) or "it is not ready",
        )
        for item in document.assignments
    ]
    return Catalog(tuple(targets), document.settings.drained)


def resolve(catalog: Catalog, name: str, *, relayed: bool) -> Target | Unknown:
    """What ``name`` stands for, for a caller on the device or (``relayed``) at the gateway. Ready ones come first."""
    visible = [target for target in catalog.targets if (target.gateway if relayed else target.local)]
    # A model that is here for an agent's sake may be called bare on the device, and nowhere else.
    models = [target for target in catalog.targets if target.agent is None or not relayed]
    if name.startswith("agent/"):
        wanted = name.removeprefix("agent/")
        found = [target for target in visible if target.agent is not None and target.agent.name == wanted]
        bare = False
    else:
        found = [target for target in visible if target.deployment == name]
        bare = not found
        if bare:
            found = [target for target in models if name in (target.model, f"{target.model}@{target.version}")]
    if not found:
        return Unknown(unknown(name, names(catalog, relayed)))
    best = min(found, key=lambda target: (bool(target.problem), target.deployment, target.assignment_id))
    return _without_agent(best) if bare else best


def unknown(name: str, known: Sequence[str]) -> str:
    """The sentence for a name that nothing has: with the nearest names, else with what there is."""
    import difflib  # only on this way

    name = name[:100]
    near = difflib.get_close_matches(name, known, 3)
    if near:
        return f"nothing on this node is called {name!r}: did you mean {' or '.join(map(repr, near))}?"
    listed = ", ".join(known[:_MOST_LISTED]) + (", ..." if len(known) > _MOST_LISTED else "")
    return f"nothing on this node is called {name!r}; it has: {listed or 'nothing yet'}"


def _without_agent(target: Target) -> Target:
    return Target(
        target.assignment_id, target.deployment, target.model, target.version, None, target.key, target.problem
    )


def names(catalog: Catalog, relayed: bool) -> list[str]:
    """Every name that ``resolve`` knows for that caller, sorted."""
    found = set()
    for target in catalog.targets:
        if target.gateway if relayed else target.local:
            found.add(target.deployment)
            if target.agent is not None:
                found.add(f"agent/{target.agent.name}")
        if target.agent is None or not relayed:
            found.add(target.model)
    return sorted(name for name in found if name)


def compose(target: Target, body: Mapping[str, Any], *, keep_alive_s: float | None = None) -> GenerateRequest:
    """The generation for a validated request: the agent's instructions first, the request's options over the agent's
    within its limits. ``target.key`` must be set. ``keep_alive_s``: the request's own wish."""
    assert target.key is not None
    agent = target.agent
    if agent is None:
        return GenerateRequest(
            target.key, body, DEFAULT_TIMEOUT_S, DEFAULT_QUEUE_TIMEOUT_S, DEFAULT_PRIORITY, keep_alive_s
        )
    merged = {**_agent_options(agent.options), **body}
    merged["messages"] = _with_instructions(agent.instructions, body["messages"])
    if agent.options.HasField("max_output_tokens"):
        # The agent's figure is a limit, not a wish: a request may only ask for less.
        merged["max_tokens"] = min(body.get("max_tokens", 2**31), agent.options.max_output_tokens)
    if keep_alive_s is None and agent.HasField("keep_alive_s"):
        keep_alive_s = agent.keep_alive_s
    stops = [*agent.options.stop_sequences, *body.get("stop", ())]
    if stops:
        merged["stop"] = list(dict.fromkeys(stops))
    return GenerateRequest(
        key=target.key,
        body=merged,
        timeout_s=agent.limits.timeout_s or DEFAULT_TIMEOUT_S,
        queue_timeout_s=agent.limits.queue_timeout_s or DEFAULT_QUEUE_TIMEOUT_S,
        priority=agent.priority or DEFAULT_PRIORITY,
        keep_alive_s=keep_alive_s,
    )


def _agent_options(options: pb.SamplingOptions) -> dict[str, Any]:
    scalars = ("temperature", "top_p", "top_k", "min_p", "seed")
    return {name: getattr(options, name) for name in scalars if options.HasField(name)}


def _with_instructions(instructions: str, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Instructions as the first system message. A system message of the request joins them: many chat templates take
    one, and only in front."""
    if not instructions:
        return list(messages)
    first = messages[0] if messages else {}
    if first.get("role") == "system":
        return [{"role": "system", "content": f"{instructions}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]
