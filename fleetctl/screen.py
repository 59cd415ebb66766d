"""What fleetctl prints: aligned columns, fields and JSON or YAML. Colour and cutting only on a terminal."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

GAP = "   "
# Cells that a column of words keeps at least: less says nothing.
_NARROWEST = 12
# Words that say how a thing is doing, and how they look. Anything else is plain.
_STYLES = {
    "green": "online ready warm active created yes true",
    "yellow": "suspect reconciling draining drained fetching pending staged changed loading warning",
    "red": "disconnected lost failed degraded error expired",
    "dim": "unchanged used revoked - no",
}
_STYLE_OF = {word: style for style, words in _STYLES.items() for word in words.split()}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and the text of one cell. ``wide`` columns show with ``-o wide`` only, ``sparse`` ones if not empty.

    Numbers (``right``) and what is worth nothing in part (``whole``: an address, a version) are never cut.
    """

    title: str
    cell: Callable[[Row], str]
    wide: bool = False
    right: bool = False
    sparse: bool = False
    whole: bool = False


def out() -> Console:
    """Standard output. Not a terminal: no colour, no cutting."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def style_of(text: str) -> str:
    """The style of a word of state; ``2/3`` is green when whole, yellow when not."""
    first = text.split(" ", 1)[0].rstrip(",:")
    have, slash, want = first.partition("/")
    if slash and have.isdecimal() and want.isdecimal():
        return "green" if int(have) >= int(want) else "yellow"
    return _STYLE_OF.get(first, "")


def lines(
    columns: Sequence[Column], rows: Sequence[Row], width: int | None, indent: int = 0, wrap: bool = False
) -> list[Text]:
    """Heading and rows, aligned. ``width`` None: nothing is cut; else columns are narrowed until a line fits.

    ``wrap``: what the last column loses stands on further lines instead of being cut.
    """
    cells = [[_cell(column, row) for column in columns] for row in rows]
    table = [[column.title for column in columns], *cells]
    widths = natural_widths(columns, rows)
    if width is not None:
        _fit(widths, _floors(columns, widths), width - indent - len(GAP) * (len(columns) - 1))
    return [
        line
        for number, row in enumerate(table)
        for part, piece in enumerate(_wrapped(row, widths) if wrap else [row])
        for line in [_line(columns, piece, widths, indent, heading=number == 0, more=part > 0)]
    ]


def natural_widths(columns: Sequence[Column], rows: Sequence[Row]) -> list[int]:
    """Cells that each column takes where there is room for all."""
    return [max([cell_len(column.title), *(cell_len(_cell(column, row)) for row in rows)]) for column in columns]


def that_fit(columns: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that have room beside each other, and those that give way: wide ones first, the last first.

    The first column always stays.
    """
    kept, gone = list(columns), []
    while len(kept) > 1:
        floors = _floors(kept, natural_widths(kept, rows))
        if sum(floors) + len(GAP) * (len(kept) - 1) <= width:
            break
        among = [column for column in kept[1:] if column.wide] or kept[1:]
        gone.append(among[-1])
        kept.remove(among[-1])
    return kept, [column for column in columns if column in gone]


def _cell(column: Column, row: Row) -> str:
    return " ".join(column.cell(row).split()) or "-"


def _floors(columns: Sequence[Column], widths: Sequence[int]) -> list[int]:
    """How narrow each column may get."""
    return [
        natural if column.right or column.whole else min(natural, max(cell_len(column.title), _NARROWEST))
        for column, natural in zip(columns, widths, strict=True)
    ]


def _wrapped(row: list[str], widths: list[int]) -> list[list[str]]:
    pieces = textwrap.wrap(row[-1], widths[-1]) or [""]
    blank = [""] * (len(row) - 1)
    return [[*row[:-1], pieces[0]], *([*blank, piece] for piece in pieces[1:])]


def _line(
    columns: Sequence[Column], row: list[str], widths: list[int], indent: int, *, heading: bool, more: bool
) -> Text:
    line = Text(" " * indent)
    last = len(columns) - 1
    for index, (column, cell) in enumerate(zip(columns, row, strict=True)):
        style = "bold" if heading else "" if index == 0 or more else style_of(cell)
        line.append(_pad(cell, widths[index], column.right, last=index == last), style=style)
        line.append(GAP if index < last else "")
    line.rstrip()
    return line


def _fit(widths: list[int], floors: Sequence[int], room: int) -> None:
    """Narrow columns until they fit: the last one first, down to a few words, then whichever is widest. Below their
    floors only where nothing else helps, and then the widest."""
    last = len(widths) - 1
    while sum(widths) > room:
        slack = [index for index in range(len(widths)) if widths[index] > floors[index]]
        give = [last] if last in slack and widths[last] > 24 else slack or range(len(widths))
        widest = max(give, key=lambda index: widths[index])
        if widths[widest] <= 1:
            return
        widths[widest] -= 1


def _pad(cell: str, width: int, right: bool, last: bool) -> str:
    if cell_len(cell) > width:
        return set_cell_size(cell, width - 1).rstrip() + "…"
    blank = " " * (width - cell_len(cell))
    return f"{blank}{cell}" if right else cell if last else f"{cell}{blank}"


def table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Row],
    wide: bool = False,
    indent: int = 0,
    wrap: bool = False,
) -> None:
    """Print a table; ``wide`` adds the columns that say so, ``wrap`` cuts nothing of the last one.

    On a terminal a line is never wider than that: cells are cut, and columns that find no room are left out and named.
    """
    shown = [
        column
        for column in columns
        if (wide or not column.wide) and not (column.sparse and not any(column.cell(row) for row in rows))
    ]
    width = console.width if console.is_terminal else None
    hidden: list[Column] = []
    if width is not None:
        shown, hidden = that_fit(shown, rows, width - indent)
    for line in lines(shown, rows, width, indent, wrap):
        console.print(line)
    if hidden:
        names = ", ".join(column.title for column in hidden)
        err().print(f"No room here for {names}: -o json has all.", style="dim", soft_wrap=False)


def fields(console: Console, pairs: Sequence[tuple[str, str]], indent: int = 0) -> None:
    """``Name:      value`` lines, aligned; a value of several lines is indented under its first."""
    width = max((len(name) for name, _ in pairs), default=0) + 1
    for name, value in pairs:
        line = Text(" " * indent)
        line.append(f"{name}:".ljust(width + 2), style="dim")
        first, *rest = (value or "-").splitlines() or ["-"]
        line.append(first, style=style_of(first))
        console.print(line)
        for more in rest:
            console.print(" " * (indent + width + 2) + more)


def data(form: str, value: Any) -> None:
    """JSON or YAML to standard output, whole, in the server's order."""
    if form == "json":
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        yaml.safe_dump(value, sys.stdout, sort_keys=False, allow_unicode=True, default_flow_style=False)
