"""The models that the host may load from now on, with what agents and settings ask of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agentd.convergence.facts import (
    Limits,
)
from agentd.convergence.items import (
    Item,
    has_agent,
)
from agentd.models.types import LoadableModel, ModelKey, RuntimeOptions
from slmfleet.v1 import state_pb2 as pb

GGUF = "gguf"


def offers(items: Iterable[Item], settings: pb.NodeSettings, limits: Limits) -> tuple[LoadableModel, ...]:
    """One model per key; assignments that share it get the longest keep-alive and the highest priority among them."""
    grouped: dict[ModelKey, list[Item]] = {}
    for item in items:
        if item.key is not None:
            grouped.setdefault(item.key, []).append(item)
    default = settings.keep_alive_s if settings.HasField("keep_alive_s") else limits.keep_alive_s
    models = []
    for key, sharers in sorted(grouped.items()):
        variant = sharers[0].variant
        assert variant is not None
        view = limits.views_root / sharers[0].assignment.model.digest / variant.name
        models.append(
            LoadableModel(
                key=key,
                format=variant.format,
                entry=_entry(view, variant),
                size_bytes=sum(file.size_bytes for file in variant.files),
                context_tokens=sharers[0].assignment.model.context_tokens or limits.context_tokens,
                warm=any(item.assignment.warm for item in sharers),
                warm_prompts=_warm_prompts(sharers),
                runtime=_runtime(sharers[0].assignment.model.runtime),
                keep_alive_s=_longest(_keep_alive(item.assignment, default) for item in sharers),
                priority=max(item.assignment.agent.priority if has_agent(item) else 50 for item in sharers),
            )
        )
    return tuple(models)


def _warm_prompts(sharers: Iterable[Item]) -> tuple[str, ...]:
    """Instructions of the agents that keep the model loaded, each once, the most important agent's first."""
    agents = [item.assignment.agent for item in sharers if item.assignment.warm and has_agent(item)]
    agents.sort(key=lambda agent: (-agent.priority, agent.name))
    return tuple(dict.fromkeys(agent.instructions for agent in agents if agent.instructions))


def _runtime(told: pb.RuntimeSettings) -> RuntimeOptions:
    """As the host wants it; values that no host could use are as if they were not there."""
    return RuntimeOptions(
        threads=min(told.threads, 1024),
        slots=min(told.slots, 256),
        batch_tokens=min(told.batch_tokens, 2048),
        gpu_layers=max(-1, told.gpu_layers) if told.HasField("gpu_layers") else None,
        lock_memory=told.lock_memory if told.HasField("lock_memory") else None,
        kv_type=told.kv_type,
        numa=told.numa if told.numa in ("distribute", "isolate") else "",
    )


def _keep_alive(assignment: pb.Assignment, default: float) -> float:
    agent = assignment.agent
    return agent.keep_alive_s if assignment.HasField("agent") and agent.HasField("keep_alive_s") else default


def _longest(values: Iterable[float]) -> float:
    found = list(values)
    return -1.0 if any(value < 0 for value in found) else max(found)


def _entry(view: Path, variant: pb.Variant) -> Path:
    """What a runtime opens: the (first) GGUF file, or the folder."""
    if variant.format != GGUF:
        return view
    names = sorted(file.name for file in variant.files)
    return view / next((name for name in names if name.endswith(".gguf")), names[0])
