"""Tokens as text, and when one is good; how often a peer may fail."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.node_api import tokens
from controlplane.node_api.enrollment import FailureLimit
from controlplane.node_api.tokens import StoredToken

NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)
GOOD = StoredToken(tokens.hash_secret("s3cret"), 1, NOW + datetime.timedelta(hours=1), revoked=False)


def test_a_new_token_comes_back_from_its_text() -> None:
    token = tokens.new("ab" * 32)
    assert tokens.parse(f"  {token}\n") == token
    assert token.secret not in repr(token)
    assert tokens.new("ab" * 32).secret != token.secret


@pytest.mark.parametrize(
    "text", ["", "x", "slmfleet1", "slmfleet1.a.b.c", "slmfleet2.a.b." + "a" * 64, "slmfleet1..b." + "a" * 64]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ValueError, match="no enrolment token"):
        tokens.parse(text)


@given(st.text())
def test_any_text_is_a_token_or_a_clear_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(tokens.parse(text)) == text.strip()


@pytest.mark.parametrize(
    ("stored", "secret", "expected"),
    [
        (GOOD, "s3cret", None),
        (None, "s3cret", "unknown"),
        (GOOD, "other", "unknown"),
        (replace(GOOD, revoked=True), "s3cret", "revoked"),
        (replace(GOOD, expires_at=NOW), "s3cret", "expired"),
        (replace(GOOD, uses_left=0), "s3cret", "used"),
        # Who does not know the secret learns nothing about the token.
        (replace(GOOD, revoked=True), "other", "unknown"),
    ],
)
def test_when_a_token_is_good(stored: StoredToken | None, secret: str, expected: str | None) -> None:
    found = tokens.judge(stored, secret, NOW)
    assert found is None if expected is None else expected in (found or "")


def test_a_peer_that_fails_often_waits_and_recovers() -> None:
    limit = FailureLimit()
    for _ in range(10):
        assert limit.wait_s("a", 0.0) == 0
        limit.failed("a", 0.0)
    assert 0 < limit.wait_s("a", 0.0) <= 6
    assert limit.wait_s("b", 0.0) == 0
    assert limit.wait_s("a", 6.0) == 0
    limit.failed("a", 6.0)
    assert limit.wait_s("a", 6.0) > 0
    assert limit.wait_s("a", 600.0) == 0
