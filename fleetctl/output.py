"""``-o``: how a command prints what it found or did.

``table`` is for people and may change; ``json`` and ``yaml`` are for programs: what the server sent where a command
shows objects, else the shape that the command's ``--help`` states.
"""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from fleetctl.kinds import Kind


class Output(enum.StrEnum):
    """How objects are printed."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


class Form(enum.StrEnum):
    """How a command without columns tells what it did."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print.")]
FormOption = Annotated[Form, typer.Option("--output", "-o", help="How to print.")]


def is_data(form: Output | Form) -> bool:
    """Whether a program reads it."""
    return form.value in ("json", "yaml")


def result(kind: Kind, name: str, action: str) -> dict[str, str]:
    """What became of one object, in the shape of the results of ``apply``."""
    return {"kind": kind.manifest or kind.singular.capitalize(), "name": name, "action": action}
