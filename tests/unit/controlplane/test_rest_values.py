"""Cursors, preconditions and problem bodies: the small values of REST."""

from __future__ import annotations

import contextlib
import datetime

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.problems import Problem, pointer_to
from controlplane.rest import paging, preconditions, problems
from controlplane.rest.problems import ApiProblem

TEXT, NUMBER, TIME = (
    sa.column("a", sa.Text()),
    sa.column("b", sa.BigInteger()),
    sa.column("c", sa.DateTime(timezone=True)),
)
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
moments = st.datetimes(timezones=st.just(datetime.UTC))


@given(text, st.integers(-(2**63) + 1, 2**63 - 1), moments)
def test_a_cursor_gives_its_key_back(name: str, number: int, at: datetime.datetime) -> None:
    cursor = paging.encode((name, number, at))
    assert paging.decode(cursor, (TEXT, NUMBER, TIME)) == (name, number, at)
    with pytest.raises(ApiProblem):
        paging.decode(cursor, (TEXT, NUMBER))


@given(st.text(max_size=40) | st.builds(lambda content: paging.encode((content,)), st.text(max_size=20)))
def test_any_cursor_is_a_key_or_a_400(cursor: str) -> None:
    for columns in ((NUMBER,), (TIME,), (TEXT, TEXT)):
        with pytest.raises(ApiProblem) as refusal:
            paging.decode(cursor, columns)
        assert refusal.value.status_code == 400


def test_no_cursor_is_no_key() -> None:
    assert paging.decode(None, (TEXT,)) is None


@pytest.mark.parametrize(
    ("if_match", "version", "stale"),
    [
        (None, None, False),
        (None, 3, False),
        ('"3"', 3, False),
        ('"2", "3"', 3, False),
        ("*", 3, False),
        ("*", None, True),
        ('"2"', 3, True),
        ('"3"', None, True),
        ("3", 3, True),
        ('W/"3"', 3, True),
    ],
)
def test_if_match(if_match: str | None, version: int | None, stale: bool) -> None:
    with pytest.raises(ApiProblem) if stale else contextlib.nullcontext() as refusal:
        preconditions.check(if_match, version, "group shops")
    assert (refusal.value.status_code if refusal else None) == (412 if stale else None)


def test_problem_bodies() -> None:
    refusal = problems.invalid([Problem("/spec/a", "is wrong"), Problem("", "too")])
    assert refusal.detail == "/spec/a: is wrong (and 1 more)"
    body = problems.body_of(refusal.status_code, refusal.detail, refusal.slug, refusal.errors)
    assert body == {
        "type": "urn:slmfleet:problem:invalid",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "/spec/a: is wrong (and 1 more)",
        "errors": [{"pointer": "/spec/a", "message": "is wrong"}, {"pointer": "", "message": "too"}],
    }
    assert problems.body_of(404, "nothing")["type"] == "about:blank"


def test_pointers_escape() -> None:
    assert pointer_to(["a/b", 0, "c~d"]) == "/a~1b/0/c~0d"
    assert pointer_to([]) == ""
    assert Problem("/x", "m").under("/documents/1") == Problem("/documents/1/x", "m")
