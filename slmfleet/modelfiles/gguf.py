"""The header of a GGUF file, version 2 or 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from slmfleet.modelfiles.facts import EMBED, GENERATE, ModelFacts, NotAModel, per_layer, whole
from slmfleet.modelfiles.ggml import tensor_bytes
from slmfleet.modelfiles.templates import tool_format

_MAX_KEYS = 4096
_MAX_NAME_BYTES = 65536
# The largest mixtures of experts have some thousands.
_MAX_TENSORS = 65536
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_TEXT_BYTES = 4 * 2**20
# Over the whole header: items of arrays that are skipped (each costs time), and bytes that are kept.
_MAX_ITEMS = 8_000_000
_MAX_KEPT_BYTES = 16 * 2**20
# Longer arrays (vocabularies, merges) are skipped; only their length is kept.
_KEPT_ARRAY_ITEMS = 1024
_BLOCK = 1 << 18
# GGUF value types by number: struct format of the plain ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
# ``general.file_type``: llama.cpp's enum llama_ftype (include/llama.h).
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip


def inspect_gguf(entry: Path) -> ModelFacts:
    """Facts from the header of a GGUF file, whose tensors must all lie inside the file. Raises NotAModel."""
    with _opened(entry) as header:
        keys = dict(header.pairs())
        header.check_tensors(keys.get("general.alignment", _DEFAULT_ALIGNMENT))
    return _facts(_architecture(keys, entry), keys)


def check_gguf(entry: Path) -> None:
    """As ``inspect_gguf``, and any part of a model that was split is good: only the first names an architecture.
    Raises NotAModel."""
    with _opened(entry) as header:
        keys = dict(header.pairs())
        header.check_tensors(keys.get("general.alignment", _DEFAULT_ALIGNMENT))
    if not whole(keys.get("split.no")):
        _architecture(keys, entry)


def is_embedding_gguf(entry: Path) -> bool:
    """True for a model that pools its states into one vector. Reads the header up to the vocabulary only, which
    writers put last: a few kB. Raises NotAModel."""
    keys: dict[str, Any] = {}
    with _opened(entry) as header:
        for name, value in header.pairs():
            if name.startswith("tokenizer."):
                break
            keys[name] = value
    return _pools(_architecture(keys, entry), keys)


def _architecture(keys: Mapping[str, Any], entry: Path) -> str:
    architecture = keys.get("general.architecture")
    if not architecture or not isinstance(architecture, str):
        raise NotAModel(f"{entry.name} is no language model: its GGUF header names no architecture")
    return architecture


def _pools(architecture: str, keys: Mapping[str, Any]) -> bool:
    # enum llama_pooling_type: 0 none, 1 mean, 2 cls, 3 last; 4 is for rerankers.
    return keys.get(f"{architecture}.pooling_type") in (1, 2, 3)


def _facts(architecture: str, keys: Mapping[str, Any]) -> ModelFacts:
    def number(name: str, default: int = 0) -> int:
        value = keys.get(f"{architecture}.{name}")
        return max(map(whole, value), default=default) if isinstance(value, list) else whole(value, default)

    layers, embedding = number("block_count"), number("embedding_length")
    heads = number("attention.head_count", 1) or 1
    head_size = embedding // heads
    template = keys.get("tokenizer.chat_template")
    tokens = keys.get("tokenizer.ggml.tokens")
    return ModelFacts(
        architecture=architecture,
        context_tokens=number("context_length"),
        layers=layers,
        embedding=embedding,
        kv_heads=per_layer(keys.get(f"{architecture}.attention.head_count_kv", heads), layers),
        key_size=number("attention.key_length", head_size),
        value_size=number("attention.value_length", head_size),
        vocabulary=number("vocab_size") or whole(len(tokens) if isinstance(tokens, list) else tokens),
        has_chat_template=isinstance(template, str),
        task=EMBED if _pools(architecture, keys) else GENERATE,
        quantization=_FILE_TYPES.get(whole(keys.get("general.file_type"), -1), ""),
        tool_format=tool_format(template) if isinstance(template, str) else "",
    )


@contextlib.contextmanager
def _opened(entry: Path) -> Iterator[_Header]:
    """The file's header, to be read front to back; what goes wrong meanwhile becomes NotAModel."""
    try:
        with entry.open("rb") as file:
            yield _Header(file, entry.name)
    except OSError as error:
        raise NotAModel(f"cannot read the model file {entry}: {error.strerror or error}") from error
    except (EOFError, UnicodeDecodeError) as error:
        raise NotAModel(f"{entry.name} is a damaged GGUF file: its header ends early; fetch the model again") from error


class _Header:
    """Reads a header front to back, block by block."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._data = b""
        self._at = 0
        self._items = 0
        self._kept = 0
        self._tensors = 0

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """Keys and values in the file's order."""
        magic = self._file.read(4)
        if magic != b"GGUF":
            raise NotAModel(
                f"{self._name} is no GGUF model: it begins with {magic!r} instead of b'GGUF'; check its source"
            )
        version, self._tensors, count = struct.unpack("<IQQ", self._take(20))
        if version not in (2, 3):
            raise NotAModel(f"{self._name} is GGUF version {version}; versions 2 and 3 can be read: convert the model")
        if count > _MAX_KEYS:
            raise self._damaged(f"its header announces {count} keys")
        for _ in range(count):
            name = self._text(_MAX_NAME_BYTES)
            (kind,) = struct.unpack("<I", self._take(4))
            yield name, self._value(kind)

    def check_tensors(self, alignment: Any) -> None:
        """Raise NotAModel if a tensor is not whole in the file. To be called when all keys were read."""
        if self._tensors > _MAX_TENSORS:
            raise self._damaged(f"its header announces {self._tensors} tensors")
        step = whole(alignment)
        if not step:
            raise self._damaged(f"it aligns its tensors to {str(alignment)[:40]} bytes")
        last, reach = "", 0
        for _ in range(self._tensors):
            name, end = self._tensor()
            if end > reach:
                last, reach = name, end
        table_end = self._file.tell() - (len(self._data) - self._at)
        size = self._file.seek(0, 2)
        # Values that are skipped may have ended behind the file's end.
        if table_end > size:
            raise EOFError
        # Offsets count from the first aligned byte after the table.
        end = -(-table_end // step) * step + reach
        if reach and end > size:
            raise NotAModel(
                f"{self._name} is cut off: tensor {last[:100]} ends at byte {end} and the file has {size} bytes; "
                "fetch it again"
            )

    def _tensor(self) -> tuple[str, int]:
        """Name of the next tensor of the table, and its end in the data; 0 for a type that is not known."""
        name = self._text(_MAX_NAME_BYTES)
        (dimensions,) = struct.unpack("<I", self._take(4))
        if dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"it has a tensor of {dimensions} dimensions")
        *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", self._take(8 * dimensions + 12))
        size = tensor_bytes(shape, kind)
        return name, 0 if size is None else offset + size

    def _damaged(self, what: str) -> NotAModel:
        return NotAModel(f"{self._name} is a damaged GGUF file: {what}; fetch it again")

    def _take(self, size: int) -> bytes:
        """The next ``size`` bytes. Raises EOFError."""
        if len(self._data) - self._at < size:
            self._data = self._data[self._at :] + self._file.read(max(size, _BLOCK))
            self._at = 0
            if len(self._data) < size:
                raise EOFError
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def _skip(self, size: int) -> None:
        """Go past ``size`` bytes, which are there or not: the next _take finds out."""
        ahead = self._at + size - len(self._data)
        if ahead <= 0:
            self._at += size
            return
        # A length of 2**63 is no place in a file.
        if ahead > 2**50:
            raise EOFError
        self._data, self._at = b"", 0
        self._file.seek(ahead, 1)

    def _keep(self, size: int) -> None:
        self._kept += size
        if self._kept > _MAX_KEPT_BYTES:
            raise self._damaged(f"its header holds more than {_MAX_KEPT_BYTES} bytes of values")

    def _text(self, limit: int = _MAX_TEXT_BYTES) -> str:
        (length,) = _LENGTH.unpack(self._take(8))
        if length > limit:
            raise self._damaged(f"it announces a text of {length} bytes")
        self._keep(length)
        return self._take(length).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"it has a value of unknown type {kind}")
        form = "<" + _SCALARS[kind]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _array(self) -> Any:
        """A short array of numbers as a list; any other only as its length."""
        kind, count = struct.unpack("<IQ", self._take(12))
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self._damaged(f"it announces {count} items")
        if kind == _STRING:
            self._skip_texts(count)
            return count
        if kind not in _SCALARS:
            raise self._damaged(f"it has an array of type {kind}")
        form = f"<{count}{_SCALARS[kind]}"
        if count > _KEPT_ARRAY_ITEMS:
            self._skip(struct.calcsize(form))
            return count
        # A list of numbers takes about this much in Python.
        self._keep(40 * count)
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _skip_texts(self, count: int) -> None:
        # The hot loop: 50,000 to 300,000 short texts in every vocabulary.
        unpack = _LENGTH.unpack_from
        data, at = self._data, self._at
        for _ in range(count):
            if at + 8 > len(data):
                self._at = min(at, len(data))
                self._skip(at - self._at)
                (length,) = _LENGTH.unpack(self._take(8))
                data, at = self._data, self._at + length
            else:
                at += 8 + unpack(data, at)[0]
        self._at = min(at, len(data))
        self._skip(at - self._at)
