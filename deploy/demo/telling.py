"""How the demo tells what happens: numbered steps, bars while one waits, figures behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.text import Text

_INDENT = "   "


def short(path: Path) -> str:
    """``~/x`` for a path in the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


class Story:
    """Writes to standard output; keeps the seconds of each step."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.seconds: dict[str, float] = {}
        self._number = 0

    def title(self, text: str, under: str) -> None:
        self.console.print(Text(text, style="bold"))
        self.console.print(Text(under, style="dim"))

    @contextlib.contextmanager
    def step(self, key: str, title: str) -> Iterator[None]:
        """A numbered step; its seconds are kept under ``key`` and stand at the end of its last line."""
        self._number += 1
        self.console.print()
        self.console.print(Text.assemble((f"{self._number}  ", "bold cyan"), (title, "bold")))
        started = time.monotonic()
        yield
        self.seconds[key] = round(time.monotonic() - started, 3)
        self.line(f"{self.seconds[key]:.1f} s", "dim")

    def line(self, text: str, style: str = "") -> None:
        self.console.print(Text(_INDENT + text, style=style), soft_wrap=True)

    def done(self, text: str) -> None:
        """Something that was waited for is there."""
        self.console.print(Text.assemble(_INDENT, ("✓ ", "green"), text), soft_wrap=True)

    def question(self, text: str) -> None:
        self.console.print(Text.assemble(_INDENT, ("? ", "bold cyan"), text))
        self.console.print(Text.assemble(_INDENT, ("> ", "bold green")), end="")

    def piece(self, text: str) -> None:
        """A piece of an answer, as it comes."""
        self.console.print(Text(text, style="bold"), end="", soft_wrap=True)

    def figures(self, text: str) -> None:
        """The dim line under an answer."""
        self.console.print()
        self.line(f"  {text}", "dim")

    def pairs(self, pairs: list[tuple[str, str]]) -> None:
        width = max(len(name) for name, _ in pairs) + 2
        for name, value in pairs:
            self.console.print(Text.assemble(_INDENT, (name.ljust(width), "dim"), value), soft_wrap=True)

    def failure(self, message: str) -> None:
        """What went wrong, in one sentence on standard error."""
        err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        err.print()
        err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def log(self, tail: str, log: Path) -> None:
        """The end of the log that tells why, and where the whole log is."""
        err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        err.print(Rule(style="dim"))
        err.print(Text(tail), soft_wrap=True)
        err.print(Rule(style="dim"))
        err.print(f"The whole log: {short(log)}", soft_wrap=True)

    @contextlib.contextmanager
    def bars(self) -> Iterator[Bars]:
        """Progress bars; nothing moves where standard output is no terminal."""
        columns = (
            TextColumn(f"{_INDENT}{{task.description}}"),
            BarColumn(bar_width=36),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield Bars(progress)


class Bars:
    """Named bars, each with a state beside it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, done: float, total: float, state: str) -> None:
        """Set a bar; ``total`` 0 makes it swing until the total is known."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, state=state)
        self._progress.update(self._tasks[name], completed=done, total=total or None, state=state)

    def keep(self, names: set[str]) -> None:
        """Take away the bars of others."""
        for name in set(self._tasks) - names:
            self._progress.remove_task(self._tasks.pop(name))
