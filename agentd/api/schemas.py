"""Parameters of functions as parts of a larger JSON Schema that binds an answer while it is decoded.

Backends refuse a schema that their runtime can't enforce. That is right for a ``response_format`` and for functions
that are ``strict``; the parameters of other functions are a description, which callers write with all of JSON Schema:
there what no runtime enforces is left out, so that a call can be bound at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentd.api.errors import ApiError

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_UNENFORCED = frozenset(
    {
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "patternProperties"),
        *("propertyNames", "unevaluatedProperties", "unevaluatedItems", "contains", "minContains", "maxContains"),
        *("uniqueItems", "multipleOf", "minProperties", "maxProperties", "$dynamicRef", "$recursiveRef", "$anchor"),
    }
)
# Keywords that are enforced for this type only, and only when the schema names it.
_OF_TYPE = {
    "minLength": "string", "maxLength": "string", "pattern": "string", "items": "array", "prefixItems": "array",
    "minItems": "array", "maxItems": "array", "minimum": "integer", "maximum": "integer",
    "exclusiveMinimum": "integer", "exclusiveMaximum": "integer",
}  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAX_DEPTH = 32
_MAX_PARTS = 4096
# Longer repetitions make grammars that take minutes to compile.
_MAX_COUNT = 10_000


def invalid_schema(param: str, place: str, why: str) -> ApiError:
    """400 ``invalid_schema``."""
    where = f" at {place}" if place != "#" else ""
    return ApiError(400, "invalid_schema", f"`{param}` can't bind the answer: {why}{where}", param)


def embedded(schema: Any, param: str, *, strict: bool, root: str = "#") -> dict[str, Any]:
    """``schema`` as it can stand at ``root`` in a larger one, where its references then point.

    Not ``strict``: without the keywords that nobody enforces. Raises ApiError (400 ``invalid_schema``) for what is
    wrong in itself: an unknown type, a reference to nowhere.
    """
    return _Walk(schema, param, strict, root).schema(schema, "#", 0)


class _Walk:
    def __init__(self, whole: Any, param: str, strict: bool, root: str) -> None:
        self._whole = whole
        self._param = param
        self._strict = strict
        self._root = root
        self._parts = 0

    def _wrong(self, place: str, why: str) -> ApiError:
        return invalid_schema(self._param, place, why)

    def schema(self, given: Any, place: str, depth: int) -> dict[str, Any]:
        self._parts += 1
        if not isinstance(given, dict):
            raise self._wrong(place, "a schema must be an object")
        if depth > _MAX_DEPTH or self._parts > _MAX_PARTS:
            raise self._wrong(place, f"it is deeper than {_MAX_DEPTH} levels or has more than {_MAX_PARTS} parts")
        types = self._types(given, place)
        made = {name: value for name, value in given.items() if self._strict or _binds(name, given, types)}
        if not self._strict and not all(map(self._is_object, _listed(made.get("allOf", [])))):
            del made["allOf"]
        self._check_values(made, place)
        for name in ("properties", "$defs", "definitions"):
            if name in made:
                self._children_by_name(made, name, place, depth)
        for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if name in made:
                made[name] = self._list(made[name], f"{place}/{name}", depth)
        for name in ("items", "additionalProperties"):
            if name in made and not (name == "additionalProperties" and isinstance(made[name], bool)):
                made[name] = self.schema(made[name], f"{place}/{name}", depth + 1)
        if "$ref" in made:
            made["$ref"] = self._reference(made["$ref"], place)
        self._check_required(made, place)
        return made

    def _types(self, given: Mapping[str, Any], place: str) -> frozenset[str]:
        kind = given.get("type", [])
        types = [kind] if isinstance(kind, str) else kind
        if not isinstance(types, list) or ("type" in given and not types):
            raise self._wrong(place, "`type` must be a name or a list of names")
        for one in types:
            if one not in _TYPES:
                raise self._wrong(place, f"unknown type {one!r}: use {', '.join(sorted(_TYPES))}")
        return frozenset(types)

    def _is_object(self, part: Any) -> bool:
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            part = self._find(part["$ref"])
        return isinstance(part, dict) and "properties" in part

    def _check_values(self, made: Mapping[str, Any], place: str) -> None:
        for name in _COUNTS:
            value = made.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
                raise self._wrong(place, f"`{name}` must be a whole number from 0 to {_MAX_COUNT}")
        for name in _BOUNDS:
            if name in made and (isinstance(made[name], bool) or not isinstance(made[name], (int, float))):
                raise self._wrong(place, f"`{name}` must be a number")
        if "enum" in made and (not isinstance(made["enum"], list) or not made["enum"]):
            raise self._wrong(place, "`enum` must be a list of at least one value")

    def _children_by_name(self, made: dict[str, Any], name: str, place: str, depth: int) -> None:
        children = made[name]
        if not isinstance(children, dict):
            raise self._wrong(place, f"`{name}` must be an object")
        made[name] = {key: self.schema(child, f"{place}/{name}/{key}", depth + 1) for key, child in children.items()}

    def _list(self, given: Any, place: str, depth: int) -> list[dict[str, Any]]:
        if not isinstance(given, list) or not given:
            raise self._wrong(place, "it must be a list of at least one schema")
        return [self.schema(one, f"{place}/{number}", depth + 1) for number, one in enumerate(given)]

    def _reference(self, given: Any, place: str) -> str:
        if not isinstance(given, str) or not given.startswith("#"):
            raise self._wrong(place, f"`$ref` must point into the same schema (#/$defs/...), not to {given!r}")
        if self._find(given) is None:
            raise self._wrong(place, f"`$ref` points to {given!r}, which is not there")
        return self._root + given[1:]

    def _find(self, reference: str) -> Any:
        found = self._whole
        for step in reference.lstrip("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(step)
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                return None
        return found

    def _check_required(self, made: dict[str, Any], place: str) -> None:
        required = made.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._wrong(place, "`required` must be a list of names")
        missing = [name for name in required if name not in made.get("properties", {})]
        if missing and not self._strict:
            made["required"] = [name for name in required if name not in missing]


def _binds(name: str, given: Mapping[str, Any], types: frozenset[str]) -> bool:
    """Whether every runtime enforces this keyword here, or it says nothing that could bind."""
    if name in _UNENFORCED:
        return False
    needed = _OF_TYPE.get(name)
    if needed is None:
        return True
    if needed not in types or (name in _BOUNDS and "number" in types):
        return False
    return name != "pattern" or _is_plain(given[name], given)


def _is_plain(pattern: Any, given: Mapping[str, Any]) -> bool:
    """Whether a pattern is one that grammars know."""
    if not isinstance(pattern, str) or not (pattern.startswith("^") and pattern.endswith("$")):
        return False
    special = "(?" in pattern or any(f"\\{one}" in pattern for one in "bBpPkAZ123456789")
    return not special and not {"minLength", "maxLength"} & given.keys()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
