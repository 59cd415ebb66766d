"""The small pure parts of the artifact store: ranges and first looks into model files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.artifacts.formats import refuse_file, refuse_variant
from controlplane.artifacts.ranges import Range, Unsatisfiable, parse_range


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
        (b"GGUF\x03\x00\x00\x00rest", ""),
        (b"GGUF\x02\x00\x00\x00", ""),
        (b"GGUF\x01\x00\x00\x00", "version 1"),
        (b"GGUF", "version 0"),
        (b"PK\x03\x04zip", "model.gguf is no GGUF file: it begins with b'PK\\x03\\x04'"),
        (b"", "it begins with b''"),
    ],
)
def test_a_gguf_file_begins_as_one(tmp_path: Path, head: bytes, problem: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(head)
    assert problem in refuse_file("gguf", "model.gguf", path)
    assert bool(refuse_file("gguf", "model.gguf", path)) is bool(problem)
    assert refuse_file("onnx-genai", "model.onnx", path) == ""


def test_a_genai_folder_has_its_configuration() -> None:
    assert refuse_variant("onnx-genai", ["model.onnx", "genai_config.json"]) == ""
    assert "genai_config.json" in refuse_variant("onnx-genai", ["model.onnx"])
    assert refuse_variant("gguf", ["model.gguf"]) == ""
    assert refuse_variant("onnx", ["model.onnx", "tokenizer.json", "1_Pooling/config.json"]) == ""
    assert "an onnx variant needs a file named tokenizer.json" in refuse_variant("onnx", ["model.onnx"])
    assert refuse_variant("upstream", ["upstream.json"]) == ""
    assert "upstream.json" in refuse_variant("upstream", ["server.json"])
