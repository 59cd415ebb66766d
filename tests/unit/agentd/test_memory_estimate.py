"""What a worker will take, from the shape of its model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.memory import context_for, estimate
from slmfleet.modelfiles import ModelFacts

SMOLLM2 = ModelFacts("llama", 8192, 30, 576, (3,) * 30, 64, 64, 49152, True)
MB = 10**6


@pytest.mark.parametrize(
    ("model_format", "weights", "context", "measured_mb"),
    [("gguf", 98_362_432, 2048, 204), ("onnx-genai", 90_000_000, 2048, 318)],
)
def test_is_near_what_was_measured(model_format, weights, context, measured_mb):
    """Measured with most of the context in use."""
    guess = estimate(model_format, weights, SMOLLM2, context_tokens=context)
    assert measured_mb * 0.95 < guess.total / MB < measured_mb * 1.25


def test_keys_and_values_by_hand():
    # 2 caches x 30 layers x 3 heads x 64 x 1000 tokens x 2 bytes
    assert estimate("gguf", 0, SMOLLM2, context_tokens=1000).kv_cache == 2 * 30 * 3 * 64 * 1000 * 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 8), st.sampled_from(["", "q8_0", "q4_0"]))
def test_grows_with_context_and_slots(context, slots, kv_type):
    one = estimate("gguf", 10**8, SMOLLM2, context_tokens=context, slots=slots, kv_type=kv_type)
    more = estimate("gguf", 10**8, SMOLLM2, context_tokens=context + 1, slots=slots, kv_type=kv_type)
    twice = estimate("gguf", 10**8, SMOLLM2, context_tokens=context, slots=slots * 2, kv_type=kv_type)
    assert one.total < more.total
    assert abs(twice.kv_cache - 2 * one.kv_cache) <= 1


@pytest.mark.parametrize(
    ("asked", "facts", "expected"),
    [(0, SMOLLM2, 4096), (512, SMOLLM2, 512), (100_000, SMOLLM2, 8192), (0, None, 4096), (512, None, 512)],
)
def test_context(asked, facts, expected):
    assert context_for(asked, facts, 4096) == expected
