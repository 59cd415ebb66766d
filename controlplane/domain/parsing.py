"""From a JSON document to a manifest, or to everything that is wrong with it, each with its place."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from controlplane.domain.manifests import API_VERSION, KINDS, Manifest, Part
from controlplane.domain.names import nearest, shown
from controlplane.domain.problems import Problem, pointer_to

MAX_DEPTH = 32
_TYPE_WORDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "int_parsing_size": "is too large a number",
}


def parse_manifest(document: object) -> Manifest | tuple[Problem, ...]:
    """The manifest that ``document`` (JSON values) holds, or all its problems, at least one."""
    if not isinstance(document, dict):
        return (Problem("", "a manifest is a mapping with apiVersion, kind, metadata and spec"),)
    if bad := tuple(_unstorable(document)):
        return bad
    if bad := tuple(_envelope_problems(document)):
        return bad
    kind = KINDS[document["kind"]]
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        return tuple(_problem(kind, detail) for detail in error.errors(include_url=False))


def _envelope_problems(document: dict[str, Any]) -> Iterator[Problem]:
    version, kind = document.get("apiVersion"), document.get("kind")
    if version is None:
        yield Problem("", f"apiVersion is missing: write apiVersion: {API_VERSION}")
    elif version != API_VERSION:
        yield Problem("/apiVersion", f"{shown(version)} is not known here: write {API_VERSION}")
    if kind is None:
        yield Problem("", f"kind is missing: it is one of {', '.join(KINDS)}")
    elif not isinstance(kind, str) or kind not in KINDS:
        near = nearest(str(kind), KINDS)
        hint = f"did you mean {near}?" if near else f"it is one of {', '.join(KINDS)}"
        yield Problem("/kind", f"kind {shown(kind)} is not known: {hint}")


def _unstorable(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Text that Postgres or UTF-8 can't hold, and nesting without end: JSON allows them, nothing after it does."""
    if len(path) > MAX_DEPTH:
        yield Problem(pointer_to(path), f"is nested more than {MAX_DEPTH} levels deep")
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            yield Problem(pointer_to(path), "holds a NUL or half of a surrogate pair: remove that character")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _unstorable(str(key), (*path, _printable(key)))
            yield from _unstorable(item, (*path, _printable(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unstorable(item, (*path, index))


def _printable(key: object) -> str:
    return str(key).replace("\0", "?").encode("utf-8", "replace").decode()


def _problem(kind: type[Part], detail: ErrorDetails) -> Problem:
    path = tuple(part for part in detail["loc"] if part != "[key]")
    what, context = detail["type"], detail.get("ctx", {})
    if what == "extra_forbidden":
        return Problem(pointer_to(path), _unknown_field(_part_at(kind, path[:-1]), str(path[-1])))
    if what == "missing":
        return Problem(pointer_to(path[:-1]), f"{path[-1]} is missing")
    if what == "value_error":
        return Problem(pointer_to(path), str(context["error"]))
    if what == "literal_error":
        return Problem(pointer_to(path), f"{shown(detail['input'])} is none of {_choices(context['expected'])}")
    if what in _TYPE_WORDS:
        return Problem(pointer_to(path), f"{_TYPE_WORDS[what]}{_got(what, detail['input'])}")
    message = detail["msg"]
    for start in ("Input should", "String should", "List should", "Dictionary should"):
        message = message.replace(start, "must", 1) if message.startswith(start) else message
    return Problem(pointer_to(path), message[0].lower() + message[1:])


def _got(what: str, value: object) -> str:
    if what == "string_type" and isinstance(value, (int, float)):
        return f', not a number or truth value: write it in quotes, such as "{str(value).lower()}"'
    name = {dict: "a mapping", list: "a list", str: "text", type(None): "empty", bool: "a truth value"}.get(type(value))
    return f", not {name}" if name else ""


def _choices(expected: str) -> str:
    return expected.replace("'", "").replace(" or ", ", ")


def _unknown_field(part: type[Part] | None, name: str) -> str:
    if part is None:
        return f"unknown field {shown(name)}: remove it"
    if name in part.planned:
        return f"{name} is not supported by this version of slmfleet yet: remove it"
    known = [field.alias or key for key, field in part.model_fields.items()]
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"known fields are {', '.join(known)}"
    return f"unknown field {shown(name)}: {hint}"


def _part_at(start: type[Part], path: Sequence[str | int]) -> type[Part] | None:
    """The class of the object at ``path``, by following the annotations."""
    part: type[Part] | None = start
    for step in path:
        if isinstance(step, int) or part is None:
            continue  # an index into a list whose element class was already found
        field = next((field for key, field in part.model_fields.items() if (field.alias or key) == step), None)
        part = _part_in(field.annotation) if field else None
    return part


def _part_in(annotation: Any) -> type[Part] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return typing.cast(type[Part], annotation)
    found = (_part_in(argument) for argument in typing.get_args(annotation))
    return next((part for part in found if part is not None), None)
