"""Logs: one line an event, fields apart from the message."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from slmfleet import logs


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(form: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, form, stream)
    return stream


def test_text_has_the_message_then_the_fields() -> None:
    stream = written("text")
    logs.get("agentd.session", node="edge-1").info("session opened", epoch=3, reason="said so", empty="")
    line = stream.getvalue()
    assert line.endswith('info    agentd.session session opened node=edge-1 epoch=3 reason="said so" empty=""\n')


def test_a_field_can_not_forge_a_line() -> None:
    stream = written("text")
    logs.get("a").warning("refused", name='x\n12:00 error "y"')
    assert stream.getvalue().count("\n") == 1


def test_json_is_one_object_a_line() -> None:
    stream = written("json")
    log = logs.get("a.b", node="n")
    log.info("opened", epoch=3, path=io)
    try:
        raise KeyError("gone")
    except KeyError:
        log.exception("failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first | {"level": "info", "logger": "a.b", "message": "opened", "node": "n", "epoch": 3} == first
    assert first["time"].endswith("+00:00")
    assert "KeyError: 'gone'" in second["traceback"]


def test_the_level_holds() -> None:
    stream = written("text", "warning")
    logs.get("a").info("quiet")
    logs.get("a").error("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()
