"""Structured logs: a fixed message plus fields, one line each, on standard error.

``log = logs.get(__name__)``, then ``log.info("session opened", node=name, epoch=3)``. The message never varies, so
that it can be searched for; what varies is a field. Prompts, answers, tokens and keys are never fields.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

_FIELDS = "slmfleet_fields"


class EventLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose keyword arguments become fields of the line."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        known = {key: kwargs.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in kwargs}
        fields = {**(self.extra or {}), **kwargs}
        kwargs.clear()
        kwargs.update(known, extra={_FIELDS: fields})
        return msg, kwargs


def get(name: str, **fields: Any) -> EventLogger:
    """A logger; ``fields`` stand on each of its lines."""
    return EventLogger(logging.getLogger(name), fields)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return dict(getattr(record, _FIELDS, {}))


class TextFormatter(logging.Formatter):
    """``12:00:01.250 info  agentd.session session opened node=edge-1 epoch=3``."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {key}={_short(value)}" for key, value in _fields(record).items())
        line = f"{stamp} {record.levelname.lower():<7} {record.name} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _short(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(c in text for c in ' "=\n') else text


def configure(level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Send all logs to ``stream`` (standard error when None). ``form`` is ``text`` or ``json``."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
