"""A classifier of 2 labels, written byte by byte as an ONNX file (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).

Each word has a score for each label; the logits are the means over the words. No ONNX library is needed.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

LABELS = ("calm", "urgent")
# Scores of each word for the two labels.
WORDS = {"[UNK]": (0.0, 0.0), "thanks": (3.0, -3.0), "please": (1.0, 0.0), "fire": (-4.0, 4.0), "help": (-1.0, 2.0)}
_FLOAT, _INT64 = 1, 7


def varint(value: int) -> bytes:
    """A base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: a number as a varint, else length-delimited."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name: str, kind: int, dimensions: tuple[int | str, ...]) -> bytes:
    """An input or output; a dimension of unknown size has a name."""
    shape = b"".join(field(1, field(1, size) if isinstance(size, int) else field(2, size)) for size in dimensions)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, shape)))


def make_classifier(folder: Path) -> Path:
    """Write ``model.onnx``, ``tokenizer.json`` and ``config.json`` into ``folder``."""
    table = b"".join(struct.pack("<2f", *scores) for scores in WORDS.values())
    weights = field(1, len(WORDS)) + field(1, len(LABELS)) + field(2, _FLOAT) + field(8, "scores") + field(9, table)
    gather = field(1, "scores") + field(1, "input_ids") + field(2, "states") + field(4, "Gather")
    # opset 13: the axes are an attribute; type 7 is INTS.
    axes = field(1, "axes") + field(8, 1) + field(20, 7)
    keep = field(1, "keepdims") + field(3, 0) + field(20, 2)
    mean = field(1, "states") + field(2, "logits") + field(4, "ReduceMean") + field(5, axes) + field(5, keep)
    graph = field(1, gather) + field(1, mean) + field(2, "classifier") + field(5, weights)
    graph += field(11, value_info("input_ids", _INT64, ("batch", "sequence")))
    graph += field(12, value_info("logits", _FLOAT, ("batch", len(LABELS))))
    model = field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))
    (folder / "model.onnx").write_bytes(model)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    labels = {str(number): label for number, label in enumerate(LABELS)}
    config = {"model_type": "bert", "hidden_size": 2, "max_position_embeddings": 16, "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
