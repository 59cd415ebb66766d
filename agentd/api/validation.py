"""What a chat-completions request may hold.

The result is a plain dict for the backends: known fields only, checked, aliases resolved (``max_completion_tokens`` to
``max_tokens``, ``developer`` to ``system``, content parts to text). Fields that only inform (``user``, ``store``,
``metadata``, ...) are dropped; everything else that can't be honoured is refused, so that no answer means less than was
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentd.api import checks
from agentd.api.checks import Check
from agentd.api.errors import bad_request
from agentd.api.tools import check_choice, tool_choice, tools

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 4096
# Answers to one request. They are made one after the other, in one place of the agent.
MAX_CHOICES = 8


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request. ``body`` goes to the backend (without ``model``, ``stream`` and ``n``)."""

    model: str
    stream: bool
    include_usage: bool
    body: dict[str, Any]
    choices: int = 1
    keep_alive_s: float | None = None


def parse_chat(raw: bytes) -> ChatRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    given = checks.parse_object(raw)
    model = checks.model_name(given)
    checks.refuse_unknown(given, _KNOWN, _UNSUPPORTED)
    body = {"messages": messages(given.get("messages")), **checks.sampling(given), **checks.pick(given, _FIELDS)}
    check_choice(body)
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise bad_request("`top_logprobs` needs `logprobs: true`", "top_logprobs")
    if (limit := token_limit(given, "max_completion_tokens", "max_tokens")) is not None:
        body["max_tokens"] = limit
    stream, include_usage = streaming(given)
    return ChatRequest(model, stream, include_usage, body, choices(given), keep_alive_s(given))


def streaming(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """``stream``, and whether the stream tells the usage."""
    stream = given.get("stream") is not None and checks.flag("stream", given["stream"])
    options = {} if given.get("stream_options") is None else checks.mapping("stream_options", given["stream_options"])
    if options and not stream:
        raise bad_request("`stream_options` needs `stream: true`", "stream_options")
    usage = options.get("include_usage")
    return stream, usage is not None and checks.flag("stream_options.include_usage", usage)


def token_limit(given: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that is there."""
    for name in names:
        if given.get(name) is not None:
            return int(checks.integer(1, 2**31)(name, given[name]))
    return None


def choices(given: Mapping[str, Any]) -> int:
    """``n``."""
    return 1 if given.get("n") is None else int(checks.integer(1, MAX_CHOICES)("n", given["n"]))


def keep_alive_s(given: Mapping[str, Any]) -> float | None:
    """``keep_alive``; None: as the node, the model and the agent say."""
    return None if given.get("keep_alive") is None else checks.keep_alive("keep_alive", given["keep_alive"])


def messages(given: Any) -> list[dict[str, Any]]:
    """The messages, checked and plain."""
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
    message["content"] = "" if content is None else content_text(f"{param}.content", content, ("text",))
    if calls:
        message["tool_calls"] = [_call(f"{param}.tool_calls[{number}]", call) for number, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            message[name] = checks.text(f"{param}.{name}", given[name])
    return message


def _call(param: str, given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not all(isinstance(function.get(n), str) for n in ("name", "arguments")):
        raise bad_request(f"`{param}` must be a call of a function with a name and arguments (text)", param)
    called = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": checks.text(f"{param}.id", given.get("id", "")), "type": "function", "function": called}


def content_text(param: str, content: Any, kinds: tuple[str, ...]) -> str:
    """Text, or parts of these kinds joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"`{param}` must be text or a list of parts", param)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise bad_request(
                f"`{param}[{number}]` is of type {kind!r}: only text is understood here",
                f"{param}[{number}]",
                "unsupported_value",
            )
        texts.append(part["text"])
    return "".join(texts)


def response_format(param: str, value: Any) -> dict[str, Any]:
    """The form of the answer. Whether the schema can be enforced is for the backend to say."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise bad_request(f"`{param}.type` must be text, json_object or json_schema", f"{param}.type")
    if kind != "json_schema":
        return {"type": kind}
    given = value.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise bad_request(f"`{param}.json_schema.schema` must be a JSON Schema object", f"{param}.json_schema")
    named = {"name": str(given.get("name", "answer")), "strict": True, "schema": given["schema"]}
    return {"type": kind, "json_schema": named}


def _only_text(param: str, value: Any) -> None:
    if value != ["text"]:
        raise bad_request(f'`{param}` can only be ["text"]', param, "unsupported_value")


_FIELDS: dict[str, Check] = {
    "modalities": _only_text,
    "response_format": response_format,
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": checks.flag,
    "logprobs": checks.flag,
    "top_logprobs": checks.integer(0, 20),
    "chat_template_kwargs": checks.mapping,
}
# These say nothing that could change the answer of a model on this node.
INFORMING = frozenset(
    {
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "reasoning_effort", "verbosity"),
    }
)
SHARED = frozenset({"model", "stream", "stream_options", "n", "keep_alive", "max_tokens", *checks.SAMPLING_NAMES})
_KNOWN = frozenset({"messages", "max_completion_tokens", *SHARED, *_FIELDS, *INFORMING})
_UNSUPPORTED = {
    "functions": "describe them in `tools`",
    "function_call": "use `tool_choice`",
    "audio": "models here answer in text",
    "web_search_options": "models here know no web search",
}
