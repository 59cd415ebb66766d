"""Selectors: the grammar's table, the errors' words, and what must hold for all selectors."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.selectors import (
    EVERYTHING,
    MAX_LENGTH,
    Operator,
    Requirement,
    Selector,
    SelectorError,
    parse_selector,
)

LYON = {"site": "lyon", "hw": "pi5", "example.com/tier": "demo", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("  ", True),
        ("site=lyon", True),
        ("site==lyon", True),
        ("site = lyon", True),
        ("site=turin", False),
        ("nothing=lyon", False),
        ("site!=lyon", False),
        ("site!=turin", True),
        ("nothing!=lyon", True),
        ("site in (lyon, turin)", True),
        ("site in (turin)", False),
        ("nothing in (lyon)", False),
        ("site notin (turin,paris)", True),
        ("site notin (lyon)", False),
        ("nothing notin (lyon)", True),
        ("site", True),
        ("nothing", False),
        ("!nothing", True),
        ("! site", False),
        ("site in (lyon, turin), hw=pi5", True),
        ("site in (lyon, turin), hw=pi4", False),
        ("example.com/tier=demo", True),
        ("empty=", True),
        ("site=", False),
        ("empty=,site", True),
        ("in notin (x),notin,in", False),
    ],
)
def test_matches(text: str, matches: bool) -> None:
    assert parse_selector(text).matches(LYON) is matches


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("site=lyon,", 'selector "site=lyon,": expected a label key at its end'),
        (",site", 'selector ",site": expected a label key at character 1, found ","'),
        ("site in lyon", 'selector "site in lyon": expected "(" at character 9, found "lyon"'),
        ("site in (lyon", 'selector "site in (lyon": expected "," or ")" at its end'),
        ("site in ()", 'selector "site in ()": expected a value at character 10, found ")"'),
        ("site lyon", 'expected "=", "!=", "in", "notin" or "," at character 6, found "lyon"'),
        ("site=lyon turin", 'expected "," at character 11, found "turin"'),
        ("site>3", '">" at character 5 is not allowed in a selector'),
        ("site=(", 'expected a value at character 6, found "("'),
        ("-site=a", 'at character 1, "-site" is no label key'),
        ("site=a/b", 'at character 6, "a/b" is no label value'),
        ("!", "expected a label key at its end"),
    ],
)
def test_an_error_says_where_and_what_was_expected(text: str, sentence: str) -> None:
    with pytest.raises(SelectorError) as error:
        parse_selector(text)
    assert sentence in str(error.value)


def test_an_endless_selector_is_refused() -> None:
    with pytest.raises(SelectorError, match="at most 4096"):
        parse_selector("a," * MAX_LENGTH)


words = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
keys = words | st.builds("{}/{}".format, st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True), words)
values = words | st.just("")
requirements = st.one_of(
    st.builds(Requirement, keys, st.sampled_from([Operator.EXISTS, Operator.MISSING])),
    st.builds(Requirement, keys, st.sampled_from([Operator.IN, Operator.NOT_IN]), st.tuples(values)),
    st.builds(
        lambda key, operator, chosen: Requirement(key, operator, tuple(sorted(chosen))),
        keys,
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.sets(words, min_size=2, max_size=4),
    ),
)
selectors = st.lists(requirements, max_size=4).map(lambda found: Selector(tuple(found)))
labels = st.dictionaries(keys, values, max_size=4)


@given(selectors)
def test_a_selector_parses_from_its_own_text(selector: Selector) -> None:
    assert parse_selector(str(selector)) == selector


@given(selectors, selectors, labels)
def test_a_comma_means_and(one: Selector, other: Selector, found: dict[str, str]) -> None:
    joined = Selector(one.requirements + other.requirements)
    assert joined.matches(found) == (one.matches(found) and other.matches(found))


@given(keys, st.sets(words, min_size=1, max_size=3), labels)
def test_notin_is_the_negation_of_in(key: str, chosen: set[str], found: dict[str, str]) -> None:
    some = ", ".join(chosen)
    assert parse_selector(f"{key} in ({some})").matches(found) != parse_selector(f"{key} notin ({some})").matches(found)
    assert parse_selector(key).matches(found) != parse_selector(f"!{key}").matches(found)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_selector_error(text: str) -> None:
    with contextlib.suppress(SelectorError):
        parse_selector(str(parse_selector(text)))


def test_the_empty_selector_is_one_value() -> None:
    assert parse_selector("") is EVERYTHING
