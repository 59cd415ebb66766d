"""A first look into a model's files, so that a wrong one is refused when it is imported, not on a hundred nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: four letters, then the version as little-endian uint32.
_GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)
# What a variant of each format must have, by name.
_NEEDED = {
    "onnx-genai": ("genai_config.json",),
    "onnx": ("model.onnx", "tokenizer.json"),
    "upstream": ("upstream.json",),
}


def refuse_file(format_: str, name: str, path: Path) -> str:
    """A sentence that says why the file can't be part of a variant of this format; "" = it may be."""
    if format_ != "gguf":
        return ""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != _GGUF_MAGIC:
        return f"{name} is no GGUF file: it begins with {head[:4]!r}"
    version = int.from_bytes(head[4:8], "little")
    if len(head) < 8 or version not in _GGUF_VERSIONS:
        return f"{name} is a GGUF file of version {version}: versions 2 and 3 can be run"
    return ""


def refuse_variant(format_: str, names: Sequence[str] | Iterable[str]) -> str:
    """A sentence that says what the variant's files lack; "" = nothing."""
    has = set(names)
    for name in _NEEDED.get(format_, ()):
        if name not in has:
            return f"an {format_} variant needs a file named {name}, and it has none"
    return ""
