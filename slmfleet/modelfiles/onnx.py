"""Encoders for plain ``onnxruntime``: a folder with ``model.onnx`` and ``tokenizer.json``, as transformers and
sentence-transformers export them. ``config.json``, ``tokenizer_config.json`` and ``1_Pooling/config.json`` are read
where they are; a model without them is pooled by the mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmfleet.modelfiles.facts import CLASSIFY, EMBED, ModelFacts, NotAModel, read_bounded, read_optional, whole
from slmfleet.modelfiles.onnx_header import Graph, Value, read_graph

MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
# Of BERT and its kin; what a model without any configuration is taken to hold.
_DEFAULT_CONTEXT = 512
_MAX_LABELS = 4096
# RoBERTa and its kin count positions from the padding token's number + 1.
_OFFSET_POSITIONS = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2, "longformer": 2}
# Names of outputs that are one vector for each input already.
_POOLED = ("sentence_embedding", "sentence_embeddings", "pooled_embedding")


@dataclass(frozen=True, slots=True)
class Encoder:
    """How to run the model. ``output``: the name; ``pooling``: "mean", "cls", or "" for an output that is pooled."""

    facts: ModelFacts
    inputs: tuple[str, ...]
    output: str
    pooling: str
    normalize: bool


def inspect_onnx(entry: Path) -> ModelFacts:
    """Facts of the encoder in the folder ``entry``. Raises NotAModel."""
    return read_encoder(entry).facts


def read_encoder(entry: Path) -> Encoder:
    """How to run the encoder in the folder ``entry``. Raises NotAModel."""
    for name in (MODEL, TOKENIZER):
        if not (entry / name).is_file():
            raise NotAModel(f"{entry.name} is no ONNX encoder: it has no {name}; export the model with its tokenizer")
    try:
        graph = read_graph(entry / MODEL)
    except OSError as error:
        raise NotAModel(f"cannot read {entry / MODEL}: {error.strerror or error}") from error
    config = read_optional(entry / "config.json")
    task, output = _task(graph)
    labels = _labels(config, output.shape[-1] if output.shape else 0) if task == CLASSIFY else ()
    facts = ModelFacts(
        architecture=str(config.get("model_type", "") or "onnx")[:100],
        context_tokens=_context(config, read_optional(entry / "tokenizer_config.json")),
        layers=whole(config.get("num_hidden_layers")),
        embedding=whole(config.get("hidden_size")) or (output.shape[-1] if task == EMBED and output.shape else 0),
        kv_heads=(),
        key_size=0,
        value_size=0,
        # No logits over a vocabulary are ever computed.
        vocabulary=0,
        has_chat_template=False,
        task=task,
        quantization=graph.quantization,
        labels=labels,
    )
    pooling = "" if len(output.shape) == 2 else _pooling(read_optional(entry / "1_Pooling" / "config.json"))
    return Encoder(facts, _inputs(graph), output.name, pooling, normalize=_normalizes(entry))


def _task(graph: Graph) -> tuple[str, Value]:
    """What the model is for, and the output that says it."""
    by_name = {value.name: value for value in graph.outputs}
    for name in _POOLED:
        if name in by_name and len(by_name[name].shape) == 2:
            return EMBED, by_name[name]
    if "logits" in by_name and len(by_name["logits"].shape) == 2:
        return CLASSIFY, by_name["logits"]
    if "logits" not in by_name:
        # Token states: (batch, tokens, size), whatever the exporter called them.
        for value in graph.outputs:
            if len(value.shape) == 3:
                return EMBED, value
    names = ", ".join(f"{value.name}{list(value.shape)}" for value in graph.outputs[:8]) or "nothing"
    raise NotAModel(
        f"{MODEL} gives {names}: neither embeddings nor the logits of a text classifier; a text generator needs the "
        "format onnx-genai"
    )


def _inputs(graph: Graph) -> tuple[str, ...]:
    known = ("input_ids", "attention_mask", "token_type_ids")
    names = tuple(value.name for value in graph.inputs)
    unknown = [name for name in names if name not in known]
    if "input_ids" not in names or unknown:
        raise NotAModel(f"{MODEL} wants the inputs {', '.join(names)[:300]}; only {', '.join(known)} can be given")
    return names


def _context(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int:
    """Tokens that the model can read at once."""
    positions = whole(config.get("max_position_embeddings"))
    if positions:
        positions -= _OFFSET_POSITIONS.get(str(config.get("model_type", "")), 0)
    # "No limit" is written as a huge float, which ``whole`` makes 0.
    limits = [limit for limit in (positions, whole(tokenizer.get("model_max_length"))) if limit > 0]
    return min(limits, default=_DEFAULT_CONTEXT)


def _labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Names of the classes; numbered where the configuration does not name them."""
    given = config.get("id2label")
    named = given if isinstance(given, dict) else {}
    count = min(count or len(named), _MAX_LABELS)
    return tuple(str(named.get(str(number), f"LABEL_{number}"))[:200] for number in range(count))


def _pooling(config: Mapping[str, Any]) -> str:
    if config.get("pooling_mode_cls_token") is True:
        return "cls"
    unknown = [
        name for name, value in config.items()
        if name.startswith("pooling_mode_") and value is True and name != "pooling_mode_mean_tokens"
    ]  # fmt: skip
    if unknown:
        raise NotAModel(f"the model's pooling is {unknown[0][:60]}; only mean and cls can be done")
    return "mean"


def _normalizes(entry: Path) -> bool:
    """sentence-transformers' modules.json names a Normalize step; without the file: yes, as users of vectors expect."""
    path = entry / "modules.json"
    if not path.is_file():
        return True
    kinds = _module_kinds(path)
    return any(kind.endswith(".Normalize") for kind in kinds)


def _module_kinds(path: Path) -> Sequence[str]:
    try:
        modules = json.loads(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise NotAModel(f"{path.name} is no JSON: {error}; fetch the model again") from None
    if not isinstance(modules, list):
        raise NotAModel(f"{path.name} is no list; fetch the model again")
    return [str(module.get("type", "")) for module in modules[:32] if isinstance(module, dict)]
