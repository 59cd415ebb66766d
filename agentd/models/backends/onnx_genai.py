"""ONNX Runtime's ``onnxruntime-genai``: one sequence at a time.

It holds the GIL through each token and each prefill chunk, so the prompt is read in chunks of ``prefill_chunk``
tokens: between two of them the worker's other threads see a cancellation and send heartbeats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime_genai as genai

from agentd.models.backends.base import Finish, Loaded, LoadSpec, RequestError, Sink, context_exceeded
from agentd.models.backends.stops import StopScanner

_DEFAULT_MAX_TOKENS = 512


class OnnxGenai:
    """Serves a folder with ``genai_config.json``."""

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.adapters or spec.draft:
            raise ValueError("adapters and draft models are not supported by this backend yet: leave them out")
        if spec.kv_type not in ("", "f16", "f32"):
            raise ValueError(f"the key-value cache type of an ONNX model is fixed: {spec.kv_type!r} can't be used")
        genai.disable_telemetry_events()
        config = genai.Config(str(spec.entry))
        threads = {"intra_op_num_threads": spec.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = genai.Model(config)
        self._tokenizer = genai.Tokenizer(self._model)
        self._context = spec.context_tokens
        self._chunk = spec.prefill_chunk
        return Loaded(slots=1, context_tokens=spec.context_tokens)

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        _refuse_unsupported(body)
        tokens = self._prompt(body)
        generator = self._generator(body, len(tokens))
        started = time.monotonic()
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            generator.append_tokens(part)
            if sink.progress(len(part)):
                return Finish("cancelled", len(tokens), 0, prefill_s=time.monotonic() - started)
        prefilled = time.monotonic()
        reason, count = self._decode(generator, body, sink)
        return Finish(
            reason,
            prompt_tokens=len(tokens),
            output_tokens=count,
            prefill_s=prefilled - started,
            decode_s=time.monotonic() - prefilled,
        )

    def _prompt(self, body: Mapping[str, Any]) -> Any:
        """Token ids of the whole prompt, as the array that the runtime gives."""
        try:
            messages = json.dumps([_plain(message) for message in body["messages"]])
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except RuntimeError as error:
            raise RequestError(
                "invalid_request", f"the model's chat template can't take these messages: {error}"
            ) from None
        tokens = self._tokenizer.encode(text)
        if len(tokens) >= self._context:
            raise context_exceeded(len(tokens), self._context)
        return tokens

    def _generator(self, body: Mapping[str, Any], prompt_tokens: int) -> Any:
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or _DEFAULT_MAX_TOKENS
        parameters = genai.GeneratorParams(self._model)
        options = _search_options(body)
        # Room for keys and values is taken at once for max_length tokens: no more than this request can use.
        parameters.set_search_options(max_length=min(self._context, prompt_tokens + int(limit)), **options)
        try:
            if guidance := _guidance(body):
                parameters.set_guidance(*guidance)
            return genai.Generator(self._model, parameters)
        except RuntimeError as error:
            raise RequestError("invalid_request", f"the model can't take this request: {error}") from None

    def _decode(self, generator: Any, body: Mapping[str, Any], sink: Sink) -> tuple[str, int]:
        """Stream the answer; why it ended, and its tokens."""
        stream = self._tokenizer.create_stream()
        ends = {int(token) for token in self._tokenizer.eos_token_ids}
        scanner = StopScanner(_stops(body))
        count = waiting = 0
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                break
            count += 1
            waiting += 1
            text = scanner.feed(stream.decode(token))
            if scanner.found:
                if text:
                    sink.text(text, waiting)
                return "stop", count
            # A token that is half a character has no text yet; its cancellation is seen all the same.
            cancelled = sink.text(text, waiting) if text else sink.progress(1)
            waiting = 0 if text else waiting
            if cancelled:
                return "cancelled", count
        else:
            token = -1
        if rest := scanner.rest():
            sink.text(rest, waiting)
        return ("stop" if token in ends else "length"), count

    def embed(self, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
        raise RequestError("unsupported", "this model was made for text generation; it gives no embeddings")

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def stats(self) -> Mapping[str, float]:
        return {}

    def stop(self) -> None:
        """Nothing of this runtime outlives the process."""


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    for key in ("tools", "logprobs", "top_logprobs"):
        if body.get(key):
            raise RequestError("unsupported", f"a model of format onnx-genai can't serve {key!r}: leave it out")


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """Role and text; a content of several text parts is joined."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return {"role": str(message.get("role", "user")), "content": content}


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _search_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's sampling options as the runtime calls them. Temperature 0 is greedy."""
    temperature = body.get("temperature")
    temperature = 1.0 if temperature is None else float(temperature)
    if temperature <= 0:
        return {"do_sample": False}
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    for theirs, ours, kind in (
        ("top_p", "top_p", float),
        ("top_k", "top_k", int),
        ("min_p", "min_p", float),
        ("seed", "random_seed", int),
        ("repeat_penalty", "repetition_penalty", float),
    ):
        if (value := body.get(theirs)) is not None:
            options[ours] = kind(value)
    return options


def _guidance(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """Constraint on the answer's form: kind and text."""
    form = body.get("response_format") or {}
    match form.get("type", "text"):
        case "text":
            return None
        case "json_object":
            return "json_schema", json.dumps({"type": "object"})
        case "json_schema":
            return "json_schema", json.dumps((form.get("json_schema") or {}).get("schema") or {})
        case other:
            raise RequestError("invalid_request", f"unknown response_format type {other!r}")
