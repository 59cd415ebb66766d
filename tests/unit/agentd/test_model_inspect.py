"""Headers of models, good and poisoned."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentd.models.inspect import NotAModel, inspect_gguf, inspect_onnx_genai
from tests.support.models import TINY_CONTEXT, make_tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def inspect_bytes(folder: Path, data: bytes):
    path = folder / "model.gguf"
    path.write_bytes(data)
    return inspect_gguf(path)


def test_facts_of_a_gguf(tiny: bytes, tmp_path: Path):
    facts = inspect_bytes(tmp_path, tiny)
    assert facts.architecture == "llama"
    assert facts.context_tokens == TINY_CONTEXT
    assert (facts.layers, facts.embedding, facts.kv_heads) == (2, 64, (2, 2))
    assert (facts.key_size, facts.value_size, facts.vocabulary) == (16, 16, 259)
    assert facts.has_chat_template


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no GGUF model"),
        (b"<html>not found</html>", "begins with b'<htm'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "announces 1099511627776 keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "a text of 1152921504606846976 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "names no architecture"),
        (b"GGUF\x03", "its header ends early"),
    ],
)
def test_poisoned_gguf_is_one_sentence(data: bytes, words: str, tmp_path: Path):
    with pytest.raises(NotAModel, match=words.replace("(", r"\(")):
        inspect_bytes(tmp_path, data)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 255), st.integers(0, 6000))
def test_damage_never_raises_anything_else(tiny, tmp_path_factory, place, value, length):
    data = bytearray(tiny[: max(length, 1)])
    data[place % len(data)] = value
    folder = tmp_path_factory.mktemp("damage")
    with contextlib.suppress(NotAModel):
        inspect_bytes(folder, bytes(data))


def test_missing_file(tmp_path: Path):
    with pytest.raises(NotAModel, match="cannot read the model file"):
        inspect_gguf(tmp_path / "nothing.gguf")


GENAI = {
    "model": {
        "type": "llama",
        "context_length": 512,
        "vocab_size": 288,
        "decoder": {
            "filename": "model.onnx",
            "head_size": 16,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
        },
    }
}


def test_facts_of_onnx_genai(tmp_path: Path):
    (tmp_path / "genai_config.json").write_text(json.dumps(GENAI))
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "chat_template.jinja").write_text("x")
    facts = inspect_onnx_genai(tmp_path)
    assert (facts.architecture, facts.context_tokens, facts.kv_heads, facts.vocabulary) == ("llama", 512, (2, 2), 288)
    assert facts.has_chat_template


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no genai_config.json"),
        ("{", "is no JSON"),
        ('{"model": {}}', "KeyError at 'decoder'"),
        (json.dumps(GENAI), "names model.onnx, which is not in the folder"),
    ],
)
def test_poisoned_genai_folder(text: str | None, words: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(NotAModel, match=words):
        inspect_onnx_genai(tmp_path)
