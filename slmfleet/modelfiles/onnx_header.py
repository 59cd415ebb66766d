"""What an ONNX graph says without its weights: inputs, outputs, operators. A walk over protobuf fields that seeks past
tensors (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); no ONNX library is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slmfleet.modelfiles.facts import NotAModel

_MAX_FIELDS = 1_000_000
_MAX_VALUES = 1024
_MAX_VALUE_BYTES = 65536
_MAX_RANK = 16
# Numbers of fields, per message of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_OP_TYPE, _NODE_ATTRIBUTE = 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DATA_TYPE = 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 2, 1, 1
# TensorProto.DataType, as far as weights go.
_WEIGHT_TYPES = {1: "fp32", 10: "fp16", 16: "bf16", 2: "int8", 3: "int8", 21: "int4", 22: "int4", 17: "fp8"}
_INT8_OPERATORS = {
    "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul",
    "QLinearConv", "QAttention", "ConvInteger",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output. A dimension without a fixed size is 0."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """``quantization``: "int4", "int8", "fp16", ... by operators and weights, "" when neither says."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    quantization: str


@dataclass(frozen=True, slots=True)
class _Field:
    number: int
    # Of a varint, its value; of anything else, where it begins and how long it is.
    value: int = 0
    start: int = 0
    size: int = 0


def read_graph(path: Path) -> Graph:
    """Read the graph of an ONNX file. Raises NotAModel, or OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        walk = _Walk(file, path.name)
        graph = None
        # To the end, so that a file that was cut behind its graph is found out as well.
        for field in walk.fields(0, size):
            if field.number == _MODEL_GRAPH and graph is None:
                graph = field
        if graph is None or not graph.size:
            raise NotAModel(f"{path.name} is no ONNX model: it has no graph; check its source")
        return _graph(walk, graph)


def _graph(walk: _Walk, graph: _Field) -> Graph:
    inputs: list[Value] = []
    outputs: list[Value] = []
    operators: dict[str, int] = {}
    weights: dict[int, int] = {}
    for field in walk.fields(graph.start, graph.start + graph.size):
        if field.number == _GRAPH_NODE:
            name, bits = _operator(walk, field)
            operators[name] = max(bits, operators.get(name, 0))
        elif field.number == _GRAPH_INITIALIZER:
            kind = next((part.value for part in walk.inside(field) if part.number == _TENSOR_DATA_TYPE), 0)
            weights[kind] = weights.get(kind, 0) + field.size
        elif field.number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            values = inputs if field.number == _GRAPH_INPUT else outputs
            if len(values) >= _MAX_VALUES:
                raise walk.damaged("it has too many inputs or outputs")
            values.append(_value(walk, field))
    return Graph(tuple(inputs), tuple(outputs), _quantization(operators, weights))


def _quantization(operators: dict[str, int], weights: dict[int, int]) -> str:
    if bits := operators.get("MatMulNBits") or operators.get("GatherBlockQuantized"):
        return f"int{bits}"
    if operators.keys() & _INT8_OPERATORS:
        return "int8"
    known = {kind: size for kind, size in weights.items() if kind in _WEIGHT_TYPES}
    return _WEIGHT_TYPES[max(known, key=known.__getitem__)] if known else ""


def _operator(walk: _Walk, node: _Field) -> tuple[str, int]:
    """Its type, and the value of an attribute ``bits`` (4 is what an absent one means)."""
    name, bits = "", 4
    for field in walk.inside(node):
        if field.number == _NODE_OP_TYPE:
            name = walk.text(field)
        elif field.number == _NODE_ATTRIBUTE and field.size < 64:
            parts = {part.number: part for part in walk.inside(field)}
            if _ATTRIBUTE_NAME in parts and _ATTRIBUTE_INT in parts and walk.text(parts[_ATTRIBUTE_NAME]) == "bits":
                bits = parts[_ATTRIBUTE_INT].value
    return name, bits if 1 <= bits <= 16 else 4


def _value(walk: _Walk, field: _Field) -> Value:
    if field.size > _MAX_VALUE_BYTES:
        raise walk.damaged("one of its inputs or outputs has a description without end")
    name = ""
    shape: tuple[int, ...] = ()
    for part in walk.inside(field):
        if part.number == _VALUE_NAME:
            name = walk.text(part)
        elif part.number == _VALUE_TYPE:
            shape = _shape(walk, part)
    return Value(name, shape)


def _shape(walk: _Walk, field: _Field) -> tuple[int, ...]:
    for number in (_TYPE_TENSOR, _TENSOR_SHAPE):
        found = next((part for part in walk.inside(field) if part.number == number), None)
        if found is None:
            return ()
        field = found
    sizes = []
    for dimension in walk.inside(field):
        if dimension.number == _SHAPE_DIM:
            sizes.append(next((part.value for part in walk.inside(dimension) if part.number == _DIM_VALUE), 0))
    return tuple(size if size < 2**31 else 0 for size in sizes[:_MAX_RANK])


class _Walk:
    """Steps through protobuf fields of a file."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._left = _MAX_FIELDS

    def damaged(self, what: str) -> NotAModel:
        return NotAModel(f"{self._name} is a damaged ONNX file: {what}; fetch the model again")

    def inside(self, field: _Field) -> Iterator[_Field]:
        """The fields of a message that is a field. One without a length (a number in its place) has none."""
        return self.fields(field.start, field.start + field.size)

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        """The fields between two places of the file. Raises NotAModel."""
        at = start
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise self.damaged("it has more parts than any model")
            self._file.seek(at)
            key = self._varint()
            number, kind = key >> 3, key & 7
            if not number:
                raise self.damaged("a part of it has no number")
            if kind == 0:
                field = _Field(number, value=self._varint())
                at = self._file.tell()
            else:
                size = self._varint() if kind == 2 else {1: 8, 5: 4}.get(kind)
                place = self._file.tell()
                if size is None or size > end - place:
                    raise self.damaged("a part of it is longer than the file")
                field = _Field(number, start=place, size=size)
                at = place + size
            yield field

    def text(self, field: _Field) -> str:
        """A short text; a long one is cut."""
        self._file.seek(field.start)
        return self._file.read(min(field.size, 256)).decode(errors="replace")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._file.read(1)
            if not byte:
                raise self.damaged("it ends early")
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & (2**64 - 1)
        raise self.damaged("a number in it has no end")
