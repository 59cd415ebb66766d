"""Is a JSON Schema one that can be enforced while decoding? Pure. A schema that can't is refused: an answer that only
looks constrained is worse than none.

Runtimes differ in what they silently ignore: the caller names those keywords. The rest is JSON Schema 2020-12
(https://json-schema.org/draft/2020-12/json-schema-core) as far as generators need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from agentd.models.backends.base import RequestError

_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
_MAX_DEPTH = 64
_MAX_PARTS = 10_000
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "additionalItems",
)  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Values of keywords that ask for nothing.
_HARMLESS: Mapping[str, Any] = {"uniqueItems": False, "minProperties": 0, "minContains": 0, "required": []}


def constraint(body: Mapping[str, Any], ignored: Set[str] = frozenset()) -> Mapping[str, Any] | None:
    """The schema that ``response_format`` asks for, None where it asks for none.

    ``ignored``: keywords that the runtime would not enforce. "number.minimum" is ``minimum`` beside type number.
    Raises RequestError: ``invalid_request`` for the form, ``invalid_schema`` for the schema.
    """
    form = body.get("response_format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise RequestError("invalid_request", "`response_format` must be an object with a type")
    match form.get("type", "text"):
        case "text":
            return None
        case "json_object" if form.get("schema") is None:
            return {"type": "object"}
        case "json_object":
            schema = form["schema"]
        case "json_schema":
            holder = form.get("json_schema")
            if not isinstance(holder, Mapping) or "schema" not in holder:
                raise _invalid("", "there is none: `response_format.json_schema.schema` is missing")
            schema = holder["schema"]
        case other:
            raise RequestError("invalid_request", f"unknown response_format type {str(other)[:60]!r}")
    # As an object "any value" is {}: runtimes take `true` for no constraint at all.
    schema = {} if schema is True else schema
    check(schema, ignored)
    assert isinstance(schema, Mapping)
    return schema


def check(schema: Any, ignored: Set[str] = frozenset()) -> None:
    """Raise RequestError ``invalid_schema`` unless ``schema`` is an object that can be enforced."""
    if not isinstance(schema, Mapping):
        raise _invalid("", "it is no object")
    for number, (pointer, part, depth) in enumerate(_parts(schema)):
        if depth > _MAX_DEPTH or number > _MAX_PARTS:
            raise _invalid(pointer[:200], f"it has more than {_MAX_PARTS} parts or is deeper than {_MAX_DEPTH}")
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise _invalid(pointer, "it must be an object, true or false")
        _check_part(pointer, part, schema)
        _check_enforced(pointer, part, ignored)


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Each schema inside ``schema``, itself first: JSON pointer, value, depth."""
    waiting: list[tuple[str, Any, int]] = [("", schema, 0)]
    while waiting:
        pointer, part, depth = waiting.pop()
        yield pointer, part, depth
        if not isinstance(part, Mapping):
            continue
        for name in _SCHEMAS:
            # ``items`` may be a list of schemas in older drafts.
            if isinstance(part.get(name), list):
                waiting += [(f"{pointer}/{name}/{at}", item, depth + 1) for at, item in enumerate(part[name])]
            elif name in part:
                waiting.append((f"{pointer}/{name}", part[name], depth + 1))
        for name in _SCHEMA_LISTS:
            if isinstance(part.get(name), list):
                waiting += [(f"{pointer}/{name}/{at}", item, depth + 1) for at, item in enumerate(part[name])]
        for name in _SCHEMA_MAPS:
            if isinstance(part.get(name), Mapping):
                waiting += [(f"{pointer}/{name}/{key}", item, depth + 1) for key, item in part[name].items()]


def _check_part(pointer: str, part: Mapping[str, Any], root: Mapping[str, Any]) -> None:
    kinds = part.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else [None]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise _invalid(f"{pointer}/type", f"unknown type {str(kind)[:60]!r}")
    for name in (*_SCHEMA_LISTS, "enum"):
        if name in part and (not isinstance(part[name], list) or not part[name]):
            raise _invalid(f"{pointer}/{name}", "it must be a list with at least one item")
    for name in _SCHEMA_MAPS:
        if name in part and not isinstance(part[name], Mapping):
            raise _invalid(f"{pointer}/{name}", "it must be an object of schemas")
    for name in _COUNTS:
        if name in part and (isinstance(part[name], bool) or not isinstance(part[name], int) or part[name] < 0):
            raise _invalid(f"{pointer}/{name}", "it must be a whole number, zero or more")
    for name in _NUMBERS:
        if name in part and (isinstance(part[name], bool) or not isinstance(part[name], (int, float))):
            raise _invalid(f"{pointer}/{name}", "it must be a number")
    for low, high in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum")):
        if low in part and high in part and part[low] > part[high]:
            raise _invalid(f"{pointer}/{low}", f"it is greater than {high}")
    if "pattern" in part and not isinstance(part["pattern"], str):
        raise _invalid(f"{pointer}/pattern", "it must be text")
    _check_required(pointer, part)
    if "$ref" in part:
        _check_reference(pointer, part["$ref"], root)


def _check_required(pointer: str, part: Mapping[str, Any]) -> None:
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _invalid(f"{pointer}/required", "it must be a list of names")
    # Runtimes generate the properties that are described, and no others that are merely required.
    missing = [name for name in required if name not in part.get("properties", {})]
    if missing and ("properties" in part or part.get("type") == "object"):
        raise _invalid(f"{pointer}/required", f"{missing[0][:60]!r} is not among the properties")


def _check_reference(pointer: str, reference: Any, root: Mapping[str, Any]) -> None:
    place = f"{pointer}/$ref"
    seen: set[str] = set()
    while isinstance(reference, str):
        if not reference.startswith("#"):
            raise _invalid(place, "only references into the same schema (#/...) can be followed")
        if reference in seen:
            raise _invalid(place, f"{reference[:60]!r} leads back to itself")
        seen.add(reference)
        target: Any = root
        for step in filter(None, reference[1:].split("/")):
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, Mapping) and step in target:
                target = target[step]
            else:
                raise _invalid(place, f"{reference[:60]!r} points at nothing")
        # A schema that is nothing but a reference: follow it, or the generator would for ever.
        reference = target.get("$ref") if isinstance(target, Mapping) else None
    if not seen:
        raise _invalid(place, "it must be text")


def _check_enforced(pointer: str, part: Mapping[str, Any], ignored: Set[str]) -> None:
    numeric = part.get("type") == "number" or (isinstance(part.get("type"), list) and "number" in part["type"])
    for name, value in part.items():
        unenforced = name in ignored or (numeric and f"number.{name}" in ignored)
        if unenforced and not (name in _HARMLESS and value == _HARMLESS[name]):
            raise _invalid(f"{pointer}/{name}", f"{name!r} can't be enforced by this model's runtime: leave it out")
    if "pattern.unanchored" in ignored and "pattern" in part:
        pattern = part["pattern"]
        if not (pattern.startswith("^") and pattern.endswith("$")):
            raise _invalid(f"{pointer}/pattern", "it must begin with ^ and end with $ to be enforced by this runtime")


def _invalid(pointer: str, what: str) -> RequestError:
    return RequestError("invalid_schema", f"the JSON Schema can't be used at {pointer or '/'}: {what}")
