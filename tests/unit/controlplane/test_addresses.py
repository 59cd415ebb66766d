"""`dev` finds ports: what was said stands, what was not may move."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane import config
from controlplane.launch import choose_address, refuse_taken
from slmfleet.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def chosen(
    tmp_path: Path, name: str, last: dict[str, int], explicit: frozenset[str] = frozenset(), **flags: str
) -> int:
    file = tmp_path / "c.toml"
    file.write_text("")
    loaded, _ = config.load(file, flags, {})
    return choose_address(name, config.for_dev(loaded, explicit), explicit, last)[1]


def test_a_usual_port_that_is_taken_gives_way(tmp_path: Path, taken: int) -> None:
    assert chosen(tmp_path, "http_listen", {}, http_listen=f"127.0.0.1:{taken}") == 0


def test_the_port_of_the_last_run_comes_first(tmp_path: Path, taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    assert chosen(tmp_path, "node_listen", {"node_listen": free}) == free
    assert chosen(tmp_path, "node_listen", {"node_listen": taken}) in (8444, 0)


def test_a_port_that_somebody_gave_stands_or_is_an_error(tmp_path: Path, taken: int) -> None:
    given = frozenset({"http_listen"})
    address = f"127.0.0.1:{taken}"
    assert chosen(tmp_path, "http_listen", {"http_listen": 1}, given, http_listen=address) == taken
    file = tmp_path / "c.toml"
    loaded, _ = config.load(file, {"http_listen": address}, {})
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{taken}: another program does.*http_listen"):
        refuse_taken(loaded, given)
    refuse_taken(loaded, frozenset())
