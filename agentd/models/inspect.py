"""What a model's files say about it, read from their headers before any process is spawned.

Bounded: a file that lies about its lengths costs one clear error, not memory. Formats: GGUF version 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and onnxruntime-genai's ``genai_config.json``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_KEYS = 4096
_MAX_TEXT_BYTES = 4 * 2**20
_MAX_ARRAY_ITEMS = 4_000_000
# GGUF value types by number: struct format of the plain ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Longer arrays (vocabularies, merges) are skipped; only their length is kept.
_KEPT_ARRAY_ITEMS = 1024


class NotAModel(Exception):
    """The files are no model of the format that they claim; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shapes that the memory estimate and the context limits need; 0 where the files do not say."""

    architecture: str
    context_tokens: int
    layers: int
    embedding: int
    # Key and value heads of each layer (they differ between layers in some models), and their sizes.
    kv_heads: tuple[int, ...]
    key_size: int
    value_size: int
    vocabulary: int
    has_chat_template: bool


def inspect_gguf(entry: Path) -> ModelFacts:
    """Facts from the header of a GGUF file. Raises NotAModel."""
    try:
        with entry.open("rb") as file:
            keys = _read_gguf_keys(file, entry)
    except OSError as error:
        raise NotAModel(f"cannot read the model file {entry}: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: its header ends early; fetch the model again") from error
    architecture = str(keys.get("general.architecture", ""))
    if not architecture:
        raise NotAModel(f"{entry.name} is no language model: its GGUF header names no architecture")
    return _facts_of_gguf(architecture, keys)


def _facts_of_gguf(architecture: str, keys: Mapping[str, Any]) -> ModelFacts:
    def number(name: str, default: int = 0) -> int:
        value = keys.get(f"{architecture}.{name}", default)
        return max(value) if isinstance(value, list) and value else value if isinstance(value, int) else default

    layers, embedding = number("block_count"), number("embedding_length")
    heads = number("attention.head_count", 1) or 1
    head_size = embedding // heads
    per_layer = keys.get(f"{architecture}.attention.head_count_kv", heads)
    kv_heads = tuple(per_layer) if isinstance(per_layer, list) else (int(per_layer),) * min(layers, 1024)
    return ModelFacts(
        architecture=architecture,
        context_tokens=number("context_length"),
        layers=layers,
        embedding=embedding,
        kv_heads=kv_heads,
        key_size=number("attention.key_length", head_size),
        value_size=number("attention.value_length", head_size),
        vocabulary=number("vocab_size") or int(keys.get("tokenizer.ggml.tokens", 0)),
        has_chat_template="tokenizer.chat_template" in keys,
    )


def _read_gguf_keys(file: BinaryIO, entry: Path) -> dict[str, Any]:
    magic = file.read(4)
    if magic != b"GGUF":
        raise NotAModel(f"{entry.name} is no GGUF model: it begins with {magic!r} instead of b'GGUF'; check its source")
    version, _tensors, count = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3):
        raise NotAModel(f"{entry.name} is GGUF version {version}; versions 2 and 3 can be read: convert the model")
    if count > _MAX_KEYS:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: its header announces {count} keys; fetch it again")
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = _read_text(file, entry)
        (kind,) = struct.unpack("<I", file.read(4))
        keys[name] = _read_value(file, kind, entry)
    return keys


def _read_text(file: BinaryIO, entry: Path) -> str:
    return _read_bytes(file, entry).decode()


def _read_bytes(file: BinaryIO, entry: Path) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_TEXT_BYTES:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: it announces a text of {length} bytes; fetch it again")
    data = file.read(length)
    if len(data) < length:
        raise struct.error("text ends early")
    return data


def _read_value(file: BinaryIO, kind: int, entry: Path) -> Any:
    if kind == _STRING:
        return _read_text(file, entry)
    if kind == _ARRAY:
        return _read_array(file, entry)
    if kind not in _SCALARS:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: it has a value of unknown type {kind}; fetch it again")
    form = "<" + _SCALARS[kind]
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _read_array(file: BinaryIO, entry: Path) -> Any:
    """A short array of numbers as a list; any other only as its length."""
    kind, count = struct.unpack("<IQ", file.read(12))
    if count > _MAX_ARRAY_ITEMS:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: it announces {count} items; fetch it again")
    if kind == _STRING:
        for _ in range(count):
            _read_bytes(file, entry)
        return count
    if kind not in _SCALARS:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: it has an array of type {kind}; fetch it again")
    form = f"<{count}{_SCALARS[kind]}"
    if count > _KEPT_ARRAY_ITEMS:
        file.seek(struct.calcsize(form), 1)
        return count
    return list(struct.unpack(form, file.read(struct.calcsize(form))))


def inspect_onnx_genai(entry: Path) -> ModelFacts:
    """Facts from ``genai_config.json`` in the folder ``entry``. Raises NotAModel."""
    path = entry / "genai_config.json"
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise NotAModel(
            f"{entry} is no onnx-genai model: it has no genai_config.json; make it with "
            "onnxruntime_genai.models.builder"
        ) from None
    except OSError as error:
        raise NotAModel(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise NotAModel(f"{path} is no genai configuration: it is larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        model = json.loads(text)["model"]
        decoder = model["decoder"]
        layers, kv_heads = int(decoder["num_hidden_layers"]), int(decoder["num_key_value_heads"])
        head_size = int(decoder["head_size"])
        weights = entry / str(decoder["filename"])
        facts = ModelFacts(
            architecture=str(model["type"]),
            context_tokens=int(model["context_length"]),
            layers=layers,
            embedding=int(decoder["hidden_size"]),
            kv_heads=(kv_heads,) * min(layers, 1024),
            key_size=head_size,
            value_size=head_size,
            vocabulary=int(model["vocab_size"]),
            has_chat_template=_has_template(entry),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise NotAModel(f"{path} is no configuration of a text model: {type(error).__name__} at {error}") from error
    if not weights.is_file():
        raise NotAModel(f"{path} names {weights.name}, which is not in the folder; fetch the model again")
    return facts


def _has_template(entry: Path) -> bool:
    if (entry / "chat_template.jinja").is_file():
        return True
    try:
        with (entry / "tokenizer_config.json").open("rb") as file:
            return "chat_template" in json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return False
