"""What is wrong with an input, as values: a place in it and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """``pointer`` is an RFC 6901 JSON pointer into the input ("" is all of it), ``message`` a sentence for people."""

    pointer: str
    message: str

    def under(self, prefix: str) -> Problem:
        """The same problem, seen from a document that holds this one at ``prefix``."""
        return Problem(prefix + self.pointer, self.message)


def pointer_to(path: Iterable[str | int]) -> str:
    """``/spec/variants/0``: keys and indexes as one RFC 6901 pointer."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
