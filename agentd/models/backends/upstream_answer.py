"""What an upstream server says, checked before a word of it is passed on. Pure: bytes in, values or errors out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from agentd.models.backends.base import RequestError, context_exceeded
from agentd.models.backends.http_client import UpstreamError

_FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
_MAX_TEXT = 400
_MAX_COUNT = 2**31
_MAX_CALLS = 256
_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error"}


def parse(data: bytes, what: str) -> Mapping[str, Any]:
    """A JSON object. Raises UpstreamError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamError(f"the upstream's {what} is no JSON") from None
    if not isinstance(value, dict):
        raise UpstreamError(f"the upstream's {what} is no JSON object")
    return value


def parse_any(text: str) -> None:
    """Raise UpstreamError unless ``text`` is JSON: the server was asked to constrain its answer to a schema."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise UpstreamError("the upstream ignores `response_format`: its answer is no JSON") from None


def error_of(status: int, data: bytes, retry_after: str, secret: str) -> Exception:
    """The exception for an answer that is not 200. ``secret`` is kept out of its text."""
    if 300 <= status < 400:
        return UpstreamError(f"the upstream redirects (status {status}); redirects are not followed: correct its url")
    error = _error_object(data)
    said = _said(error)
    if secret:
        said = said.replace(secret, "***")
    if error.get("code") in _CONTEXT_CODES or error.get("type") in _CONTEXT_CODES:
        tokens, context = count(error.get("n_prompt_tokens")), count(error.get("n_ctx"))
        if tokens and context:
            return context_exceeded(tokens, context)
        return RequestError("context_length_exceeded", f"the prompt does not fit into the upstream's context{said}")
    if status in (401, 403):
        return UpstreamError(f"the upstream refuses this node's key (status {status}): put a valid one into its file")
    if status == 429:
        return RequestError("upstream_busy", f"the upstream is busy{said}", 429, _seconds(retry_after, 5.0))
    if status == 503:
        return RequestError("upstream_unavailable", f"the upstream is not ready{said}", 503, _seconds(retry_after, 5.0))
    if status in (400, 404, 413, 422):
        return RequestError("invalid_request", f"the upstream can't take this request{said}")
    return UpstreamError(f"the upstream answered with status {status}{said}")


def _error_object(data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return _as_error(value) if isinstance(value, dict) else {}


def _as_error(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's error object; some servers write the message alone in its place."""
    error = value.get("error")
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


def _said(error: Mapping[str, Any]) -> str:
    """ ": " and what the server says, made fit for one line; "" if it says nothing."""
    said = "".join(c if c.isprintable() else " " for c in str(error.get("message", "")))[:_MAX_TEXT]
    return f": {said}" if said else ""


def _seconds(text: str, default: float) -> float:
    # A date is allowed too, but nobody sends one; clocks would have to agree.
    return min(float(text), 3600.0) if text.isascii() and text.isdecimal() and len(text) < 6 else default


def count(value: Any) -> int:
    """A plausible number of tokens; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT else 0


def models(data: bytes) -> list[str]:
    """Names in the answer to ``GET /models``. Raises UpstreamError."""
    listed = parse(data, "list of models").get("data")
    if not isinstance(listed, list):
        raise UpstreamError("the upstream's list of models has no `data`: it is no OpenAI-compatible server")
    return [item["id"] for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)]


def choice_of(event: Mapping[str, Any]) -> tuple[dict[str, Any], str, Any]:
    """Delta, finish reason ("" = goes on) and logprobs of a chunk; an empty delta if it has none."""
    if "error" in event:
        raise UpstreamError(f"the upstream failed{_said(_as_error(event))}")
    choices = event.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamError("the upstream's chunk has no list of `choices`")
    if not choices:
        return {}, "", None
    choice = choices[0]
    if choice.get("index", 0) != 0:
        raise UpstreamError("the upstream gives several answers to a request for one")
    reason = choice.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise UpstreamError("the upstream's `finish_reason` is no text")
    logprobs = choice.get("logprobs")
    reason = (reason if reason in _FINISH_REASONS else "stop") if reason else ""
    # A completion has its text beside the index, a chat in its delta.
    delta = _delta(choice["delta"] if "delta" in choice else {"content": choice.get("text")})
    return delta, reason, logprobs if isinstance(logprobs, dict) else None


def _delta(given: Any) -> dict[str, Any]:
    """What is known and of the right type; an empty text says nothing."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UpstreamError("the upstream's `delta` is no object")
    delta: dict[str, Any] = {}
    for name in ("content", "refusal", "reasoning_content"):
        value = given.get(name)
        if value is not None and not isinstance(value, str):
            raise UpstreamError(f"the upstream's `delta.{name}` is no text")
        if value:
            delta[name] = value
    calls = given.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or len(calls) > _MAX_CALLS:
            raise UpstreamError("the upstream's `delta.tool_calls` is no list, or far too long")
        delta["tool_calls"] = [_call(call) for call in calls]
    return delta


def _call(given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not 0 <= count(given.get("index", 0)) < _MAX_CALLS:
        raise UpstreamError("the upstream's tool call has no `function`, or an impossible index")
    texts = {name: function[name] for name in ("name", "arguments") if function.get(name) is not None}
    if not all(isinstance(text, str) for text in texts.values()):
        raise UpstreamError("the upstream's tool call has a name or arguments that are no text")
    call: dict[str, Any] = {"index": count(given.get("index", 0)), "function": texts}
    if isinstance(given.get("id"), str):
        call |= {"id": given["id"], "type": "function"}
    return call


def vectors(data: bytes, inputs: int) -> tuple[list[list[float]], int]:
    """Vectors of an answer to ``POST /embeddings``, in the order of the inputs, and its tokens."""
    answer = parse(data, "answer")
    listed = answer.get("data")
    if not isinstance(listed, list) or len(listed) != inputs:
        raise UpstreamError("the upstream gives another number of vectors than there are inputs")
    found: dict[int, list[float]] = {}
    for place, item in enumerate(listed):
        vector = item.get("embedding") if isinstance(item, dict) else None
        index = item.get("index", place) if isinstance(item, dict) else None
        if not _is_vector(vector) or not isinstance(index, int) or not 0 <= index < inputs or index in found:
            raise UpstreamError("the upstream's vectors are no lists of numbers, or are numbered wrongly")
        found[index] = list(map(float, vector))
    if len({len(vector) for vector in found.values()}) > 1:
        raise UpstreamError("the upstream's vectors differ in length")
    usage = answer.get("usage")
    tokens = count(usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
    return [found[index] for index in range(inputs)], tokens


def _is_vector(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) for number in value
    )  # fmt: skip
