"""How much memory a worker will take, estimated from the model's shape before it is spawned. Pure.

``weights + keys and values of the whole context + compute buffers + the runtime itself``. The constants were fitted
to workers measured with SmolLM2-135M (GGUF Q4_1: 199 MB at 2,048 tokens); what was measured on this device replaces
the estimate from the second load on.
"""

from __future__ import annotations

from dataclasses import dataclass

from slmfleet.modelfiles import ModelFacts
from slmfleet.units import format_size

# Bytes of one element of the key-value cache, block overhead included.
KV_ELEMENT_BYTES = {"": 2.0, "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}
# Of a model whose runtime has no choice: int4 models for processors keep keys and values as float32.
_KV_DEFAULT = {"onnx-genai": "f32"}
# An interpreter with its runtime loaded and no model: private memory of a worker with a model of 200 kB.
RUNTIME_BYTES = {"gguf": 34 * 10**6, "onnx-genai": 62 * 10**6, "onnx": 58 * 10**6, "upstream": 24 * 10**6}
_RUNTIME_BYTES_DEFAULT = 32 * 10**6
# genai unpacks weights while it prefills and keeps part of that: 199 MB resident for 90 MB on disk.
# onnxruntime unfolds an encoder's int8 weights to float32: 107 MB resident for MiniLM's 23 MB.
_WEIGHT_FACTOR = {"onnx-genai": 1.3, "onnx": 4.7}
# An encoder reads at most so many tokens at once, padding included; its states and attention then take this many
# floats for each token and each element of the state (MiniLM: 215 MB).
_ENCODER_TOKENS, _ENCODER_FLOATS = 512, 280


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by cause."""

    weights: int
    kv_cache: int
    compute: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute + self.runtime

    def __str__(self) -> str:
        return (
            f"{format_size(self.total)} ({format_size(self.weights)} weights, {format_size(self.kv_cache)} context, "
            f"{format_size(self.compute)} buffers, {format_size(self.runtime)} runtime)"
        )


def estimate(
    model_format: str,
    weight_bytes: int,
    facts: ModelFacts | None,
    *,
    context_tokens: int,
    slots: int = 1,
    kv_type: str = "",
    prefill_chunk: int = 128,
) -> Estimate:
    """Memory of one worker, in bytes. ``facts`` None (a format whose files say nothing): weights and runtime only."""
    runtime = RUNTIME_BYTES.get(model_format, _RUNTIME_BYTES_DEFAULT)
    weights = int(weight_bytes * _WEIGHT_FACTOR.get(model_format, 1.0))
    if facts is None:
        return Estimate(weights=weights, kv_cache=0, compute=0, runtime=runtime)
    element = KV_ELEMENT_BYTES.get(kv_type or _KV_DEFAULT.get(model_format, ""), 2.0)
    per_token = sum(facts.kv_heads) * (facts.key_size + facts.value_size) * element
    # Logits of a chunk and a handful of activations as float32.
    compute = prefill_chunk * 4 * (facts.vocabulary + 16 * facts.embedding)
    if model_format == "onnx":
        compute = min(context_tokens, _ENCODER_TOKENS) * 4 * _ENCODER_FLOATS * facts.embedding
    return Estimate(
        weights=weights,
        kv_cache=int(per_token * context_tokens * slots),
        compute=compute,
        runtime=runtime,
    )


def context_for(asked_tokens: int, facts: ModelFacts | None, default_tokens: int) -> int:
    """Context to load with: what was asked for or the default, never more than the model was trained for."""
    wanted = asked_tokens or default_tokens
    trained = facts.context_tokens if facts else 0
    return min(wanted, trained) if trained else wanted
