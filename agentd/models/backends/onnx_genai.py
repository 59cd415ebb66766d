"""ONNX Runtime's ``onnxruntime-genai``: one sequence at a time.

It holds the GIL through each token and each prefill chunk, so the prompt is read in chunks of ``prefill_chunk``
tokens: between two of them the worker's other threads see a cancellation and send heartbeats.

The generator of the last request is kept: a request that begins alike (an agent's instructions, a conversation that
goes on) rewinds it to where they part. It holds keys and values of one sequence, which the memory estimate counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from agentd.models.backends.base import (
    Finish,
    Loaded,
    LoadSpec,
    RequestError,
    Sink,
    context_exceeded,
    refuse_several,
)
from agentd.models.backends.release import give_back
from agentd.models.backends.schema import constraint
from agentd.models.backends.stops import StopScanner

_DEFAULT_MAX_TOKENS = 512
# Room for keys and values is taken at once, in powers of two from here: so that a conversation that grows finds room.
_LEAST_ROOM_TOKENS = 512
# A shorter common beginning is not worth a rewind.
_LEAST_PREFIX_TOKENS = 16
# Reading more than this leaves free memory behind that is worth giving back.
_RELEASE_TOKENS = 256
# What llguidance accepts without enforcing it.
_UNENFORCED = frozenset(
    {
        *("minProperties", "maxProperties", "propertyNames", "contains", "minContains", "maxContains"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        "$dynamicRef",
    }
)


@dataclass(slots=True)
class _Kept:
    """A generator between two requests. ``options``: what it was made with and can't be changed in it."""

    generator: Any
    options: tuple[Any, ...]
    room_tokens: int


class OnnxGenai:
    """Serves a folder with ``genai_config.json``."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._reused_tokens = 0

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
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or _DEFAULT_MAX_TOKENS)
        limit = min(limit, self._context - len(tokens))
        # Taken out while it is used: whatever goes wrong in between, it is not used again.
        kept, self._kept = self._kept, None
        started = time.monotonic()
        kept, cached = self._generator(body, tokens, limit, kept)
        for start in range(cached, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            kept.generator.append_tokens(part)
            if sink.progress(len(part)):
                self._kept = kept
                return Finish("cancelled", len(tokens), 0, cached, prefill_s=time.monotonic() - started)
        prefilled = time.monotonic()
        if len(tokens) - cached > _RELEASE_TOKENS:
            give_back()
        reason, count = self._decode(kept.generator, body, limit, sink)
        self._kept = kept
        self._reused_tokens += cached
        return Finish(
            reason,
            prompt_tokens=len(tokens),
            output_tokens=count,
            cached_tokens=cached,
            prefill_s=prefilled - started,
            decode_s=time.monotonic() - prefilled,
        )

    def _prompt(self, body: Mapping[str, Any]) -> Any:
        """Token ids of the whole prompt, as the array that the runtime gives."""
        tokens = self._tokenizer.encode(body["prompt"] if "prompt" in body else self._templated(body["messages"]))
        if len(tokens) >= self._context:
            raise context_exceeded(len(tokens), self._context)
        return tokens

    def _templated(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            plain = json.dumps([_plain(message) for message in messages])
            return str(self._tokenizer.apply_chat_template(plain, add_generation_prompt=True))
        except RuntimeError as error:
            raise RequestError(
                "invalid_request", f"the model's chat template can't take these messages: {error}"
            ) from None

    def _generator(self, body: Mapping[str, Any], tokens: Any, limit: int, kept: _Kept | None) -> tuple[_Kept, int]:
        """A generator that has read the beginning of ``tokens``, and how many of them: 0 for a new one."""
        search = _search_options(body)
        schema = constraint(body, _UNENFORCED)
        guidance = None if schema is None else json.dumps(schema, sort_keys=True)
        options = (tuple(sorted(search.items())), guidance)
        needed = len(tokens) + limit
        # A seed promises the same answer again, so its chance must begin anew.
        if kept is not None and kept.options == options and kept.room_tokens >= needed and "random_seed" not in search:
            cached = _common_prefix(kept.generator.get_sequence(0), tokens)
            if cached >= _LEAST_PREFIX_TOKENS:
                kept.generator.rewind_to(cached)
                return kept, cached
        # Free the old one's memory before the new one takes its own.
        del kept
        room = min(self._context, max(_LEAST_ROOM_TOKENS, 1 << (needed - 1).bit_length()))
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=room, **search)
        try:
            if guidance is not None:
                parameters.set_guidance("json_schema", guidance)
            return _Kept(genai.Generator(self._model, parameters), options, room), 0
        except RuntimeError as error:
            if guidance is not None:
                raise RequestError("invalid_schema", f"the JSON Schema can't be used: {error}") from None
            raise RequestError("invalid_request", f"the model can't take this request: {error}") from None

    def _decode(self, generator: Any, body: Mapping[str, Any], limit: int, sink: Sink) -> tuple[str, int]:
        """Stream the answer of at most ``limit`` tokens; why it ended, and its tokens."""
        stream = self._tokenizer.create_stream()
        ends = {int(token) for token in self._tokenizer.eos_token_ids}
        scanner = StopScanner(_stops(body))
        logprobs = _Logprobs(self._tokenizer, int(body.get("top_logprobs") or 0)) if body.get("logprobs") else None
        count = waiting = 0
        while count < limit and not generator.is_done():
            if logprobs:
                logprobs.before(generator)
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in ends:
                break
            count += 1
            waiting += 1
            if logprobs:
                logprobs.after(token)
            text = scanner.feed(stream.decode(token))
            if scanner.found:
                if text:
                    sink.text(text, waiting, logprobs.take() if logprobs else None)
                return "stop", count
            # A token that is half a character has no text yet; its cancellation is seen all the same.
            cancelled = sink.text(text, waiting, logprobs.take() if logprobs else None) if text else sink.progress(1)
            waiting = 0 if text else waiting
            if cancelled:
                return "cancelled", count
        else:
            token = -1
        rest = scanner.rest()
        # Tokens that are half a character have no text, but chances.
        if rest or (logprobs and waiting):
            sink.text(rest, waiting, logprobs.take() if logprobs else None)
        return ("stop" if token in ends else "length"), count

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        raise RequestError("unsupported", "this model was made for text generation; it gives no embeddings")

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def stats(self) -> Mapping[str, float]:
        return {"prefix_tokens_reused": float(self._reused_tokens)}

    def stop(self) -> None:
        """Nothing of this runtime outlives the process."""


class _Logprobs:
    """OpenAI's ``logprobs`` of the tokens that were generated since the last ``take``."""

    def __init__(self, tokenizer: Any, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._scores: Any = None
        self._content: list[dict[str, Any]] = []

    def before(self, generator: Any) -> None:
        """Note the chances of the token that comes next."""
        scores = np.asarray(generator.get_logits(), dtype=np.float32).reshape(-1)
        scores = scores - scores.max()
        self._scores = scores - np.log(np.exp(scores).sum())

    def after(self, token: int) -> None:
        """It was this one."""
        best = np.argsort(-self._scores)[: self._top] if self._top else ()
        self._content.append({**self._entry(token), "top_logprobs": [self._entry(int(index)) for index in best]})

    def take(self) -> dict[str, Any]:
        content, self._content = self._content, []
        return {"content": content}

    def _entry(self, token: int) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": float(self._scores[token]), "bytes": list(text.encode())}


def _common_prefix(read: Any, tokens: Any) -> int:
    """How many tokens at the beginning are the same; one of ``tokens`` is always left to read."""
    size = min(len(read), len(tokens) - 1)
    differ = np.nonzero(np.asarray(read[:size]) != np.asarray(tokens[:size]))[0]
    return int(differ[0]) if len(differ) else max(size, 0)


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    refuse_several(body)
    for key in ("tools", "grammar", "logit_bias", "presence_penalty", "frequency_penalty"):
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
