"""llama.cpp out of the ``xllamacpp`` wheel: its server inside this process, called without HTTP.

The server also listens, always; here on a Unix socket in the worker's private working folder, which nobody else may
enter. Prompt tokens are read in batches of ``prefill_chunk``, and a cancellation is seen between two of them.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import xllamacpp

from agentd.models.backends.base import (
    Finish,
    Loaded,
    LoadSpec,
    RequestError,
    Sink,
    context_exceeded,
    input_too_long,
    refuse_several,
)
from agentd.models.backends.schema import constraint
from slmfleet.modelfiles.gguf import is_embedding_gguf

# What of a request reaches the server: it knows many more keys, some of which reach into its slots and files.
_PASSED = frozenset(
    {
        *("messages", "prompt", "max_tokens", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "typical_p"),
        *("response_format", "grammar", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs"),
        *("logit_bias", "presence_penalty", "frequency_penalty", "repeat_penalty", "repeat_last_n", "ignore_eos"),
        "chat_template_kwargs",
    }
)
# Keywords of JSON Schema that llama.cpp's grammar generator (common/json-schema-to-grammar.cpp) passes over in silence.
_UNENFORCED = frozenset(
    {
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties", "contains", "minContains", "maxContains", "uniqueItems"),
        *("multipleOf", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "pattern.unanchored"),
        *("number.minimum", "number.maximum", "number.exclusiveMinimum", "number.exclusiveMaximum"),
    }
)
# An input of an embedding model is read in one batch, whose buffers grow with it.
_MAX_EMBED_TOKENS = 2048
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large")
_SOCKET = "llama.sock"
_CACHE_TYPES = {
    "f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16", "bf16": "GGML_TYPE_BF16", "q8_0": "GGML_TYPE_Q8_0",
    "q4_0": "GGML_TYPE_Q4_0", "q4_1": "GGML_TYPE_Q4_1",
}  # fmt: skip


class LlamaCpp:
    """Serves a GGUF file."""

    def __init__(self) -> None:
        self._server: Any = None
        self._embeds = False
        self._context = 0

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.adapters or spec.draft:
            raise ValueError("adapters and draft models are not supported by this backend yet: leave them out")
        # Left by nobody but an earlier process in the same folder; a stale socket can't be bound again.
        if os.path.exists(_SOCKET):
            os.unlink(_SOCKET)
        self._embeds = is_embedding_gguf(spec.entry)
        self._context = min(spec.context_tokens, _MAX_EMBED_TOKENS) if self._embeds else spec.context_tokens
        parameters = _parameters(spec)
        if self._embeds:
            parameters.embedding = True
            parameters.n_ctx = self._context * spec.slots
            parameters.n_batch = parameters.n_ubatch = self._context
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError:
            # Its text is always the same; what went wrong stands on standard error, which agentd reads.
            raise RuntimeError("llama.cpp can't load the model") from None
        os.chmod(_SOCKET, 0o600)
        return Loaded(slots=spec.slots, context_tokens=self._context)

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        if self._embeds:
            raise RequestError("unsupported", "this model gives embeddings, no text: ask /v1/embeddings")
        refuse_several(body)
        schema = constraint(body, _UNENFORCED)
        answer = _Answer(sink)
        try:
            handle = self._server.handle_completions if "prompt" in body else self._server.handle_chat_completions
            handle(_request(body, schema), answer.take)
        except ValueError as error:
            # Raised before anything runs: a schema, grammar or template that does not compile.
            if schema is not None:
                raise RequestError("invalid_schema", f"the JSON Schema can't be used: {error}") from None
            raise RequestError("invalid_request", f"the model can't take this request: {error}") from None
        return answer.finish()

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        if not self._embeds:
            raise RequestError("unsupported", "this model was made for text generation; it gives no embeddings")
        vectors, tokens = [], 0
        # One at a time: an error then names its input, and a cancellation is seen between two of them.
        for index, text in enumerate(inputs):
            answer = self._server.handle_embeddings({"input": [text]})
            if error := answer.get("error"):
                raise self._embed_error(index, str(error.get("message", "")), error.get("code"))
            vectors.append(answer["data"][0]["embedding"])
            read = answer["usage"]["prompt_tokens"]
            tokens += read
            if sink.progress(read):
                break
        return vectors, tokens

    def _embed_error(self, index: int, message: str, code: Any) -> Exception:
        if found := _TOO_LARGE.search(message):
            return input_too_long(index, int(found[1]), self._context)
        if code == 400:
            return RequestError("invalid_request", f"input {index} can't be embedded: {message}")
        return RuntimeError(message)

    def count_tokens(self, text: str) -> int:
        connection = http.client.HTTPConnection("worker")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(_SOCKET)
        connection.request("POST", "/tokenize", json.dumps({"content": text}), {"content-type": "application/json"})
        tokens: list[int] = json.loads(connection.getresponse().read())["tokens"]
        connection.close()
        return len(tokens)

    def stats(self) -> Mapping[str, float]:
        return {}

    def stop(self) -> None:
        if os.path.exists(_SOCKET):
            os.unlink(_SOCKET)


def _parameters(spec: LoadSpec) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(spec.entry)
    parameters.hostnames = [_SOCKET]
    # 0 would mean the model's full context, whatever that costs.
    parameters.n_ctx = spec.context_tokens * spec.slots
    parameters.n_parallel = spec.slots
    parameters.n_batch = parameters.n_ubatch = spec.prefill_chunk
    # Default 8 GiB, which nobody counts. The prefix of the last request stays in the slot all the same.
    parameters.cache_ram_mib = 0
    parameters.n_ctx_checkpoints = 0
    # A prompt that does not fit is an error, never cut.
    parameters.ctx_shift = False
    # Would quietly shrink the context to what it believes is free; agentd's planner decides that.
    parameters.fit_params = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = spec.threads
    parameters.n_gpu_layers = spec.gpu_layers
    parameters.n_threads_http = 1
    parameters.endpoint_slots = False
    parameters.ui = False
    # Errors only: other lines tell of prompts.
    parameters.verbosity = 1
    if spec.numa:
        parameters.numa = getattr(xllamacpp.ggml_numa_strategy, f"GGML_NUMA_STRATEGY_{spec.numa.upper()}")
    if spec.lock_memory:
        parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP_MLOCK
    if spec.kv_type:
        if spec.kv_type not in _CACHE_TYPES:
            raise ValueError(f"unknown key-value cache type {spec.kv_type!r}: use one of {', '.join(_CACHE_TYPES)}")
        kind = getattr(xllamacpp.ggml_type, _CACHE_TYPES[spec.kv_type])
        parameters.cache_type_k = parameters.cache_type_v = kind
    return parameters


def _request(body: Mapping[str, Any], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    request = {key: value for key, value in body.items() if key in _PASSED and value is not None}
    request.pop("response_format", None)
    if schema is not None:
        # Of the forms that clients write, only these are constrained whatever is in them.
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}
        request |= {"json_schema": dict(schema)} if "prompt" in body else {"response_format": form}
    if (limit := body.get("max_completion_tokens")) is not None:
        request["max_tokens"] = limit
    request["stream"] = True
    request["stream_options"] = {"include_usage": True}
    # A callback after each prefill chunk: that is where a cancellation is seen.
    request["return_progress"] = True
    request["cache_prompt"] = True
    return request


class _Answer:
    """Takes the stream of one request apart."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._read = 0
        self._reason = "stop"
        self._error: Mapping[str, Any] | None = None
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    def take(self, part: Mapping[str, Any]) -> bool:
        """One chunk of the stream; True cancels."""
        if "error" in part:
            self._error = part["error"]
            return False
        if usage := part.get("usage"):
            self._usage, self._timings = usage, part.get("timings", {})
        if progress := part.get("prompt_progress"):
            step, self._read = progress["processed"] - self._read, progress["processed"]
            return self._sink.progress(step)
        cancelled = False
        for choice in part.get("choices", ()):
            if choice.get("finish_reason"):
                self._reason = choice["finish_reason"]
            # A completion has its text beside the index, a chat in its delta.
            delta = choice.get("delta") or {"content": choice.get("text")}
            if delta.keys() <= {"role", "content"}:
                if text := delta.get("content"):
                    cancelled = self._sink.text(text, 1, choice.get("logprobs"))
            else:
                cancelled = self._sink.delta(delta, 1, choice.get("logprobs"))
        return cancelled

    def finish(self) -> Finish:
        """What the stream came to. Raises RequestError or RuntimeError for an error in it."""
        if self._error is not None:
            if self._error.get("type") == "exceed_context_size_error":
                raise context_exceeded(self._error.get("n_prompt_tokens", 0), self._error.get("n_ctx", 0))
            message = str(self._error.get("message", "unknown error"))
            if self._error.get("code") == 400:
                raise RequestError("invalid_request", f"the model can't take this request: {message}")
            raise RuntimeError(message)
        return Finish(
            reason=self._reason,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            output_tokens=self._usage.get("completion_tokens", 0),
            cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            prefill_s=self._timings.get("prompt_ms", 0.0) / 1000,
            decode_s=self._timings.get("predicted_ms", 0.0) / 1000,
        )
