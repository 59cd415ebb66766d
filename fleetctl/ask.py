"""A question through the gateway with the OpenAI protocol, the answer as it comes.

Protocol: https://platform.openai.com/docs/api-reference/chat-streaming; the fields that slmfleet adds stand in
docs/architecture.md ("Names of what can be called").
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetctl.client import Client
from fleetctl.errors import Problem, problem


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Seconds count from just before the request was sent.

    ``tokens_per_second`` is the node's own figure where it gave one, else what was seen here; None when unknown.
    """

    text: str
    node: str
    replica: str
    model: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    total_s: float
    tokens_per_second: float | None

    def facts(self) -> dict[str, Any]:
        """What ``fleetctl ask -o json`` prints."""
        return {
            "answer": self.text,
            "node": self.node,
            "replica": self.replica,
            "model": self.model,
            "finishReason": self.finish_reason,
            "promptTokens": self.prompt_tokens,
            "outputTokens": self.output_tokens,
            "firstTokenSeconds": round(self.first_token_s, 6),
            "totalSeconds": round(self.total_s, 6),
            "tokensPerSecond": self.tokens_per_second,
        }

    def summary(self) -> str:
        """``edge-1 · 8 tokens · 52.1 tokens/s · first after 0.21 s``."""
        parts = [self.node or "unknown node", f"{self.output_tokens} token{'' if self.output_tokens == 1 else 's'}"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        parts.append(f"first after {self.first_token_s:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        return " · ".join(parts)


def model_names(target: str) -> tuple[str, ...]:
    """What ``model`` may say in the request, best first: a bare name is an agent's, else a deployment's or a model's;
    ``agent/x`` and ``model/x`` leave no choice."""
    if target.startswith("model/"):
        return (target.removeprefix("model/"),)
    return (target,) if "/" in target else (f"agent/{target}", target)


def ask(
    client: Client,
    target: str,
    messages: Sequence[Mapping[str, str]],
    on_text: Callable[[str], None],
    options: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
) -> Answer:
    """Ask and call ``on_text`` with each piece of the answer.

    Raises Problem when the gateway refuses or the answer breaks off, Unreachable when nothing answers.
    """
    *names, last = model_names(target)
    for name in names:
        try:
            return _ask(client, name, messages, on_text, options, timeout_s)
        except Problem as problem:
            if problem.status != 404:
                raise
    return _ask(client, last, messages, on_text, options, timeout_s)


def _ask(
    client: Client,
    model: str,
    messages: Sequence[Mapping[str, str]],
    on_text: Callable[[str], None],
    options: Mapping[str, Any] | None,
    timeout_s: float,
) -> Answer:
    body = {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        **(options or {}),
    }
    started = time.monotonic()
    first = 0.0
    pieces: list[str] = []
    seen: dict[str, Any] = {}
    with client.chat(body, timeout_s) as response:
        for chunk in chunks(response.iter_lines()):
            if piece := _take(chunk, seen):
                first = first or time.monotonic() - started
                pieces.append(piece)
                on_text(piece)
        total = time.monotonic() - started
        headers = response.headers
    usage, own = seen.get("usage", {}), seen.get("slmfleet", {})
    tokens = int(usage.get("completion_tokens", 0))
    rate = own.get("tokens_per_second")
    if rate is None and tokens > 1 and total > first:
        rate = (tokens - 1) / (total - first)
    return Answer(
        text="".join(pieces),
        node=headers.get("x-slmfleet-node", ""),
        replica=headers.get("x-slmfleet-replica", ""),
        model=str(own.get("model", "")),
        finish_reason=str(seen.get("finish_reason", "")),
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        output_tokens=tokens,
        first_token_s=first or total,
        total_s=total,
        tokens_per_second=rate,
    )


def chunks(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream up to ``[DONE]``.

    Raises Problem for an error object in the stream, and for a stream that ends without ``[DONE]``.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise Problem(502, "the answer broke off: the server sent something that is no JSON") from None
        if "error" in chunk:
            raise problem(502, chunk, "the answer broke off")
        yield chunk
    raise Problem(502, "the answer broke off before its end; ask again")


def _take(chunk: Mapping[str, Any], seen: dict[str, Any]) -> str:
    """Note what a chunk says of the whole answer, and return its text."""
    for key in ("usage", "slmfleet"):
        if chunk.get(key):
            seen[key] = chunk[key]
    text = ""
    for choice in chunk.get("choices") or ():
        if choice.get("finish_reason"):
            seen["finish_reason"] = choice["finish_reason"]
        text += (choice.get("delta") or {}).get("content") or ""
    return text
