"""Tables: aligned, cut only where there is a width, states in colour."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fleetctl import screen
from fleetctl.screen import Column

COLUMNS = [
    Column("NAME", lambda row: str(row["name"])),
    Column("SIZE", lambda row: str(row.get("size", "")), right=True),
    Column("ABOUT", lambda row: str(row.get("about", ""))),
]


def plain(rows: list[dict[str, object]], width: int | None = None) -> list[str]:
    return [line.plain for line in screen.lines(COLUMNS, rows, width)]


def test_columns_stand_under_their_headings() -> None:
    rows: list[dict[str, object]] = [{"name": "a", "size": "98.4 MB", "about": "x"}, {"name": "longer-name"}]
    assert plain(rows) == [
        "NAME             SIZE   ABOUT",
        "a             98.4 MB   x",
        "longer-name         -   -",
    ]


def test_wide_characters_keep_the_columns_straight() -> None:
    lines = plain([{"name": "東京", "size": "1", "about": "x"}, {"name": "ab", "size": "2", "about": "y"}])
    assert cell_len(lines[1].split("1")[0]) == cell_len(lines[2].split("2")[0])


def test_a_line_break_in_a_value_breaks_no_row() -> None:
    assert plain([{"name": "a", "about": "one\n  two"}])[1].endswith("one two")


@given(
    st.lists(st.text("abc äé東", max_size=40), min_size=1, max_size=5),
    st.text("xyz ", max_size=200),
    st.integers(40, 140),
)
def test_no_line_is_wider_than_the_terminal(names: list[str], about: str, width: int) -> None:
    for line in screen.lines(COLUMNS, [{"name": name, "about": about} for name in names], width):
        assert cell_len(line.plain) <= width


WIDE = [
    Column("NAME", lambda row: "edge-" + "1" * int(str(row.get("n", 1)))),
    Column("SEEN", lambda _: "3s", right=True),
    Column("VERSION", lambda _: "0.1.0", whole=True),
    Column("HARDWARE", lambda _: "2 CPU, 25.3 GB, x86_64", wide=True),
    Column("LOCAL-API", lambda _: "http://127.0.0.1:41123", wide=True, whole=True),
    Column("REASON", lambda _: "silent for 35 s; its stream closed; 2 TTLs have passed", wide=True),
    Column("LABELS", lambda _: "site=geneva,tier=demo"),
]


def shown(width: int, rows: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What a terminal of that width shows of ``-o wide``, and the note beside it."""
    file = io.StringIO()
    screen.table(Console(file=file, force_terminal=True, width=width, soft_wrap=True), WIDE, rows, True)
    return Text.from_ansi(file.getvalue()).plain.splitlines(), capsys.readouterr().err


@pytest.mark.parametrize(
    ("width", "gone"),
    [(200, ""), (100, ""), (80, "REASON"), (60, "LOCAL-API, REASON"), (30, "HARDWARE, LOCAL-API, REASON, LABELS")],
)
def test_columns_without_room_give_way_whole_and_are_named(
    width: int, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, note = shown(width, [{}], capsys)
    assert len(lines) == 2, "nothing wraps"
    assert all(cell_len(line) <= width for line in lines)
    assert note == (f"No room here for {gone}: -o json has all.\n" if gone else "")
    assert [title for title in gone.split(", ") if title in lines[0]] == ([""] if not gone else [])


@given(st.integers(1, 60), st.integers(24, 220))
def test_whatever_the_width_no_line_wraps_and_no_address_is_cut(name: int, width: int) -> None:
    rows: list[dict[str, object]] = [{"n": name}, {"n": 1}]
    kept, gone = screen.that_fit(WIDE, rows, width)
    assert kept[0] is WIDE[0]
    assert sorted(map(id, [*kept, *gone])) == sorted(map(id, WIDE))
    for line in screen.lines(kept, rows, width)[1:]:
        assert cell_len(line.plain) <= width
        assert ("http" in line.plain) == ("http://127.0.0.1:41123" in line.plain)


def test_a_pipe_gets_all_of_it() -> None:
    file = io.StringIO()
    screen.table(Console(file=file, width=20, soft_wrap=True), WIDE, [{}], True)
    assert "2 TTLs have passed   site=geneva,tier=demo" in file.getvalue()


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("ready", "green"), ("online for 3m", "green"), ("2/2", "green"), ("1/2", "yellow"), ("fetching 45%", "yellow"),
        ("lost", "red"), ("smollm2-135m", ""), ("a/b", ""), ("", ""),
    ],
)  # fmt: skip
def test_states_have_their_colour(text: str, style: str) -> None:
    assert screen.style_of(text) == style


@given(st.text("abcdefgh  ", min_size=1, max_size=300))
def test_wrapping_loses_no_word(about: str) -> None:
    lines = screen.lines(COLUMNS, [{"name": "a", "about": about}], 60, wrap=True)
    assert all(cell_len(line.plain) <= 60 for line in lines)
    said = "".join(line.plain.split("-   ", 1)[-1] for line in lines[1:])
    assert "".join(said.split()) == "".join(about.split() or ["-"])
