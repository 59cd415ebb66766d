"""Cursor pages: ``?limit=``, ``?cursor=``, and ``{"items": [...], "nextCursor": ...}`` back.

A cursor is the key of the last row, as base64 of JSON; for callers it is opaque. It is no secret and grants nothing.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Query

from controlplane.db.objects import Key, Page
from controlplane.domain.selectors import Selector, SelectorError, parse_selector
from controlplane.rest.problems import ApiProblem

Limit = Annotated[int, Query(ge=1, le=500, description="How many items to return at most.")]
Cursor = Annotated[str | None, Query(max_length=1024, description="`nextCursor` of the page before.")]
SelectorQuery = Annotated[
    str, Query(alias="selector", max_length=4096, description="Label selector, e.g. `site in (lyon, turin),hw=pi5`.")
]
DEFAULT_LIMIT = 100


def encode(key: Key) -> str:
    """The cursor of a key."""
    values = [value.isoformat() if isinstance(value, datetime.datetime) else value for value in key]
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


def decode(cursor: str | None, columns: Sequence[sa.ColumnElement]) -> Key | None:
    """The key of a cursor, with a value for each of ``columns``; None for no cursor. Raises ApiProblem 400."""
    if cursor is None:
        return None
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        values = json.loads(base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True))
        if not isinstance(values, list) or len(values) != len(columns):
            raise ValueError("another list's cursor")
        return tuple(_value(value, column.type) for value, column in zip(values, columns, strict=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise ApiProblem(
            400, "this cursor belongs to no list like this one: begin without a cursor", "cursor"
        ) from None


def _value(value: Any, type_: sa.types.TypeEngine[Any]) -> str | int | datetime.datetime:
    if isinstance(type_, sa.DateTime):
        return datetime.datetime.fromisoformat(value).astimezone(datetime.UTC)
    if isinstance(type_, sa.Integer) and isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(type_, sa.Text) and isinstance(value, str) and "\0" not in value:
        value.encode()  # half of a surrogate pair is a ValueError
        return value
    raise ValueError("not of the column's type")


def answer(page: Page, show: Callable[[sa.Row[Any]], Any]) -> dict[str, Any]:
    """The JSON of a page."""
    return {
        "items": [show(row) for row in page.rows],
        "nextCursor": None if page.next_key is None else encode(page.next_key),
    }


def parse(selector: str) -> Selector:
    """The selector of a query. Raises ApiProblem 400 with the place of the error."""
    try:
        return parse_selector(selector)
    except SelectorError as error:
        raise ApiProblem(400, str(error), "selector") from None
