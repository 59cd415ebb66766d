"""The document that tells one node everything it should be: ``compile_document`` and its digest.

Equal inputs give equal bytes, in whatever order they come: the hash of the bytes decides whether a node must be told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlplane.domain.candidates import choose_variant
from controlplane.domain.fleet import Deployment, Node, Replica, Revision, Variant, effective_revision, running_variants
from controlplane.domain.liveness import NodeState
from slmfleet.v1 import state_pb2

_PRIVACY = {
    "device": state_pb2.PRIVACY_DEVICE,
    "site": state_pb2.PRIVACY_SITE,
    "fleet": state_pb2.PRIVACY_FLEET,
    "any": state_pb2.PRIVACY_ANY,
}
_EXPOSURE = {"local": state_pb2.EXPOSURE_LOCAL, "gateway": state_pb2.EXPOSURE_GATEWAY}


@dataclass(frozen=True, slots=True)
class Assignment:
    """One replica as its node should run it."""

    id: str
    deployment: str
    revision: Revision
    warm: bool
    # The variant that the node runs already; "" = none, or not known.
    running: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model version that can be handed out. ``variants`` as in ``model_versions.variants``:
    ``[{"name", "format", "quantization", "files": [{"sha256", "sizeBytes", "name"}]}]``."""

    name: str
    version: str
    digest: str
    variants: Sequence[Mapping[str, Any]]
    context_tokens: int = 0
    description: str = ""
    # ``spec.runtime`` of its manifest, camelCase.
    runtime: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent version; ``spec`` is the ``spec`` of its manifest, camelCase."""

    name: str
    digest: str
    spec: Mapping[str, Any]


def warm_replicas(deployment: Deployment, replicas: Iterable[Replica], nodes: Mapping[str, Node]) -> frozenset[str]:
    """Ids of the replicas that keep the model loaded: the oldest ``warm`` of them, those on lost nodes last."""

    def order(replica: Replica) -> tuple[bool, float, str]:
        node = nodes.get(replica.node_id)
        return node is None or node.state is NodeState.LOST, replica.created_at, replica.id

    mine = sorted((replica for replica in replicas if replica.deployment == deployment.name), key=order)
    return frozenset(replica.id for replica in mine[: deployment.warm])


def assignments_of(
    node: Node,
    replicas: Iterable[Replica],
    deployments: Mapping[str, Deployment],
    models: Mapping[tuple[str, str], Model],
    warm: frozenset[str],
) -> list[Assignment]:
    """What ``node`` should run. Left out: what has no model that can be handed out yet, and deleted deployments."""
    mine = list(replicas)
    running = running_variants(mine)
    found = []
    for replica in mine:
        deployment = deployments.get(replica.deployment)
        revision = effective_revision(deployment, node) if deployment else None
        if revision is not None and (revision.model, revision.model_version) in models:
            runs = running.get((node.id, revision.title), "")
            found.append(Assignment(replica.id, replica.deployment, revision, replica.id in warm, runs))
    return found


def compile_document(
    node: Node,
    assignments: Iterable[Assignment],
    models: Mapping[tuple[str, str], Model],
    agents: Mapping[tuple[str, str], Agent],
    settings: state_pb2.NodeSettings,
    ca_pem: Sequence[str],
) -> state_pb2.NodeDocument:
    """Everything that ``node`` should be. ``settings`` are the fleet's; the node's own wish to be drained is added.

    Raises KeyError when a model or an agent that an assignment pins is missing.
    """
    document = state_pb2.NodeDocument(trusted_ca_pem=sorted(ca_pem), labels=dict(node.labels))
    document.settings.CopyFrom(settings)
    document.settings.drained = node.drained
    for assignment in sorted(assignments, key=lambda item: (item.deployment, item.id)):
        document.assignments.append(_assignment(node, assignment, models, agents))
    return document


def serialize(document: state_pb2.NodeDocument) -> tuple[bytes, bytes]:
    """The bytes and their SHA-256 (32 bytes); equal for equal documents."""
    data = document.SerializeToString(deterministic=True)
    return data, hashlib.sha256(data).digest()


def _assignment(
    node: Node,
    assignment: Assignment,
    models: Mapping[tuple[str, str], Model],
    agents: Mapping[tuple[str, str], Agent],
) -> state_pb2.Assignment:
    revision = assignment.revision
    compiled = state_pb2.Assignment(
        id=assignment.id,
        deployment=assignment.deployment,
        revision=revision.number,
        model=_model(models[revision.model, revision.model_version]),
        phase=state_pb2.ASSIGNMENT_PHASE_ACTIVE,
        warm=assignment.warm,
    )
    variant = choose_variant(node, revision.variants, assignment.running) if node.formats else None
    if isinstance(variant, Variant):
        compiled.variant = variant.name
    if revision.agent is not None and revision.agent_digest is not None:
        compiled.agent.CopyFrom(_agent(agents[revision.agent, revision.agent_digest]))
    return compiled


def _runtime(spec: Mapping[str, Any]) -> state_pb2.RuntimeSettings | None:
    """None where nothing is said, so that the documents of nodes stay as they were before the field existed."""
    runtime = state_pb2.RuntimeSettings(
        threads=int(spec.get("threads") or 0),
        slots=int(spec.get("slots") or 0),
        batch_tokens=int(spec.get("batchTokens") or 0),
        gpu_layers=spec.get("gpuLayers"),
        lock_memory=spec.get("lockMemory"),
        kv_type=spec.get("kvType") or "",
        numa=spec.get("numa") or "",
    )
    return runtime if runtime.ByteSize() else None


def _model(model: Model) -> state_pb2.ModelManifest:
    return state_pb2.ModelManifest(
        runtime=_runtime(model.runtime or {}),
        name=model.name,
        version=model.version,
        digest=model.digest,
        description=model.description,
        context_tokens=model.context_tokens,
        variants=[
            state_pb2.Variant(
                name=variant["name"],
                format=variant["format"],
                quantization=variant.get("quantization") or "",
                files=[
                    state_pb2.FileRef(sha256=file["sha256"], size_bytes=int(file["sizeBytes"]), name=file["name"])
                    for file in sorted(variant["files"], key=lambda file: str(file["name"]))
                ],
            )
            for variant in model.variants
        ],
    )


def _agent(agent: Agent) -> state_pb2.AgentManifest:
    spec = agent.spec
    limits = spec.get("limits") or {}
    resources = spec.get("resources") or {}
    manifest = state_pb2.AgentManifest(
        name=agent.name,
        digest=agent.digest,
        description=spec.get("description") or "",
        instructions=spec.get("instructions") or "",
        options=_options(spec.get("options") or {}),
        limits=state_pb2.AgentLimits(
            max_concurrent=int(limits.get("maxConcurrent", 1)),
            max_queued=int(limits.get("maxQueued", 8)),
            queue_timeout_s=float(limits.get("queueTimeoutSeconds", 30)),
            timeout_s=float(limits.get("timeoutSeconds", 60)),
        ),
        # Unknown words fail closed: what was said at the device stays there.
        privacy=_PRIVACY.get(spec.get("privacy") or "device", state_pb2.PRIVACY_DEVICE),
        expose=[_EXPOSURE[word] for word in spec.get("expose", ["local", "gateway"]) if word in _EXPOSURE],
        priority=int(resources.get("priority", 50)),
    )
    if resources.get("keepAliveSeconds") is not None:
        manifest.keep_alive_s = float(resources["keepAliveSeconds"])
    return manifest


def _options(options: Mapping[str, Any]) -> state_pb2.SamplingOptions:
    message = state_pb2.SamplingOptions(stop_sequences=options.get("stopSequences") or [])
    for name, field in (
        ("temperature", "temperature"),
        ("topP", "top_p"),
        ("topK", "top_k"),
        ("minP", "min_p"),
        ("seed", "seed"),
        ("maxOutputTokens", "max_output_tokens"),
    ):
        if options.get(name) is not None:
            setattr(message, field, options[name])
    return message
