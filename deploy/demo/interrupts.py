"""Signals: Ctrl-C at any moment, with nothing left half-started, and the end of a child process.

SIGINT, SIGTERM and SIGHUP raise Interrupted wherever the program is, except inside ``held()``: there they wait until
the block is over, so that a child process is never started without being noted down.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """Somebody wants this program to end. No Exception, so that no handler of errors swallows it."""


class Interrupts:
    """The signal handlers of a program; one per process, in its main thread."""

    def __init__(self) -> None:
        self._held = 0
        # How many came so far.
        self.count = 0
        # Every signal leaves a byte here: one that comes just before a wait ends that wait.
        self._came, self._leave = os.pipe()

    def install(self) -> None:
        """Take over the signals that ask to end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        # Only signals with a handler leave their byte.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for end in (self._came, self._leave):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._leave, warn_on_full_buffer=False)

    def wait(self) -> None:
        """Return when a child process ended or any other signal came since the last call; an interrupt raises."""
        select.select([self._came], [], [])
        with contextlib.suppress(BlockingIOError):
            while os.read(self._came, 4096):
                pass

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Interrupts that come within are raised at the end of the outermost block."""
        before = self.count
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held and self.count > before:
            raise Interrupted

    def only_count(self) -> None:
        """From now on an interrupt raises nothing; ``count`` tells that somebody got impatient."""
        self._held += 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if not self._held:
            raise Interrupted
