"""Headers of models, good and poisoned."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.models import stub_model
from slmfleet.modelfiles import NotAModel, check_gguf, inspect_gguf, inspect_onnx_genai
from slmfleet.modelfiles.ggml import BLOCKS, tensor_bytes
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


def table(*tensors: tuple[str, tuple[int, ...], int, int], key: bytes = b"", data: int = 0) -> bytes:
    """A GGUF file of tensors (name, shape, type, offset); ``key``: one more, packed; ``data``: bytes behind the table,
    which ends at a place that must be aligned."""
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), *([key] if key else [])]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def test_every_cut_of_a_gguf_is_found(tiny: bytes, tmp_path: Path):
    for size in (*range(8, len(tiny), 6007), 65536, len(tiny) - 1):
        with pytest.raises(
            NotAModel, match=r"is cut off: tensor \S+ ends at byte \d+ and the file|its header ends early"
        ):
            inspect_bytes(tmp_path, tiny[:size])
    with pytest.raises(NotAModel) as caught:
        inspect_bytes(tmp_path, tiny[:65536])
    [end] = re.findall(r"ends at byte (\d+) and the file has 65536 bytes; fetch it again$", str(caught.value))
    assert int(end) == len(tiny), "the last tensor ends where the file did"


def test_a_header_without_tensors_is_whole(tmp_path: Path):
    stub_model("stub", tmp_path)
    assert inspect_gguf(tmp_path / "stub.gguf").layers == 1


def test_tensors_are_weighed_by_their_type(tmp_path: Path):
    q4_k, unknown = 12, 4711
    data = table(("a", (256, 3), q4_k, 0), ("x", (2**40,), unknown, 0), data=3 * 144)
    assert inspect_bytes(tmp_path, data).architecture == "llama"
    with pytest.raises(NotAModel, match=f"tensor a ends at byte {len(data)} and the file has {len(data) - 1} bytes"):
        inspect_bytes(tmp_path, data[:-1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (table(("a", (2**63, 2**63, 2**63), 0, 2**64 - 1)), "is cut off: tensor a ends at byte"),
        (table(("a", (1, 1, 1, 1, 1), 0, 0)), "a tensor of 5 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "announces 1099511627776 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0), "its header ends early"),
        (table(key=text("general.alignment") + struct.pack("<II", 4, 0)), "aligns its tensors to 0 bytes"),
        # A vocabulary that is skipped, and not there.
        (table(key=text("x") + struct.pack("<IIQ", 9, 0, 5000)), "its header ends early"),
    ],
)
def test_poisoned_tensor_tables(data: bytes, words: str, tmp_path: Path):
    with pytest.raises(NotAModel, match=words):
        inspect_bytes(tmp_path, data)


def test_only_the_first_part_of_a_split_model_names_its_architecture(tmp_path: Path):
    path = tmp_path / "model-00002-of-00002.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("split.no") + struct.pack("<IH", 2, 1))
    check_gguf(path)
    with pytest.raises(NotAModel, match="names no architecture"):
        inspect_gguf(path)


def test_block_sizes_are_those_of_ggml():
    constants = pytest.importorskip("gguf.constants")
    known = {int(kind): sizes for kind, sizes in constants.GGML_QUANT_SIZES.items()}
    assert {kind: known.get(kind, sizes) for kind, sizes in BLOCKS.items()} == BLOCKS
    assert tensor_bytes((32, 2), 2) == 36
    assert tensor_bytes((1,), -1) is None


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
        (json.dumps(GENAI).replace("model.onnx", "x" * 256), "which is no name of a file"),
        (json.dumps(GENAI), "names model.onnx, which is not in the folder"),
    ],
)
def test_poisoned_genai_folder(text: str | None, words: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(NotAModel, match=words):
        inspect_onnx_genai(tmp_path)
