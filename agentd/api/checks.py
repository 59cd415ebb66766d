"""Checks of single values in requests, by hand: a schema library would double the daemon's memory.

Each takes the name of the field and the value, gives the value in the form that the rest of agentd uses, and raises
``ApiError`` (400) that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from agentd.api.errors import ApiError, bad_request
from slmfleet.units import parse_duration

Check = Callable[[str, Any], Any]
MAX_STOPS = 16
# Seconds that a request may ask a model to stay loaded; longer is -1, "for ever".
_MAX_KEEP_ALIVE_S = 366 * 86400.0


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body must be."""
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        raise bad_request("the body is no JSON", code="invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("the body is no JSON object", code="invalid_json")
    return given


def model_name(given: Mapping[str, Any]) -> str:
    """``model``, which every request has."""
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("`model` must be the name of an agent, a deployment or a model", "model")
    return model


def pick(given: Mapping[str, Any], fields: Mapping[str, Check]) -> dict[str, Any]:
    """The fields that are there (null counts as absent), checked."""
    return {name: check(name, given[name]) for name, check in fields.items() if given.get(name) is not None}


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], unsupported: Mapping[str, str]) -> None:
    """No field may be passed over in silence: it might change what the caller meant. ``unsupported``: OpenAI's fields
    that this API can't honour, with what to do instead."""
    for name, value in given.items():
        if name in known or value is None:
            continue
        if name in unsupported:
            raise bad_request(f"`{name}` is not supported here: {unsupported[name]}", name, "unsupported_parameter")
        raise _unknown(name, known)


def _unknown(name: str, known: Collection[str]) -> ApiError:
    import difflib  # only on this way

    near = difflib.get_close_matches(name, known, 2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return bad_request(f"`{name[:100]}` is no field of this request{hint}", name[:100], "unknown_parameter")


def flag(param: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise bad_request(f"`{param}` must be true or false", param)
    return value


def text(param: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise bad_request(f"`{param}` must be text", param)
    return value


def mapping(param: str, value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise bad_request(f"`{param}` must be an object", param)
    return value


def number(low: float, high: float) -> Check:
    """A number of that range, both ends included."""

    def check(param: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise bad_request(f"`{param}` must be a number from {low:g} to {high:g}", param)
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    """A whole number of that range, both ends included."""

    def check(param: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_request(f"`{param}` must be a whole number from {low} to {high}", param)
        return value

    return check


def stop(param: str, value: Any) -> list[str]:
    """Stop sequences."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(one, str) for one in stops):
        raise bad_request(f"`{param}` must be text or a list of at most {MAX_STOPS} texts", param)
    return [one for one in stops if one]


def logit_bias(param: str, value: Any) -> dict[str, Any]:
    """Token id to bias."""
    for token, bias in mapping(param, value).items():
        if not token.isdecimal() or isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise bad_request(f"`{param}` must be an object from token ids to numbers from -100 to 100", param)
        if not -100 <= bias <= 100:
            raise bad_request(f"`{param}` of token {token} must be from -100 to 100", param)
    return dict(value)


def keep_alive(param: str, value: Any) -> float:
    """Seconds that the model stays loaded after this request: ``"10m"``, 600, 0 (unload at once), -1 (never)."""
    wrong = bad_request(
        f'`{param}` must be a duration such as "10m", seconds, 0 (unload at once) or -1 (stay loaded)', param
    )
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        seconds = parse_duration(value) if isinstance(value, str) else float(value)
    except ValueError:
        raise wrong from None
    if seconds != -1 and not 0 <= seconds <= _MAX_KEEP_ALIVE_S:
        raise wrong
    return seconds


# What shapes the choice of tokens, under the names that OpenAI and the runtimes use.
SAMPLING: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(0, 2**31 - 1),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "seed": integer(-(2**63), 2**64 - 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repeat_penalty": number(0, 10),
    "repeat_last_n": integer(-1, 2**31 - 1),
    "stop": stop,
    "logit_bias": logit_bias,
    "ignore_eos": flag,
}
# Other names for the same.
ALIASES = {"repetition_penalty": "repeat_penalty"}


def sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields of a request, checked, under one name each."""
    picked = pick(given, SAMPLING)
    for alias, name in ALIASES.items():
        if given.get(alias) is not None:
            picked.setdefault(name, SAMPLING[name](alias, given[alias]))
    return picked


SAMPLING_NAMES = frozenset({*SAMPLING, *ALIASES})
