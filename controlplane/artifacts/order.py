"""The words between ``sources.fetch`` and the sources: what is asked for, and how it can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slmfleet.errors import UserError

# progress(bytes that are here, bytes in all or None)
Progress = Callable[[int, int | None], None]


class SourceUnusable(UserError):
    """The source can't give this file, now or later."""


class SourceAway(UserError):
    """The source could not be reached, or broke off; what came so far is kept where it can be resumed."""


@dataclass(frozen=True, slots=True)
class Order:
    """One file to fetch. ``rest`` is the source without its scheme."""

    source: str
    rest: str
    sha256: str
    cache: Path
    progress: Progress

    @property
    def partial(self) -> Path:
        """Where its bytes gather before they are checked."""
        return self.cache / f"{self.sha256}.partial"
