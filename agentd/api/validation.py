"""What a chat-completions request may hold, checked by hand: a schema library would double the daemon's memory.

The result is a plain dict for the backends: known fields only, checked, aliases resolved (``max_completion_tokens`` to
``max_tokens``, ``developer`` to ``system``, content parts to text). Fields that change the answer and can't be honoured
are refused; fields that only inform (``user``, ``store``, ``metadata``, ...) are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentd.api.errors import bad_request

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
MAX_STOPS = 16


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request. ``body`` goes to the backend (without ``model`` and ``stream``)."""

    model: str
    stream: bool
    include_usage: bool
    body: dict[str, Any]


def parse_chat(raw: bytes) -> ChatRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        raise bad_request("the body is no JSON", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("the body is no JSON object", code="invalid_json")
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("`model` must be the name of an agent, a deployment or a model", "model")
    stream = _bool(given, "stream")
    options = given.get("stream_options") or {}
    if not isinstance(options, dict):
        raise bad_request("`stream_options` must be an object", "stream_options")
    if given.get("n") not in (None, 1):
        raise bad_request("`n` can only be 1: ask again for another answer", "n", "unsupported_value")
    body: dict[str, Any] = {"messages": _messages(given.get("messages"))}
    for name, check in _FIELDS.items():
        if given.get(name) is not None:
            body[name] = check(name, given[name])
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit is not None:
        body["max_tokens"] = _integer(1, 2**31)("max_completion_tokens", limit)
    return ChatRequest(model, stream, _bool(options, "include_usage", "stream_options.include_usage"), body)


def _bool(given: dict[str, Any], name: str, param: str | None = None) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"`{param or name}` must be true or false", param or name)
    return bool(value)


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise bad_request("`messages` must be a list of at least one message", "messages")
    if len(given) > MAX_MESSAGES:
        raise bad_request(f"`messages` has {len(given)} items; at most {MAX_MESSAGES} are taken", "messages")
    return [_message(f"messages[{number}]", message) for number, message in enumerate(given)]


def _message(param: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise bad_request(f"`{param}` must be an object with a role and a content", param)
    role = given.get("role")
    if role not in ROLES:
        raise bad_request(f"`{param}.role` must be one of {', '.join(ROLES)}", f"{param}.role")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = given.get("tool_calls")
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise bad_request(f"`{param}.tool_calls` must be a list in an assistant's message", f"{param}.tool_calls")
    content = given.get("content")
    if content is None and not (role == "assistant" and calls):
        raise bad_request(f"`{param}.content` is missing", f"{param}.content")
    message["content"] = "" if content is None else _text(f"{param}.content", content)
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            message[name] = _string(f"{param}.{name}", given[name])
    return message


def _text(param: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"`{param}` must be text or a list of parts", param)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad_request(
                f"`{param}[{number}]` is of type {kind!r}: only text is understood here",
                f"{param}[{number}]",
                "unsupported_value",
            )
        texts.append(part["text"])
    return "".join(texts)


def _string(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_request(f"`{param}` must be text", param)
    return value


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise bad_request(f"`{param}` must be a number from {low:g} to {high:g}", param)
        return float(value)

    return check


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_request(f"`{param}` must be a whole number from {low} to {high}", param)
        return value

    return check


def _stop(param: str, value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise bad_request(f"`{param}` must be text or a list of at most {MAX_STOPS} texts", param)
    return [stop for stop in stops if stop]


def _response_format(param: str, value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise bad_request(f"`{param}.type` must be text, json_object or json_schema", f"{param}.type")
    if kind == "json_schema":
        schema = value.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise bad_request(f"`{param}.json_schema.schema` must be a JSON Schema object", f"{param}.json_schema")
    return dict(value)


def _tools(param: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(f"`{param}` must be a list", param)
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"`{param}[{number}]` must be a function with a name", f"{param}[{number}]")
    return value


def _tool_choice(param: str, value: Any) -> Any:
    if value not in ("none", "auto", "required") and not isinstance(value, dict):
        raise bad_request(f"`{param}` must be none, auto, required or a function", param)
    return value


def _logit_bias(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"`{param}` must be an object from token to bias", param)
    return value


def _flag(param: str, value: Any) -> bool:
    return _bool({param: value}, param)


_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(0, 2**31 - 1),
    "min_p": _number(0, 1),
    "seed": _integer(-(2**63), 2**64 - 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repeat_penalty": _number(0, 10),
    "stop": _stop,
    "response_format": _response_format,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _flag,
    "logprobs": _flag,
    "top_logprobs": _integer(0, 20),
    "logit_bias": _logit_bias,
}
