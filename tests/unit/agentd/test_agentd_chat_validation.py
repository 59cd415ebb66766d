"""What a chat request may hold."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.api.errors import ApiError
from agentd.api.validation import parse_chat

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse(**changes: object):  # type: ignore[no-untyped-def]
    return parse_chat(json.dumps({**GOOD, **changes}).encode())


def tool(name: str, parameters: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [tool("a b")]}, "tools[0]"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("f", {"type": "thing"})]}, "tools[0].function.parameters"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": []}, "functions"),
        ({"temprature": 1}, "temprature"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": -2}, "keep_alive"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_bad_requests_name_the_field(changes: dict[str, object], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**changes)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "`" in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_json_object(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(raw)
    assert caught.value.status == 400


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_aliases_are_resolved_and_fields_that_only_inform_dropped() -> None:
    request = parse(
        max_completion_tokens=7, max_tokens=9, user="me", metadata={"a": 1}, stop="END", top_p=1,
        stream=True, stream_options={"include_usage": True},
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
    )  # fmt: skip
    assert (request.stream, request.include_usage) == (True, True)
    assert request.body == {
        "max_tokens": 7,
        "stop": ["END"],
        "top_p": 1.0,
        "messages": [
            {"role": "system", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "x", "tool_call_id": "1"},
        ],
    }


@pytest.mark.parametrize(
    ("given", "seconds"), [("10m", 600.0), (90, 90.0), (0, 0.0), (-1, -1.0), ("-1", -1.0), ("1h30m", 5400.0)]
)
def test_keep_alive_is_read_in_every_form(given: object, seconds: float) -> None:
    assert parse(keep_alive=given).keep_alive_s == seconds


def test_an_unknown_field_is_told_with_its_neighbours() -> None:
    with pytest.raises(ApiError, match="did you mean temperature") as caught:
        parse(temperatur=1)
    assert caught.value.code == "unknown_parameter"


def test_null_means_not_given() -> None:
    assert parse(temperature=None, stop=None, stream=None, max_tokens=None).body == {"messages": GOOD["messages"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["messages", "stream", "stop", "tools", "tool_choice", "response_format", "stream_options", "logit_bias", "n"]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_nothing_but_an_api_error_ever_comes_out(changes: dict[str, object]) -> None:
    # Anything else that is raised fails the test.
    with contextlib.suppress(ApiError):
        parse(**changes)
