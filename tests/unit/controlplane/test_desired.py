"""What a node is told: complete, and byte for byte the same for the same ground."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.desired import (
    Agent,
    Assignment,
    Model,
    assignments_of,
    compile_document,
    serialize,
    warm_replicas,
)
from controlplane.domain.fleet import Deployment, Node, Replica, Revision, Variant
from controlplane.domain.liveness import NodeState
from slmfleet.v1 import state_pb2

FILES = [{"sha256": "aa" * 32, "sizeBytes": 98_000_000, "name": "model.gguf"}]
MODEL = Model(
    "smollm2",
    "1",
    "d1",
    [
        {"name": "int4", "format": "onnx-genai", "quantization": "", "files": FILES},
        {"name": "q4-1", "format": "gguf", "quantization": "Q4_1", "files": FILES},
    ],
    2048,
    "small",
)
VARIANTS = (Variant("int4", "onnx-genai", {"aa" * 32: 98}), Variant("q4-1", "gguf", {"aa" * 32: 98}))
AGENT = Agent(
    "greeter",
    "a1",
    {
        "description": "greets",
        "instructions": "You greet.",
        "model": {"ref": "smollm2"},
        "options": {"temperature": 0.0, "topP": None, "maxOutputTokens": 64, "stopSequences": ["\n"]},
        "limits": {"maxConcurrent": 2, "maxQueued": 0, "queueTimeoutSeconds": 1.5, "timeoutSeconds": 9.0},
        "resources": {"priority": 0, "keepAliveSeconds": -1.0},
        "privacy": "site",
        "expose": ["gateway"],
    },
)
REVISION = Revision(3, "smollm2", "1", VARIANTS, agent="greeter", agent_digest="a1")
NODE = Node("n1", "edge-1", {"site": "lyon"}, formats=frozenset({"gguf"}))
MODELS, AGENTS = {("smollm2", "1"): MODEL}, {("greeter", "a1"): AGENT}


def document(node: Node = NODE, *assignments: Assignment) -> state_pb2.NodeDocument:
    return compile_document(node, assignments, MODELS, AGENTS, state_pb2.NodeSettings(max_loaded_models=2), ["CA"])


def test_runtime_settings_travel_and_absent_ones_leave_no_trace() -> None:
    plain = document(NODE, Assignment("r1", "greeter", REVISION, warm=True))
    assert not plain.assignments[0].model.HasField("runtime")
    spec = {"threads": 2, "slots": 0, "gpuLayers": 0, "lockMemory": None, "kvType": "q8_0", "numa": ""}
    models = {("smollm2", "1"): replace(MODEL, runtime=spec)}
    assignment = Assignment("r1", "greeter", REVISION, warm=True)
    made = compile_document(NODE, [assignment], models, AGENTS, state_pb2.NodeSettings(), [])
    runtime = made.assignments[0].model.runtime
    assert runtime == state_pb2.RuntimeSettings(threads=2, gpu_layers=0, kv_type="q8_0")
    assert not runtime.HasField("lock_memory")


def test_a_document_holds_everything_that_was_declared() -> None:
    made = document(NODE, Assignment("r1", "greeter", REVISION, warm=True))
    [assignment] = made.assignments
    assert (assignment.id, assignment.deployment, assignment.revision, assignment.warm) == ("r1", "greeter", 3, True)
    assert assignment.phase == state_pb2.ASSIGNMENT_PHASE_ACTIVE
    assert assignment.variant == "q4-1", "the only variant that a backend of this node can load"
    assert (assignment.model.name, assignment.model.version, assignment.model.digest) == ("smollm2", "1", "d1")
    assert assignment.model.context_tokens == 2048
    assert [variant.name for variant in assignment.model.variants] == ["int4", "q4-1"]
    assert assignment.model.variants[1].files[0].size_bytes == 98_000_000
    agent = assignment.agent
    assert (agent.name, agent.digest, agent.instructions) == ("greeter", "a1", "You greet.")
    assert agent.options.HasField("temperature")
    assert agent.options.temperature == 0.0
    assert not agent.options.HasField("top_p")
    assert list(agent.options.stop_sequences) == ["\n"]
    assert (agent.limits.max_concurrent, agent.limits.max_queued) == (2, 0)
    assert (agent.limits.queue_timeout_s, agent.limits.timeout_s) == (1.5, 9.0)
    assert (agent.priority, agent.keep_alive_s) == (0, -1.0)
    assert agent.privacy == state_pb2.PRIVACY_SITE
    assert list(agent.expose) == [state_pb2.EXPOSURE_GATEWAY]
    assert made.settings.max_loaded_models == 2
    assert not made.settings.drained
    assert dict(made.labels) == {"site": "lyon"}
    assert list(made.trusted_ca_pem) == ["CA"]


def test_a_bare_model_has_no_agent_and_an_unknown_inventory_leaves_the_variant_open() -> None:
    bare = replace(REVISION, agent=None, agent_digest=None)
    [assignment] = document(replace(NODE, formats=frozenset()), Assignment("r1", "m", bare, warm=False)).assignments
    assert not assignment.HasField("agent")
    assert assignment.variant == ""


def test_an_unknown_privacy_fails_closed() -> None:
    agents = {("greeter", "a1"): replace(AGENT, spec={**AGENT.spec, "privacy": "everybody"})}
    settings = state_pb2.NodeSettings()
    made = compile_document(NODE, [Assignment("r1", "greeter", REVISION, True)], MODELS, agents, settings, [])
    assert made.assignments[0].agent.privacy == state_pb2.PRIVACY_DEVICE


def test_drain_is_told() -> None:
    assert document(replace(NODE, drained=True)).settings.drained


@given(st.permutations(["r1", "r2", "r3"]), st.permutations(["a", "b", "c"]))
def test_equal_ground_gives_equal_bytes(ids: list[str], labels: list[str]) -> None:
    def made(ids: list[str], labels: list[str]) -> tuple[bytes, bytes]:
        node = replace(NODE, labels=dict.fromkeys(labels, "x"))
        return serialize(document(node, *(Assignment(id_, "greeter", REVISION, True) for id_ in ids)))

    assert made(ids, labels) == made(["r1", "r2", "r3"], ["a", "b", "c"])


def test_another_label_is_another_document() -> None:
    assert serialize(document(NODE))[1] != serialize(document(replace(NODE, labels={"site": "turin"})))[1]


def replica(name: str, created_at: float, deployment: str = "greeter") -> Replica:
    return Replica(name, deployment, 3, f"n-{name}", created_at)


@pytest.mark.parametrize(
    ("warm", "expected"),
    [(None, {"a", "b", "c"}), (0, set()), (1, {"b"}), (2, {"b", "c"}), (9, {"a", "b", "c"})],
)
def test_the_oldest_replicas_stay_warm_and_lost_ones_come_last(warm: int | None, expected: set[str]) -> None:
    wished = Deployment("greeter", 3, (REVISION,), warm=warm)
    nodes = {
        f"n-{name}": Node(f"n-{name}", name, state=state)
        for name, state in (("a", NodeState.LOST), ("b", NodeState.ONLINE), ("c", NodeState.SUSPECT))
    }
    replicas = [replica("a", 1.0), replica("c", 3.0), replica("b", 2.0), replica("z", 0.0, "other")]
    assert warm_replicas(wished, replicas, nodes) == expected


def test_only_what_can_be_handed_out_is_assigned() -> None:
    ready = Deployment("greeter", 3, (REVISION,))
    unready = Deployment("other", 1, (Revision(1, "absent", "1", not_ready="waits"),))
    replicas = [replica("a", 1.0), replica("b", 1.0, "other"), replica("c", 1.0, "deleted")]
    made = assignments_of(NODE, replicas, {"greeter": ready, "other": unready}, MODELS, frozenset({"a"}))
    assert made == [Assignment("a", "greeter", REVISION, True)]


def test_a_node_is_told_the_variant_that_it_runs() -> None:
    both = replace(NODE, formats=frozenset({"gguf", "onnx-genai"}))
    ready = {name: Deployment(name, 3, (REVISION,)) for name in ("greeter", "other")}

    def told(*replicas: Replica) -> list[str]:
        mine = assignments_of(both, replicas, ready, MODELS, frozenset())
        return [item.variant for item in document(both, *mine).assignments]

    def runs(name: str, created_at: float, variant: str, of: str = "smollm2@1", deployment: str = "greeter") -> Replica:
        return replace(replica(name, created_at, deployment), node_id="n1", variant=variant, variant_of=of)

    assert told(runs("a", 1.0, "")) == ["int4"], "the first of equals"
    assert told(runs("a", 1.0, "q4-1")) == ["q4-1"]
    assert told(runs("a", 1.0, "q4-1", "smollm2@0")) == ["int4"], "that was another version's"
    assert told(runs("a", 1.0, "gone")) == ["int4"]
    # One worker for both: what the older one runs.
    assert told(runs("a", 2.0, "int4"), runs("b", 1.0, "q4-1", deployment="other")) == ["q4-1", "q4-1"]
