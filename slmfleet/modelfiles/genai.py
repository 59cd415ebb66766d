"""Models for ``onnxruntime-genai``: a folder with ``genai_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmfleet.modelfiles.facts import ModelFacts, NotAModel, per_layer, read_bounded, read_object, read_optional
from slmfleet.modelfiles.onnx_header import read_graph
from slmfleet.modelfiles.templates import tool_format


def inspect_onnx_genai(entry: Path) -> ModelFacts:
    """Facts from ``genai_config.json`` in the folder ``entry``. Raises NotAModel."""
    path = entry / "genai_config.json"
    try:
        config = read_object(path)
    except FileNotFoundError:
        raise NotAModel(
            f"{entry.name} is no onnx-genai model: it has no genai_config.json; make it with "
            "onnxruntime_genai.models.builder"
        ) from None
    try:
        model = config["model"]
        decoder = model["decoder"]
        layers, head_size = _count(decoder["num_hidden_layers"]), _count(decoder["head_size"])
        weights = entry / _file_name(decoder["filename"])
        template = _template(entry)
        facts = ModelFacts(
            architecture=str(model["type"])[:100],
            context_tokens=_count(model["context_length"]),
            layers=layers,
            embedding=_count(decoder["hidden_size"]),
            kv_heads=per_layer(_count(decoder["num_key_value_heads"]), layers),
            key_size=head_size,
            value_size=head_size,
            vocabulary=_count(model["vocab_size"]),
            has_chat_template=bool(template),
            quantization=_quantization(weights),
            tool_format=tool_format(template),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise NotAModel(
            f"{path.name} is no configuration of a text model: {type(error).__name__} at {error}"
        ) from error
    if not weights.is_file():
        raise NotAModel(f"{path.name} names {weights.name}, which is not in the folder; fetch the model again")
    return facts


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**31:
        raise ValueError(f"{str(value)[:40]!r}, which is no plausible number")
    return value


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or len(value.encode()) > 255:
        raise ValueError(f"{str(value)[:40]!r}, which is no name of a file")
    return Path(value).name


def _template(entry: Path) -> str:
    """The chat template, "" where there is none."""
    try:
        return read_bounded(entry / "chat_template.jinja").decode(errors="replace")
    except FileNotFoundError:
        pass
    try:
        template = read_optional(entry / "tokenizer_config.json").get("chat_template", "")
    except NotAModel:
        return ""
    # Some models have several, each with a name; the first is the common one.
    if isinstance(template, list) and template and isinstance(template[0], dict):
        template = template[0].get("template", "")
    return template if isinstance(template, str) else ""


def _quantization(weights: Path) -> str:
    """As the graph shows it; "" for a graph that can't be read: the runtime will say why."""
    try:
        return read_graph(weights).quantization
    except (NotAModel, OSError):
        return ""
