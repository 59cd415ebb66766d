"""The small pure parts of the artifact store: ranges and first looks into model files."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.models import stub_model
from controlplane.artifacts.formats import refuse_content, refuse_file, refuse_variant
from controlplane.artifacts.ranges import Range, Unsatisfiable, parse_range
from tests.support.models import make_tiny_gguf
from tests.support.tiny_onnx import field, make_classifier

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        (None, 10, None),
        ("", 10, None),
        ("bytes=0-", 10, Range(0, 10)),
        ("bytes=3-5", 10, Range(3, 6)),
        ("bytes=3-99", 10, Range(3, 10)),
        ("bytes=9-", 10, Range(9, 10)),
        ("bytes=10-", 10, Unsatisfiable()),
        ("bytes=-4", 10, Range(6, 10)),
        ("bytes=-99", 10, Range(0, 10)),
        ("bytes=-0", 10, Unsatisfiable()),
        ("bytes=-1", 0, Unsatisfiable()),
        ("bytes=0-", 0, Unsatisfiable()),
        ("bytes=5-3", 10, None),
        ("bytes=0-1,3-4", 10, None),
        ("bytes=-", 10, None),
        ("lines=1-2", 10, None),
    ],
)
def test_ranges(header: str | None, size: int, expected: Range | Unsatisfiable | None) -> None:
    assert parse_range(header, size) == expected


@given(st.text(alphabet="bytes=0123456789-, ", max_size=20), st.integers(0, 50))
def test_a_range_is_never_empty_nor_outside(header: str, size: int) -> None:
    found = parse_range(header, size)
    if isinstance(found, Range):
        assert 0 <= found.start < found.end <= size


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (b"GGUF\x03\x00\x00\x00rest", "its header ends early"),
        (b"GGUF\x01" + bytes(19), "version 1"),
        (b"GGUF", "its header ends early"),
        (b"PK\x03\x04zip", "model.gguf is no GGUF model: it begins with b'PK\\x03\\x04'"),
        (b"", "it begins with b''"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, head: bytes, problem: str) -> None:
    path = tmp_path / DIGEST
    path.write_bytes(head)
    assert problem in refuse_file("gguf", "model.gguf", path)
    assert refuse_file("onnx-genai", "tokenizer.json", path) == ""


def test_a_gguf_file_is_whole_or_refused(tmp_path: Path) -> None:
    whole = make_tiny_gguf(tmp_path / DIGEST)
    assert refuse_file("gguf", "model.gguf", whole) == ""
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:65536])
    sentence = refuse_file("gguf", "weights/model.gguf", cut)
    assert sentence.startswith("model.gguf is cut off: tensor ")
    assert sentence.endswith(" and the file has 65536 bytes; fetch it again")
    stub_model("stub", tmp_path)
    assert refuse_file("gguf", "model.gguf", tmp_path / "stub.gguf") == ""


def test_a_sentence_about_a_file_can_be_stored(tmp_path: Path) -> None:
    name = b"a\0b\n" + b"c" * 3000
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 0, 0)
    path = tmp_path / "file"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor)
    sentence = refuse_file("gguf", "model.gguf", path)
    assert "tensor a?b?ccc" in sentence
    assert len(sentence) <= 500


@pytest.mark.parametrize("format_", ["onnx", "onnx-genai"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (random.Random(7).randbytes(5000), "model.onnx is a damaged ONNX file"),
        (b"", "model.onnx is no ONNX model: it has no graph"),
        (field(8, b"opset"), "model.onnx is no ONNX model: it has no graph"),
    ],
)
def test_an_onnx_file_has_a_graph(tmp_path: Path, format_: str, content: bytes, problem: str) -> None:
    path = tmp_path / DIGEST
    path.write_bytes(content)
    assert problem in refuse_file(format_, "model.onnx", path)
    assert refuse_file(format_, "model.onnx.data", path) == "", "weights beside the graph have no header"


def test_a_cut_onnx_file_is_refused(tmp_path: Path) -> None:
    model = make_classifier(tmp_path) / "model.onnx"
    assert refuse_file("onnx", "model.onnx", model) == ""
    model.write_bytes(model.read_bytes()[:-3])
    assert "a part of it is longer than the file" in refuse_file("onnx", "model.onnx", model)


def test_the_files_of_a_variant_are_a_model_together(tmp_path: Path) -> None:
    """They lie in the store under their digests, so only the names given say which is which."""
    encoder = make_classifier(tmp_path)
    stored = {}
    for number, path in enumerate(sorted(encoder.iterdir())):
        stored[path.name] = path.rename(tmp_path / str(number))
    assert refuse_content("onnx", stored) == ""
    assert refuse_content("gguf", stored) == "", "a GGUF file says everything itself"
    assert "genai_config.json is no configuration of a text model" in refuse_content(
        "onnx-genai", {**stored, "genai_config.json": stored["config.json"]}
    )
    assert "config.json is no JSON" in refuse_content("onnx", {**stored, "config.json": stored["model.onnx"]})


def test_a_genai_folder_has_its_configuration() -> None:
    assert refuse_variant("onnx-genai", ["model.onnx", "genai_config.json"]) == ""
    assert "genai_config.json" in refuse_variant("onnx-genai", ["model.onnx"])
    assert refuse_variant("gguf", ["model.gguf"]) == ""
    assert refuse_variant("onnx", ["model.onnx", "tokenizer.json", "1_Pooling/config.json"]) == ""
    assert "an onnx variant needs a file named tokenizer.json" in refuse_variant("onnx", ["model.onnx"])
    assert refuse_variant("upstream", ["upstream.json"]) == ""
    assert "upstream.json" in refuse_variant("upstream", ["server.json"])
