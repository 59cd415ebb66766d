"""JSON Schemas that can be enforced, and those that are refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.backends.base import RequestError
from agentd.models.backends.schema import check, constraint

PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string", "maxLength": 20, "description": "anything"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
        "boss": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "any": True,
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}


def asked(schema: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def test_forms():
    assert constraint({}) is None
    assert constraint({"response_format": {"type": "text"}}) is None
    assert constraint({"response_format": {"type": "json_object"}}) == {"type": "object"}
    assert constraint({"response_format": {"type": "json_object", "schema": PERSON}}) == PERSON
    assert constraint(asked(PERSON)) == PERSON
    # Runtimes take a bare `true` for no constraint at all.
    assert constraint(asked(True)) == {}


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({"response_format": "json"}, "invalid_request"),
        ({"response_format": {"type": "xml"}}, "invalid_request"),
        ({"response_format": {"type": "json_schema"}}, "invalid_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "invalid_schema"),
        (asked(None), "invalid_schema"),
        (asked(False), "invalid_schema"),
        (asked([]), "invalid_schema"),
    ],
)
def test_bad_forms(form: dict, code: str):
    with pytest.raises(RequestError) as caught:
        constraint(form)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nonsense"}, "at /type: unknown type 'nonsense'"),
        ({"type": ["string", 3]}, "unknown type '3'"),
        ({"properties": {"a": {"type": "x"}}}, "at /properties/a/type"),
        ({"properties": [1]}, "must be an object of schemas"),
        ({"properties": {"a": 3}}, "must be an object, true or false"),
        ({"enum": []}, "at least one item"),
        ({"anyOf": {}}, "at least one item"),
        ({"required": "a"}, "list of names"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'b' is not among the properties"),
        ({"$ref": "#/$defs/x"}, "points at nothing"),
        ({"$ref": "https://example.com/x"}, "only references into the same schema"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
        ({"minLength": -1}, "zero or more"),
        ({"minItems": 3, "maxItems": 2}, "greater than maxItems"),
        ({"minimum": "3"}, "must be a number"),
        ({"pattern": 3}, "must be text"),
    ],
)
def test_invalid_schemas(schema: object, words: str):
    with pytest.raises(RequestError) as caught:
        check(schema)
    assert caught.value.code == "invalid_schema"
    assert words in caught.value.message


def test_what_a_runtime_ignores_is_refused_unless_it_asks_for_nothing():
    ignored = {"uniqueItems", "number.minimum", "pattern.unanchored"}
    check({"type": "array", "uniqueItems": False}, ignored)
    check({"type": "integer", "minimum": 3}, ignored)
    check({"type": "string", "pattern": "^a+$"}, ignored)
    for schema in ({"uniqueItems": True}, {"type": "number", "minimum": 3}, {"type": "string", "pattern": "a"}):
        with pytest.raises(RequestError, match="enforced"):
            check(schema, ignored)


def test_depth_and_size_are_bounded():
    deep: dict = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="deeper than 64"):
        check(deep)
    with pytest.raises(RequestError, match="more than 10000 parts"):
        check({"anyOf": [{}] * 20_000})


KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "anyOf", "enum", "$ref", "$defs", "required", "minimum", "maxLength", "pattern",
     "additionalProperties", "prefixItems", "const", "uniqueItems"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["string", "#", "#/$defs/a", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(KEYWORDS, VALUES, max_size=4))
def test_any_value_is_fine_or_an_invalid_schema(schema: dict):
    with contextlib.suppress(RequestError):
        check(schema, {"uniqueItems", "pattern.unanchored", "number.minimum"})
