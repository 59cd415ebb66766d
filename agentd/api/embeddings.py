"""``POST /v1/embeddings``: vectors of texts, as numbers or as base64 of little-endian float32."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentd.agents.router import compose
from agentd.api import checks
from agentd.api.errors import bad_request
from agentd.api.serving import Serving
from agentd.api.sse import JSON_HEADERS, SendBody, SendStart, compact
from agentd.api.validation import INFORMING, keep_alive_s

# OpenAI's limit.
MAX_INPUTS = 2048
_KNOWN = frozenset({"model", "input", "encoding_format", "dimensions", "keep_alive", *INFORMING})


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A checked request."""

    model: str
    inputs: list[str]
    base64: bool
    dimensions: int | None
    keep_alive_s: float | None


def parse(raw: bytes) -> EmbeddingRequest:
    """Check the bytes of a request. Raises ApiError (400)."""
    given = checks.parse_object(raw)
    model = checks.model_name(given)
    checks.refuse_unknown(given, _KNOWN, {})
    form = given.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise bad_request("`encoding_format` must be float or base64", "encoding_format")
    size = given.get("dimensions")
    dimensions = None if size is None else checks.integer(1, 2**20)("dimensions", size)
    return EmbeddingRequest(model, _inputs(given.get("input")), form == "base64", dimensions, keep_alive_s(given))


def _inputs(given: Any) -> list[str]:
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not inputs:
        raise bad_request("`input` must be text or a list of texts", "input")
    if not all(isinstance(one, str) for one in inputs):
        raise bad_request("`input` must be text: token ids are not taken", "input", "unsupported_value")
    if len(inputs) > MAX_INPUTS:
        raise bad_request(f"`input` has {len(inputs)} texts; at most {MAX_INPUTS} are taken", "input")
    if not all(inputs):
        raise bad_request("`input` has an empty text", "input")
    return inputs


class Embeddings:
    """Answers embedding requests."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def answer(self, request: EmbeddingRequest, relayed: bool, start: SendStart, body: SendBody) -> None:
        """Answer one checked request. Raises ApiError."""
        target, key = self._serving.bare_model(request.model, relayed, "/v1/embeddings")
        generation = compose(target, {}, keep_alive_s=request.keep_alive_s)
        async with self._serving.turn(target, generation) as turn:
            vectors = await turn.embed(generation, request.inputs)
        size = len(vectors.values[0])
        if request.dimensions not in (None, size):
            raise bad_request(
                f"`dimensions` can only be {size} for {request.model!r}: its vectors can't be cut", "dimensions",
                "unsupported_value",
            )  # fmt: skip
        encode = _base64 if request.base64 else list
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": number, "embedding": encode(vector)}
                for number, vector in enumerate(vectors.values)
            ],
            "model": request.model,
            "usage": {"prompt_tokens": vectors.prompt_tokens, "total_tokens": vectors.prompt_tokens},
            "slmfleet": {"model": str(key)},
        }
        await start(200, JSON_HEADERS)
        await body(compact(answer).encode(), False)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
