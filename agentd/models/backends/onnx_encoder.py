"""Embeddings and text classification with plain ``onnxruntime``.

An embedding model gives vectors. A classifier answers a chat: it reads the last message of the user, its answer is the
name of the likeliest label, and ``logprobs`` (with ``top_logprobs``) tell the others: so an agent, a router or any
OpenAI client can use it as it uses a text model.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tokenizers

from agentd.device.inventory import accelerators, cpu_model
from agentd.models.backends.base import (
    Finish,
    Loaded,
    LoadSpec,
    RequestError,
    Sink,
    input_too_long,
    refuse_several,
)
from agentd.models.backends.providers import choose_providers
from agentd.models.backends.release import give_back
from agentd.models.wire import MAX_FRAME_BYTES
from slmfleet.modelfiles.facts import CLASSIFY, EMBED
from slmfleet.modelfiles.onnx import MODEL, TOKENIZER, read_encoder

# Tokens with padding in one run: eight inputs of 512 tokens at once would need 600 MB for a model of 22 MB.
_BATCH_TOKENS = 512
# A run of more tokens than this leaves enough free memory behind that giving it back is worth a millisecond.
_TRIM_TOKENS = 128
_PROVIDER = "SLMFLEET_ONNX_PROVIDER"
_ERRORS_ONLY = 3


class OnnxEncoder:
    """Serves a folder with ``model.onnx`` and ``tokenizer.json``."""

    def load(self, spec: LoadSpec) -> Loaded:
        if spec.adapters or spec.draft or spec.kv_type:
            raise ValueError("an ONNX encoder has no adapters, draft model or key-value cache: leave them out")
        self._encoder = read_encoder(spec.entry)
        facts = self._encoder.facts
        self._context = min(spec.context_tokens, facts.context_tokens)
        self._session = _session(spec)
        self._tokenizer = _tokenizer(spec.entry / TOKENIZER)
        # Unpacking the weights leaves a third of the resident memory free but held.
        give_back()
        return Loaded(slots=1, context_tokens=self._context)

    def embed(self, inputs: Sequence[str], sink: Sink) -> tuple[list[list[float]], int]:
        size = self._encoder.facts.embedding
        if self._encoder.facts.task != EMBED:
            raise RequestError("unsupported", "this model is a classifier: it gives no embeddings; ask it in a chat")
        if len(inputs) * max(size, 1) * 4 > MAX_FRAME_BYTES // 2:
            raise RequestError("request_too_large", f"{len(inputs)} vectors at once are too many; send fewer inputs")
        encodings = self._encode(inputs)
        vectors: list[list[float]] = [[] for _ in inputs]
        for batch in _batches(encodings):
            chosen = [encodings[index] for index in batch]
            for index, vector in zip(batch, self._pool(self._run(chosen), chosen), strict=True):
                vectors[index] = vector.tolist()
            if sink.progress(sum(map(len, chosen))):
                break
        if max(map(len, encodings), default=0) > _TRIM_TOKENS or len(inputs) > 1:
            give_back()
        return vectors, sum(map(len, encodings))

    def generate(self, body: Mapping[str, Any], sink: Sink) -> Finish:
        facts = self._encoder.facts
        if facts.task != CLASSIFY:
            raise RequestError("unsupported", "this model gives embeddings, no text: ask /v1/embeddings")
        refuse_several(body)
        for key in ("tools", "response_format", "stop"):
            if body.get(key) and body[key] != {"type": "text"}:
                raise RequestError("unsupported", f"a classifier can't serve {key!r}: leave it out")
        started = time.monotonic()
        encodings = self._encode([_question(body)])
        logits = np.asarray(self._run(encodings)[0], dtype=np.float64)
        scores = logits - logits.max()
        scores -= np.log(np.exp(scores).sum())
        order = [int(index) for index in np.argsort(-scores, kind="stable")]
        logprobs = _logprobs(facts.labels, scores, order, body) if body.get("logprobs") else None
        sink.text(facts.labels[order[0]], 1, logprobs)
        return Finish("stop", len(encodings[0]), 1, prefill_s=time.monotonic() - started)

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)

    def stats(self) -> Mapping[str, float]:
        return {}

    def stop(self) -> None:
        """Nothing of this runtime outlives the process."""

    def _encode(self, inputs: Sequence[str]) -> list[list[int]]:
        """Token ids of each input. Nothing is cut: an input that does not fit is an error."""
        encodings = [encoding.ids for encoding in self._tokenizer.encode_batch(list(inputs))]
        for index, ids in enumerate(encodings):
            if len(ids) > self._context:
                raise input_too_long(index, len(ids), self._context)
            if not ids:
                raise RequestError("invalid_request", f"input {index} is empty")
        return encodings

    def _run(self, encodings: Sequence[Sequence[int]]) -> Any:
        """The model's output for a batch, padded to its longest."""
        width = max(map(len, encodings))
        ids = np.zeros((len(encodings), width), np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding
            mask[row, : len(encoding)] = 1
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return self._session.run([self._encoder.output], {name: given[name] for name in self._encoder.inputs})[0]

    def _pool(self, output: Any, encodings: Sequence[Sequence[int]]) -> Any:
        """One vector for each input, of float32."""
        output = np.asarray(output, dtype=np.float32)
        match self._encoder.pooling:
            case "mean":
                # Without the padding, which the mask kept out of the attention but not out of the states.
                pooled = np.stack(
                    [state[: len(ids)].mean(axis=0) for state, ids in zip(output, encodings, strict=True)]
                )
            case "cls":
                pooled = output[:, 0]
            case _:
                pooled = output
        if self._encoder.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return pooled


def _session(spec: LoadSpec) -> Any:
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(_ERRORS_ONLY)
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    # Threads that wait for work shall sleep: the processor belongs to others too.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The arena keeps the largest run's memory for ever; without it that is given back, at the same speed.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    choice = choose_providers(
        ort.get_available_providers(),
        frozenset(accelerators(Path("/dev"))) | _processor_kind(),
        platform.system(),
        os.environ.get(_PROVIDER, ""),
    )
    session = ort.InferenceSession(str(spec.entry / MODEL), options, providers=list(choice.providers))
    if session.get_providers()[0] != choice.providers[0]:
        print(f"{choice.providers[0]} ({choice.reason}) did not start: the processor is used", file=sys.stderr)
    return session


def _processor_kind() -> frozenset[str]:
    return frozenset({"intel"} if "intel" in cpu_model(Path("/proc/cpuinfo")).lower() else ())


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    # Its own threads would come on top of those that the model may use.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # What the exporter chose; cutting hides a loss, and padding is done per batch.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _batches(encodings: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of inputs to run together: of similar length, so that little is padding."""
    batch: list[int] = []
    for index in sorted(range(len(encodings)), key=lambda index: len(encodings[index])):
        # Sorted: the newest is the longest, and all are padded to it.
        if batch and (len(batch) + 1) * len(encodings[index]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _question(body: Mapping[str, Any]) -> str:
    """The text to classify: the last message of the user. What an agent's instructions say is for other models."""
    if isinstance(body.get("prompt"), str):
        return str(body["prompt"])
    messages = [message for message in body.get("messages", ()) if message.get("role") == "user"]
    if not messages:
        raise RequestError("invalid_request", "there is no message of a user to classify")
    content = messages[-1].get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return content


def _logprobs(labels: Sequence[str], scores: Any, order: Sequence[int], body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of the one "token" that the label is."""

    def entry(index: int) -> dict[str, Any]:
        return {"token": labels[index], "logprob": float(scores[index]), "bytes": list(labels[index].encode())}

    top = [entry(index) for index in order[: int(body.get("top_logprobs") or 0)]]
    return {"content": [{**entry(order[0]), "top_logprobs": top}]}
