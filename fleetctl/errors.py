"""What fleetctl says when something is wrong, and the exit code that a script sees.

Exit codes: 0 done, 1 the server refused or the work failed, 2 the call or its input is wrong, 3 the control plane
cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmfleet.errors import UserError

FAILED, USAGE, UNREACHABLE = 1, 2, 3


class Unreachable(UserError):
    """Nothing answers at the server's address, or it is not known."""

    exit_code = UNREACHABLE


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of a problem's ``errors``: an RFC 6901 pointer into the request body, and what is wrong there."""

    pointer: str
    message: str


class Problem(UserError):
    """An answer of the server with RFC 9457 problem details (or an OpenAI error object, from the gateway)."""

    def __init__(self, status: int, detail: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.faults = tuple(faults)
        self.exit_code = USAGE if status in (400, 422) else FAILED


def problem(status: int, body: Any, fallback: str) -> Problem:
    """Read an error answer of any shape; ``fallback`` is said when the body holds no sentence."""
    if not isinstance(body, Mapping):
        return Problem(status, f"the server answered {status}: {fallback}")
    inner = body.get("error")
    if isinstance(inner, Mapping):
        return Problem(status, str(inner.get("message") or fallback))
    faults = [
        Fault(str(item.get("pointer", "")), str(item.get("message", "")))
        for item in body.get("errors") or ()
        if isinstance(item, Mapping)
    ]
    detail = body.get("detail")
    return Problem(status, detail if isinstance(detail, str) and detail else str(body.get("title") or fallback), faults)
