"""Tables: aligned, cut only where there is a width, states in colour."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

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
