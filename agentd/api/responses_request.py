"""What a request to ``/v1/responses`` may hold, turned into the chat that it stands for.

Stateless: nothing of an answer is kept, so everything that names an earlier one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentd.api import checks
from agentd.api.errors import ApiError, bad_request
from agentd.api.tools import check_choice, tool_choice, tools
from agentd.api.validation import INFORMING, content_text, keep_alive_s, messages, token_limit

_TEXT_PARTS = ("input_text", "output_text", "text")
_NOT_STORED = "this node stores no responses: send the whole conversation in `input`"
_KNOWN = frozenset(
    {
        *("model", "input", "instructions", "stream", "stream_options", "max_output_tokens", "text", "tools"),
        *("tool_choice", "parallel_tool_calls", "top_logprobs", "include", "truncation", "background", "keep_alive"),
        *("store", "reasoning", "max_tool_calls", *INFORMING, *checks.SAMPLING_NAMES),
    }
)
_UNSUPPORTED = {
    "previous_response_id": _NOT_STORED,
    "conversation": _NOT_STORED,
    "prompt": "write the prompt into `instructions`",
}
_LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A checked request. ``body`` is that of a chat; ``given`` what the answer repeats."""

    model: str
    stream: bool
    body: dict[str, Any]
    repeated: Mapping[str, Any]
    keep_alive_s: float | None


def parse(raw: bytes) -> ResponseRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    given = checks.parse_object(raw)
    model = checks.model_name(given)
    checks.refuse_unknown(given, _KNOWN, _UNSUPPORTED)
    _refuse_state(given)
    body: dict[str, Any] = {"messages": _messages(given), **checks.sampling(given)}
    if (limit := token_limit(given, "max_output_tokens")) is not None:
        body["max_tokens"] = limit
    if given.get("tools"):
        body["tools"] = tools("tools", _chat_tools(given["tools"]))
    if given.get("tool_choice") is not None:
        body["tool_choice"] = _choice(given["tool_choice"])
    check_choice(body)
    if (form := _format(given.get("text"))) is not None:
        body["response_format"] = form
    if _LOGPROBS in _include(given):
        body["logprobs"] = True
        body["top_logprobs"] = checks.integer(0, 20)("top_logprobs", given.get("top_logprobs") or 0)
    elif given.get("top_logprobs"):
        raise bad_request(f'`top_logprobs` needs `include: ["{_LOGPROBS}"]`', "top_logprobs")
    stream = given.get("stream") is not None and checks.flag("stream", given["stream"])
    return ResponseRequest(model, stream, body, _repeated(given), keep_alive_s(given))


def _refuse_state(given: Mapping[str, Any]) -> None:
    if given.get("store") is not None and checks.flag("store", given["store"]):
        raise ApiError(400, "unsupported_value", f"`store` can't be true: {_NOT_STORED}", "store")
    if given.get("background") is not None and checks.flag("background", given["background"]):
        raise ApiError(400, "unsupported_value", "`background` can't be true: nothing is kept to ask for later",
                       "background")  # fmt: skip
    if given.get("truncation") not in (None, "disabled"):
        raise ApiError(400, "unsupported_value", "`truncation` can only be disabled: nothing is cut in silence here",
                       "truncation")  # fmt: skip


def _include(given: Mapping[str, Any]) -> list[Any]:
    include = given.get("include") or []
    if not isinstance(include, list):
        raise bad_request("`include` must be a list", "include")
    return include


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chat: instructions first, then the input's items."""
    chat: list[dict[str, Any]] = []
    if given.get("instructions") is not None:
        chat.append({"role": "system", "content": checks.text("instructions", given["instructions"])})
    items = given.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise bad_request("`input` must be text or a list of at least one item", "input")
    for number, item in enumerate(items):
        _add(chat, f"input[{number}]", item)
    if not chat:
        raise bad_request("`input` has nothing to answer", "input")
    return messages(chat)


def _add(chat: list[dict[str, Any]], param: str, item: Any) -> None:
    if not isinstance(item, dict):
        raise bad_request(f"`{param}` must be an object", param)
    match item.get("type", "message"):
        case "message":
            content = content_text(f"{param}.content", item.get("content"), _TEXT_PARTS)
            if item.get("role") not in ("system", "developer", "user", "assistant"):
                raise bad_request(f"`{param}.role` must be system, developer, user or assistant", f"{param}.role")
            chat.append({"role": item["role"], "content": content})
        case "function_call":
            function = {name: checks.text(f"{param}.{name}", item.get(name)) for name in ("name", "arguments")}
            call_id = checks.text(f"{param}.call_id", item.get("call_id"))
            call = {"id": call_id, "type": "function", "function": function}
            if chat and chat[-1]["role"] == "assistant":
                chat[-1].setdefault("tool_calls", []).append(call)
            else:
                chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
        case "function_call_output":
            output = content_text(f"{param}.output", item.get("output"), _TEXT_PARTS)
            call_id = checks.text(f"{param}.call_id", item.get("call_id"))
            chat.append({"role": "tool", "tool_call_id": call_id, "content": output})
        case "reasoning":
            pass  # what a model thought is no part of what was said
        case "item_reference":
            raise bad_request(f"`{param}` refers to a stored item: {_NOT_STORED}", param, "unsupported_value")
        case kind:
            raise bad_request(f"`{param}` is of type {kind!r}, which is not understood here", param,
                              "unsupported_value")  # fmt: skip


def _chat_tools(given: Any) -> Any:
    """Tools as chats have them: the function's fields one level deeper."""
    if not isinstance(given, list):
        return given
    return [
        {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
        if isinstance(tool, dict) and tool.get("type") == "function" else tool
        for tool in given
    ]  # fmt: skip


def _choice(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type") == "function":
        given = {"type": "function", "function": {"name": given.get("name")}}
    return tool_choice("tool_choice", given)


def _format(text: Any) -> dict[str, Any] | None:
    form = (checks.mapping("text", text) if text is not None else {}).get("format")
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema" if isinstance(form.get("schema"), dict):
            named = {"name": str(form.get("name", "answer")), "strict": True, "schema": form["schema"]}
            return {"type": "json_schema", "json_schema": named}
        case "json_schema":
            raise bad_request("`text.format.schema` must be a JSON Schema object", "text.format.schema")
    raise bad_request("`text.format.type` must be text, json_object or json_schema", "text.format.type")


def _repeated(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that OpenAI's response object repeats, with their defaults."""
    defaults: dict[str, Any] = {
        "instructions": None, "max_output_tokens": None, "parallel_tool_calls": True, "temperature": None,
        "tool_choice": "auto", "tools": [], "top_p": None, "metadata": {}, "text": {"format": {"type": "text"}},
        "truncation": "disabled", "reasoning": None, "user": None,
    }  # fmt: skip
    kept = {name: default if given.get(name) is None else given[name] for name, default in defaults.items()}
    return {**kept, "store": False, "background": False, "previous_response_id": None}
