"""Names, exposure, instructions and options."""

from __future__ import annotations

import pytest

from agentd.agents.router import Catalog, Target, Unknown, build, compose, names, resolve
from agentd.models.types import ModelKey
from slmfleet.v1 import state_pb2 as pb

KEY = ModelKey("m", "1", "q4")


def agent(name: str = "greeter", *expose: int, **fields: object) -> pb.AgentManifest:
    return pb.AgentManifest(
        name=name, expose=expose or (pb.EXPOSURE_LOCAL, pb.EXPOSURE_GATEWAY), instructions="Be brief.", **fields
    )


def target(key: str = "a1", deployment: str = "shop", problem: str = "", manifest: pb.AgentManifest | None = None,
           model: str = "m") -> Target:  # fmt: skip
    return Target(key, deployment, model, "1", manifest, KEY, problem)


CATALOG = Catalog(
    (
        target("a1", "shop", manifest=agent()),
        target("a2", "bare", model="n"),
        target("a3", "secret", manifest=agent("hidden", pb.EXPOSURE_LOCAL)),
        target("a4", "m", model="z"),
    )
)


@pytest.mark.parametrize(
    ("name", "relayed", "found"),
    [
        ("agent/greeter", False, "a1"),
        ("agent/greeter", True, "a1"),
        ("shop", True, "a1"),
        ("n", True, "a2"),
        ("n@1", True, "a2"),
        ("n@2", True, None),
        ("agent/hidden", False, "a3"),
        ("agent/hidden", True, None),
        ("secret", True, None),
        ("m", False, "a4"),  # a deployment's name wins over a model's
        ("greeter", False, None),
        ("", False, None),
    ],
)
def test_resolve(name: str, relayed: bool, found: str | None) -> None:
    result = resolve(CATALOG, name, relayed=relayed)
    assert (None if isinstance(result, Unknown) else result.assignment_id) == found


def test_every_listed_name_resolves() -> None:
    for relayed in (False, True):
        for name in names(CATALOG, relayed):
            assert isinstance(resolve(CATALOG, name, relayed=relayed), Target)
    assert "agent/hidden" not in names(CATALOG, relayed=True)


def test_a_model_called_bare_has_no_agent() -> None:
    catalog = Catalog((target(manifest=agent()),))
    local = resolve(catalog, "m", relayed=False)
    assert isinstance(local, Target)
    assert local.agent is None
    # From the gateway the agent's guard is not walked around.
    assert isinstance(resolve(catalog, "m", relayed=True), Unknown)


def test_a_ready_assignment_is_preferred() -> None:
    catalog = Catalog((target("a1", problem="fetching", manifest=agent()), target("a2", "zoo", manifest=agent())))
    found = resolve(catalog, "agent/greeter", relayed=True)
    assert isinstance(found, Target)
    assert found.assignment_id == "a2"


def test_build_takes_readiness_from_the_plan() -> None:
    item = pb.Assignment(id="a1", deployment="shop", model=pb.ModelManifest(name="m", version="1"))
    document = pb.NodeDocument(assignments=[item], settings=pb.NodeSettings(drained=True))
    status = pb.AssignmentStatus(id="a1", conditions=[pb.Condition(type="Ready", message="no backend")])
    catalog = build(document, {}, frozenset(), [status])
    assert catalog.drained
    assert (catalog.targets[0].key, catalog.targets[0].problem) == (None, "no backend")
    ready = build(document, {"a1": KEY}, frozenset({"a1"}), [status])
    assert (ready.targets[0].key, ready.targets[0].problem) == (KEY, "")


def test_compose_puts_instructions_first_and_keeps_the_request() -> None:
    request = compose(target(manifest=agent()), {"messages": [{"role": "user", "content": "hi"}]})
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
    assert request.body["messages"][0]["content"] == "Be brief."


def test_a_system_message_of_the_request_joins_the_instructions() -> None:
    messages = [{"role": "system", "content": "Speak French."}, {"role": "user", "content": "hi"}]
    request = compose(target(manifest=agent()), {"messages": messages})
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
    assert request.body["messages"][0]["content"] == "Be brief.\n\nSpeak French."


def test_options_of_the_request_win_within_the_limits_of_the_agent() -> None:
    options = pb.SamplingOptions(temperature=0.1, top_k=5, max_output_tokens=100, stop_sequences=["END"])
    limits = pb.AgentLimits(timeout_s=7, queue_timeout_s=3)
    manifest = agent(options=options, limits=limits, priority=80, keep_alive_s=0)
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.9, "max_tokens": 500, "stop": ["X"]}
    request = compose(target(manifest=manifest), body)
    assert (request.body["temperature"], request.body["top_k"]) == (0.9, 5)
    assert request.body["max_tokens"] == 100
    assert request.body["stop"] == ["END", "X"]
    assert (request.timeout_s, request.queue_timeout_s, request.priority, request.keep_alive_s) == (7, 3, 80, 0)
    less = compose(target(manifest=manifest), {**body, "max_tokens": 5})
    assert less.body["max_tokens"] == 5


def test_a_bare_model_gets_the_body_as_it_is() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert compose(target(), body).body == body
