"""The facts that every format gives, and how its files are read with care."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a model is for.
GENERATE, EMBED, CLASSIFY = "generate", "embed", "classify"
# No layer count, context or vocabulary of a real model is larger.
_MAX_NUMBER = 2**31
_MAX_LAYERS = 1024
_MAX_CONFIG_BYTES = 4 * 2**20


class NotAModel(Exception):
    """The files are no model of the format that they claim; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shapes that the memory estimate and the context limits need; 0 or "" where the files do not say."""

    architecture: str
    context_tokens: int
    layers: int
    # Size of a hidden state, and so of an embedding.
    embedding: int
    # Key and value heads of each layer (they differ between layers in some models), and their sizes.
    kv_heads: tuple[int, ...]
    key_size: int
    value_size: int
    vocabulary: int
    has_chat_template: bool
    # "generate", "embed" or "classify".
    task: str = GENERATE
    # As the runtime's makers write it: "Q4_K_M", "int4", "F16".
    quantization: str = ""
    # How the template writes tool calls (see templates.py); "" = the template knows no tools.
    tool_format: str = ""
    # What a classifier can answer, by index.
    labels: tuple[str, ...] = ()


def whole(value: Any, default: int = 0) -> int:
    """A plausible number of something, whatever a file holds in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    return int(value) if 0 <= value <= _MAX_NUMBER else default


def per_layer(value: Any, layers: int) -> tuple[int, ...]:
    """A number for each layer: given as a list, or as one for all."""
    if isinstance(value, list):
        return tuple(whole(item) for item in value[:_MAX_LAYERS])
    return (whole(value),) * min(layers, _MAX_LAYERS)


def read_bounded(path: Path, limit: int = _MAX_CONFIG_BYTES) -> bytes:
    """The bytes of a small file. Raises NotAModel if it is larger, FileNotFoundError if it is not there."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotAModel(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise NotAModel(f"{path.name} is no configuration of a model: it is larger than {limit} bytes")
    return data


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a small file. Raises NotAModel, or FileNotFoundError if it is not there."""
    data = read_bounded(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotAModel(f"{path.name} is no JSON: {error}; fetch the model again") from None
    if not isinstance(value, dict):
        raise NotAModel(f"{path.name} is no JSON object; fetch the model again")
    return value


def read_optional(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file that a model may lack; {} then. Raises NotAModel if it is damaged."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
