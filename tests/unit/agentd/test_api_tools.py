"""Calls that are forced by a schema, and how the bound text becomes OpenAI's tool calls again."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.api.errors import ApiError
from agentd.api.schemas import embedded
from agentd.api.tools import ToolCallReader, settle, tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "number", "minimum": 1}},
            "required": ["city"],
            "$defs": {"city": {"type": "string", "pattern": "x", "minLength": 2}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
MESSAGES = [{"role": "user", "content": "Weather in Paris?"}]


def body(**more: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "tools": [WEATHER, CLOCK], **more}


def read(text: str, size: int, reader: ToolCallReader) -> tuple[str, list[tuple[str, str]], str]:
    """Content, calls as (name, arguments), finish reason, of a text that comes in pieces of ``size``."""
    content, calls = "", []
    for at in range(0, len(text), size):
        for delta in reader.feed(text[at : at + size], "call_1"):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                if "name" in function:
                    assert call["id"] == "call_1"
                    calls.append((function["name"], ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + function["arguments"])
    return content, calls, reader.finish_reason("stop")


def test_a_call_that_may_come_is_left_to_a_template_that_knows_tools() -> None:
    settled, reader = settle(body(tool_choice="auto"), native=True)
    assert reader is None
    assert settled == body(tool_choice="auto")


def test_none_takes_the_tools_away() -> None:
    settled, reader = settle(body(tool_choice="none", parallel_tool_calls=True), native=False)
    assert (settled, reader) == ({"messages": MESSAGES}, None)


@pytest.mark.parametrize("native", [True, False])
def test_a_required_call_is_bound_by_a_schema_over_the_tools(native: bool) -> None:
    settled, reader = settle(body(tool_choice="required"), native=native)
    assert reader is not None
    assert not {"tools", "tool_choice"} & settled.keys()
    schema = settled["response_format"]["json_schema"]["schema"]
    assert [branch["properties"]["name"] for branch in schema["anyOf"]] == [
        {"const": "get_weather"},
        {"const": "get_time"},
    ]
    # References of the parameters still find what they mean, and what nobody enforces is gone.
    parameters = schema["$defs"]["tool0"]
    assert parameters["properties"] == {"city": {"$ref": "#/$defs/tool0/$defs/city"}, "days": {"type": "number"}}
    assert parameters["$defs"]["city"] == {"type": "string", "minLength": 2}
    assert "get_weather" in settled["messages"][0]["content"]


def test_a_function_by_name_is_the_only_one_left() -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    settled, reader = settle(body(tool_choice=choice), native=True)
    assert len(settled["response_format"]["json_schema"]["schema"]["anyOf"]) == 1
    assert reader is not None
    assert read('{"name": "get_time", "arguments": {}}', 3, reader) == ("", [("get_time", "{}")], "stop")


def test_without_a_template_for_tools_the_model_may_call_or_speak() -> None:
    settled, reader = settle(body(), native=False)
    assert reader is not None
    assert "content" in settled["response_format"]["json_schema"]["schema"]["anyOf"][-1]["properties"]
    assert read('{"content": "It is sunny."}', 4, reader) == ("It is sunny.", [], "stop")
    with pytest.raises(ApiError, match="together"):
        settle(body(response_format={"type": "json_object"}), native=False)


def test_stop_sequences_never_cut_a_call() -> None:
    settled, _ = settle(body(tool_choice="required", stop=["e"]), native=False)
    assert "stop" not in settled
    settled, _ = settle(body(stop=["END"]), native=False)
    assert settled["stop"] == ["END"]
    for stop in ("\n", "}", 'a"'):
        with pytest.raises(ApiError, match="`stop`"):
            settle(body(stop=[stop]), native=False)


def test_earlier_calls_are_told_in_words() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    history = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    settled, _ = settle(body(messages=history, tool_choice="required"), native=False)
    first, _, said, result = settled["messages"]
    assert first["content"].startswith("Be brief.\n\n")
    assert said == {"role": "assistant", "content": '{"name": "get_time", "arguments": {}}'}
    assert result == {"role": "user", "content": "Result of get_time: noon"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), st.integers(1, 9), st.booleans(), st.booleans())
def test_arguments_come_out_as_they_went_in_however_they_are_cut(
    arguments: dict[str, Any], size: int, wide: bool, ascii_only: bool
) -> None:
    told = json.dumps({"name": "f", "arguments": arguments}, indent=2 if wide else None, ensure_ascii=ascii_only)
    content, calls, reason = read(told, size, ToolCallReader("tool_calls"))
    assert (content, reason) == ("", "tool_calls")
    assert [(name, json.loads(text)) for name, text in calls] == [("f", arguments)]


@given(st.text(max_size=20), st.integers(1, 9), st.booleans())
def test_words_come_out_as_they_went_in_however_they_are_cut(words: str, size: int, ascii_only: bool) -> None:
    told = json.dumps({"content": words}, ensure_ascii=ascii_only)
    assert read(told, size, ToolCallReader("tool_calls")) == (words, [], "stop")


def test_a_call_that_was_cut_is_none_that_is_complete() -> None:
    reader = ToolCallReader("tool_calls")
    reader.feed('{"name": "f", "arguments": {"a', "c")
    assert reader.finish_reason("length") == "length"


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "thing"}, "unknown type 'thing'"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "not there at #/properties/a"),
        ({"properties": {"a": {"$ref": "https://example.org/a"}}}, "into the same schema"),
        ({"properties": []}, "`properties` must be an object"),
        ({"anyOf": []}, "at least one schema"),
        ({"enum": []}, "`enum` must be a list"),
        ({"properties": {"a": 3}}, "must be an object"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ApiError, match=why) as caught:
        embedded(schema, "p", strict=False)
    assert (caught.value.status, caught.value.code) == (400, "invalid_schema")


def test_a_schema_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"items": schema, "type": "array"}
    with pytest.raises(ApiError, match="deeper than"):
        embedded(schema, "p", strict=True)


@given(VALUES)
def test_tools_of_any_form_give_an_api_error_or_pass(parameters: Any) -> None:
    # Anything else that is raised fails the test.
    with contextlib.suppress(ApiError):
        checked = tools("tools", [{"type": "function", "function": {"name": "f", "parameters": parameters}}])
        settle({"messages": MESSAGES, "tools": checked, "tool_choice": "required"}, native=False)
