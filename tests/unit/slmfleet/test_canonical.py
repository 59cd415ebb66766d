"""Canonical JSON: equal content, equal bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmfleet.canonical import canonical_json, digest

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def test_keys_are_sorted_and_nothing_is_padded() -> None:
    assert canonical_json({"b": [1, 2], "a": {"é": None, "d": True}}) == '{"a":{"d":true,"é":null},"b":[1,2]}'.encode()
    assert digest({}) == hashlib.sha256(b"{}").hexdigest()


@given(values)
def test_the_bytes_say_the_value_and_do_not_depend_on_order(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value

    def turned(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: turned(inner) for key, inner in reversed(item.items())}
        return [turned(inner) for inner in item] if isinstance(item, list) else item

    assert canonical_json(turned(value)) == canonical_json(value)


@given(values, values)
def test_other_content_has_another_digest(one: Any, other: Any) -> None:
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_what_json_can_not_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
