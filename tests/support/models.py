"""Models for tests: a tiny GGUF that is made on the spot, and larger ones that are looked for.

SmolLM2 comes from where the demo has it. Other models: the folder that ``SLMFLEET_TEST_MODELS`` names, then
``../shared/models`` beside the repository; where none has it, the test is skipped with the reason.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentd.models.types import LoadableModel, ModelKey
from controlplane.artifacts.order import SourceAway
from controlplane.artifacts.sources import default_cache, fetch

_HIDDEN, _FEED_FORWARD, _LAYERS, _HEADS, _KV_HEADS = 64, 128, 2, 4, 2
TINY_CONTEXT = 512
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_gguf(path: Path, *, pooled: bool = False) -> Path:
    """Write a Llama of random weights (2 layers of 64, one token per byte, context 512): 220 kB, loads in 15 ms.

    Its text is noise, the same on every machine for temperature 0. ``pooled``: it gives embeddings instead, the means
    of its states.
    """
    import gguf
    import numpy as np

    characters = _byte_characters()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(TINY_CONTEXT)
    if pooled:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * len(characters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)
    chance = np.random.default_rng(7)
    for name, shape in _matrices(len(tokens)).items():
        writer.add_tensor(name, (chance.standard_normal(shape) * 0.05).astype(np.float16))
    for name in ("output_norm", *(f"blk.{n}.{which}_norm" for n in range(_LAYERS) for which in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(_HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _matrices(vocabulary: int) -> dict[str, tuple[int, int]]:
    kv = _HIDDEN // _HEADS * _KV_HEADS
    matrices = {"token_embd.weight": (vocabulary, _HIDDEN), "output.weight": (vocabulary, _HIDDEN)}
    for layer in range(_LAYERS):
        for name, shape in (
            ("attn_q", (_HIDDEN, _HIDDEN)),
            ("attn_k", (kv, _HIDDEN)),
            ("attn_v", (kv, _HIDDEN)),
            ("attn_output", (_HIDDEN, _HIDDEN)),
            ("ffn_gate", (_FEED_FORWARD, _HIDDEN)),
            ("ffn_up", (_FEED_FORWARD, _HIDDEN)),
            ("ffn_down", (_HIDDEN, _FEED_FORWARD)),
        ):
            matrices[f"blk.{layer}.{name}.weight"] = shape
    return matrices


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: one printable character for each byte."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def find_model(name: str) -> Path:
    """A file or folder of that name in one of the places above; skips the test where there is none."""
    places = [Path(__file__).parents[3] / "shared" / "models"]
    if chosen := os.environ.get("SLMFLEET_TEST_MODELS"):
        places.insert(0, Path(chosen))
    for place in places:
        if place.is_dir():
            for found in (place / name, *place.glob(f"*/{name}")):
                if found.exists():
                    return found
    pytest.skip(f"{name} is in none of {', '.join(map(str, places))}: set SLMFLEET_TEST_MODELS to a folder that has it")


def smollm2_gguf(folder: Path) -> Path:
    """The demo's real model, linked into ``folder`` as ``model.gguf``: out of the cache that the control plane keeps,
    else fetched as the control plane would. Skips the test where it is in neither."""
    [variant] = _demo_model()["spec"]["variants"]
    [file] = variant["files"]
    try:
        fetched = asyncio.run(fetch(file["source"], file["sha256"], default_cache(), lambda done, total: None))
    except SourceAway as error:
        pytest.skip(f"the real model is not here and can't be fetched: {error}")
    link = folder / "model.gguf"
    link.symlink_to(fetched.path)
    return link


def _demo_model() -> dict[str, Any]:
    manifest = Path(__file__).parents[2] / "deploy" / "demo" / "fleet.yaml"
    return next(document for document in yaml.safe_load_all(manifest.read_text()) if document["kind"] == "Model")


def loadable(entry: Path, model_format: str, name: str = "tiny", **more: object) -> LoadableModel:
    """A LoadableModel of these files."""
    files = [entry] if entry.is_file() else [f for f in entry.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    return LoadableModel(ModelKey(name, "1", model_format), model_format, entry, size, **more)  # type: ignore[arg-type]
