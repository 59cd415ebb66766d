"""Configuration: a TOML file, then the environment, then flags, each over the one before.

A program describes its configuration as one frozen dataclass; each field carries its meaning::

    @dataclass(frozen=True)
    class Config:
        beat_s: float = option(5.0, "Seconds between two heartbeats.", parse=parse_duration)

``load`` fills it in, or raises UsageError with one sentence that names the key, the place and what is wrong. A flat
name in the dataclass (``beat_s``) is the key in the TOML file, the variable ``<PREFIX>BEAT_S``, and the flag
``--beat-s``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from slmfleet.errors import UsageError

Settings = TypeVar("Settings")

# Kubernetes puts variables of this form into every container for each service of the namespace; for a service that is
# called "controlplane" they begin with our prefix.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT$|_PORT_\d+_(TCP|UDP|SCTP)\w*$")


def option(default: Any, doc: str, parse: Callable[[Any], Any] = str) -> Any:
    """A dataclass field with its meaning (unit included) and the function from text or TOML value to its type.

    A mutable default is given as a function without arguments.
    """
    metadata = {"doc": doc, "parse": parse}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_bool(value: Any) -> bool:
    """True or false, as TOML has them or as text: true/false, yes/no, on/off, 1/0."""
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ValueError(f"{value!r} is neither true nor false") from None


def parse_int(value: Any) -> int:
    """A whole number."""
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is no whole number") from None


def parse_path(value: Any) -> Path:
    """A path; ``~`` is the home folder."""
    return Path(str(value)).expanduser()


def parse_choice(*choices: str) -> Callable[[Any], str]:
    """One of the given words."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)

    return parse


def parse_address(value: Any) -> tuple[str, int]:
    """``host:port`` as a pair; port 0 means any free one."""
    host, _, port = str(value).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is no address: write host:port, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def parse_labels(value: Any) -> dict[str, str]:
    """Labels from a TOML table, a list of ``key=value`` or the text ``key=value,key=value``."""
    if isinstance(value, Mapping):
        return {str(key): str(item) for key, item in value.items()}
    parts = value.split(",") if isinstance(value, str) else list(value)
    labels = {}
    for part in filter(None, (str(part).strip() for part in parts)):
        key, equals, text = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{part!r} is no label: write key=value, such as site=lyon")
        labels[key.strip()] = text.strip()
    return labels


def load(
    settings: type[Settings],
    *,
    prefix: str,
    file: Path | None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Read ``settings`` from ``file`` (None: no file), ``<prefix><NAME>`` variables and ``flags``.

    Flags that are None were not given. Raises UsageError for a file that can't be read, an unknown key or a value
    that its field's ``parse`` refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for place, given in (
        (str(file), _read_toml(file) if file else {}),
        (
            "the environment",
            _from_environment(fields, prefix, os.environ if environment is None else environment),
        ),
        ("the command line", {key: value for key, value in (flags or {}).items() if value is not None}),
    ):
        for key, value in given.items():
            if key not in fields:
                raise UsageError(f"unknown key {key!r} in {place}{_nearest(key, fields)}")
            try:
                values[key] = fields[key].metadata["parse"](value)
            except (ValueError, TypeError) as error:
                raise UsageError(f"bad value for {key!r} in {place}: {error}") from None
    return settings(**values)


def explicit(
    prefix: str, file: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> set[str]:
    """Names that somebody set on purpose (in any place), in lower case: a taken port is an error only for those."""
    variables = os.environ if environment is None else environment
    names = {key for key, value in flags.items() if value is not None}
    names |= set(_read_toml(file)) if file else set()
    return names | {key.removeprefix(prefix).lower() for key in variables if key.startswith(prefix)}


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else f"; known keys: {', '.join(sorted(known))}"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"cannot read the configuration: {file} does not exist") from None
    except OSError as error:
        raise UsageError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration {file}: {error}") from None


def _from_environment(fields: Mapping[str, Any], prefix: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Everything that begins with the prefix, known or not: a misspelt limit must not be no limit."""
    return {
        key.removeprefix(prefix).lower(): value
        for key, value in environment.items()
        if key.startswith(prefix) and not _SERVICE_LINK.search(key)
    }
