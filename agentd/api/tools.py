"""Function tools: their checks, and calls that are forced by a JSON Schema where a runtime does not force them itself.

llama.cpp passes over ``tool_choice: required``, and over the tools themselves where the template knows none. So a call
that must come is asked for in the prompt and bound by a schema over the tools, whatever the model::

    {"name": "get_weather", "arguments": {"city": "Paris"}}

and ``ToolCallReader`` turns that text into OpenAI's ``tool_calls`` while it arrives. Where the model may also answer in
words, the schema has one more branch: ``{"content": "..."}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentd.api.checks import mapping
from agentd.api.errors import bad_request
from agentd.api.schemas import embedded

MAX_TOOLS = 128
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY_OBJECT = {"type": "object"}


def tools(param: str, value: Any) -> list[dict[str, Any]]:
    """The ``tools`` of a request, checked."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise bad_request(f"`{param}` must be a list of at most {MAX_TOOLS} functions", param)
    checked = [_tool(f"{param}[{number}]", tool) for number, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise bad_request(f"`{param}` has two functions named {name!r}", param)
    return checked


def _tool(param: str, given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"`{param}` must be a function with a name: other tools are not known here", param)
    if not _NAME.fullmatch(function["name"]):
        raise bad_request(
            f"`{param}.function.name` must be 1 to 64 letters, digits, dots, dashes or underscores", param
        )
    if function.get("parameters") is not None:
        mapping(f"{param}.function.parameters", function["parameters"])
        embedded(function["parameters"], f"{param}.function.parameters", strict=bool(function.get("strict")))
    return {"type": "function", "function": function}


def tool_choice(param: str, value: Any) -> str | dict[str, Any]:
    """``none``, ``auto``, ``required``, or one function."""
    if value in ("none", "auto", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"`{param}` must be none, auto, required or a function", param)
    return {"type": "function", "function": {"name": function["name"]}}


def check_choice(body: Mapping[str, Any]) -> None:
    """That what ``tool_choice`` asks for is there."""
    choice, offered = body.get("tool_choice"), body.get("tools") or []
    if choice in (None, "none", "auto"):
        return
    if not offered:
        raise bad_request("`tool_choice` asks for a call, but there are no `tools`", "tool_choice")
    if isinstance(choice, dict) and choice["function"]["name"] not in [tool["function"]["name"] for tool in offered]:
        raise bad_request(f"`tool_choice` names {choice['function']['name']!r}, which is not in `tools`", "tool_choice")


def settle(body: Mapping[str, Any], *, native: bool) -> tuple[dict[str, Any], ToolCallReader | None]:
    """The body for the backend, and the reader of its answer where calls come as bound text.

    ``native``: the model's chat template lists tools, so that a call that may come is left to the runtime.
    """
    settled = dict(body)
    choice, offered = settled.get("tool_choice") or "auto", settled.get("tools") or []
    if not offered or choice == "none":
        for name in TOOL_FIELDS:
            settled.pop(name, None)
        return settled, None
    if choice == "auto" and native:
        return settled, None
    forced = choice != "auto"
    if not forced and (settled.get("response_format") or {}).get("type", "text") != "text":
        raise bad_request(
            "this model can't be given `tools` and a `response_format` together: leave one of them out",
            "response_format", "unsupported_value",
        )  # fmt: skip
    if isinstance(choice, dict):
        offered = [tool for tool in offered if tool["function"]["name"] == choice["function"]["name"]]
    _settle_stops(settled, forced)
    for name in TOOL_FIELDS:
        settled.pop(name, None)
    settled["messages"] = _introduced(_in_words(settled["messages"]), offered, forced)
    schema = {"name": "answer", "schema": _schema(offered, forced), "strict": True}
    settled["response_format"] = {"type": "json_schema", "json_schema": schema}
    return settled, ToolCallReader("stop" if isinstance(choice, dict) else "tool_calls")


def _settle_stops(settled: dict[str, Any], forced: bool) -> None:
    """A stop sequence is a matter of the words: inside a call, or in the JSON around the words, it would cut it off."""
    if forced:
        settled.pop("stop", None)
    elif any(not re.search(r"\w", stop) or re.search(r'[\x00-\x1f"\\]', stop) for stop in settled.get("stop", ())):
        raise bad_request(
            "this model can't be given `tools` together with a `stop` of line ends, quotes or signs only: leave one of "
            "them out", "stop", "unsupported_value",
        )  # fmt: skip


def _schema(offered: Sequence[Mapping[str, Any]], forced: bool) -> dict[str, Any]:
    """A schema over the tools. The parameters of each stand under ``$defs``, where their own references find them."""
    branches: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(offered):
        function = tool["function"]
        place = f"tool{number}"
        parameters = {**_ANY_OBJECT, **(function.get("parameters") or {})}
        strict = bool(function.get("strict"))
        definitions[place] = embedded(parameters, "tools", strict=strict, root=f"#/$defs/{place}")
        branches.append(_shape({"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}}))
    if not forced:
        branches.append(_shape({"content": {"type": "string"}}))
    return {"anyOf": branches, "$defs": definitions}


def _shape(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def _introduced(
    messages: Sequence[Mapping[str, Any]], offered: Sequence[Mapping[str, Any]], forced: bool
) -> list[Mapping[str, Any]]:
    """The messages with the tools told in front."""
    functions = json.dumps([tool["function"] for tool in offered], ensure_ascii=False)
    words = f'You can call these functions:\n{functions}\nTo call one, answer {{"name": ..., "arguments": {{...}}}}.'
    words += " Call one now." if forced else ' To answer in words instead, write {"content": "..."}.'
    first = messages[0] if messages else {}
    if first.get("role") == "system":
        return [{**first, "content": f"{first['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _in_words(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Earlier calls and their results as plain texts, for templates that know neither."""
    names: dict[str, str] = {}
    told: list[Mapping[str, Any]] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            names |= {call.get("id") or "": call["function"]["name"] for call in calls}
            lines = [f'{{"name": {json.dumps(call["function"]["name"])}, "arguments": {call["function"]["arguments"]}}}'
                     for call in calls]  # fmt: skip
            told.append({"role": "assistant", "content": "\n".join([message["content"], *lines]).strip()})
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), "the function")
            told.append({"role": "user", "content": f"Result of {name}: {message['content']}"})
        else:
            told.append(message)
    return told


class ToolCallReader:
    """Turns the bound text into deltas while it arrives. The grammar allows white space, so states are needed:

    ``head`` (up to the arguments or the content), ``arguments`` (passed on until their object closes), ``content``
    (a JSON string, passed on decoded), ``end``.
    """

    _HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')
    _WORDS = re.compile(r'\s*\{\s*"content"\s*:\s*"')

    def __init__(self, reason: str) -> None:
        # The finish reason of a complete call.
        self._reason = reason
        self._state = "head"
        self._held = ""
        self._called = False
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def fresh(self) -> ToolCallReader:
        """One for another answer of the same kind."""
        return ToolCallReader(self._reason)

    def feed(self, text: str, call_id: str) -> list[dict[str, Any]]:
        """The deltas that ``text`` completes; ``call_id`` is used for a call that begins."""
        self._held += text
        made: list[dict[str, Any]] = []
        if self._state == "head":
            if found := self._HEAD.match(self._held):
                self._state, self._held = "arguments", self._held[found.end() :]
                self._called = True
                function = {"name": json.loads(found[1]), "arguments": ""}
                made.append({"tool_calls": [{"index": 0, "id": call_id, "type": "function", "function": function}]})
            elif found := self._WORDS.match(self._held):
                self._state, self._held = "content", self._held[found.end() :]
        if self._state == "arguments" and (piece := self._arguments()):
            made.append({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        elif self._state == "content" and (piece := self._content()):
            made.append({"content": piece})
        return made

    def finish_reason(self, reason: str) -> str:
        """The reason that fits what was read: OpenAI says ``tool_calls``, and ``stop`` for a function by name."""
        return self._reason if self._called and self._state == "end" and reason == "stop" else reason

    def _arguments(self) -> str:
        """The part of what is held that belongs to the arguments; their closing brace ends them."""
        taken, self._held = self._held, ""
        for place, char in enumerate(taken):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = char == "\\", char != '"'
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "end"
                    return taken[: place + 1]
        return taken

    def _content(self) -> str:
        """The decoded text that is complete; half an escape is held back."""
        end = 0
        while end < len(self._held) and self._held[end] != '"':
            step = 1
            if self._held[end] == "\\":
                step = 6 if self._held[end + 1 : end + 2] == "u" else 2
                if self._held[end : end + 4].lower() in ("\\ud8", "\\ud9", "\\uda", "\\udb"):
                    step = 12  # a surrogate pair
            if end + step > len(self._held):
                break
            end += step
        piece, rest = self._held[:end], self._held[end:]
        if rest.startswith('"'):
            self._state = "end"
        self._held = rest
        try:
            return str(json.loads(f'"{piece}"', strict=False))
        except ValueError:
            return piece
