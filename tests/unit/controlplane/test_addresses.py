"""`dev` finds ports: what was said stands, what was not may move."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane import config
from controlplane.launch import addresses, refuse_taken
from controlplane.listening import Address, bind, first_of
from slmfleet.errors import UserError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def ports(
    tmp_path: Path, name: str, last: dict[str, int], explicit: frozenset[str] = frozenset(), **flags: str
) -> list[int]:
    file = tmp_path / "c.toml"
    file.write_text("")
    loaded, _ = config.load(file, flags, {})
    found = addresses(name, config.for_dev(loaded, explicit), explicit, last)
    assert {host for host, _ in found} == {"127.0.0.1"}
    return [port for _, port in found]


def test_the_port_of_the_last_run_comes_first_then_the_usual_one_then_any(tmp_path: Path) -> None:
    assert ports(tmp_path, "http_listen", {}) == [8080, 0]
    assert ports(tmp_path, "node_listen", {"node_listen": 4711, "http_listen": 1}) == [4711, 8444, 0]
    assert ports(tmp_path, "node_listen", {"node_listen": 8444}) == [8444, 0]


def test_a_taken_port_gives_way(taken: int) -> None:
    with first_of([("127.0.0.1", taken), ("127.0.0.1", 0)], lambda address: bind(address, "x_listen")) as listener:
        assert listener.getsockname()[1] not in (0, taken)
    with pytest.raises(UserError, match=r"another program does.*x_listen"):
        first_of([("127.0.0.1", taken)], lambda address: bind(address, "x_listen"))


def test_a_port_that_is_taken_at_the_last_moment_gives_way_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    neighbours: list[socket.socket] = []

    def attempt(address: Address) -> socket.socket:
        if not neighbours:
            neighbours.append(bind(address, "neighbour"))
        return bind(address, "x_listen")

    with first_of([("127.0.0.1", free), ("127.0.0.1", 0)], attempt) as listener, neighbours[0]:
        assert neighbours[0].getsockname()[1] == free
        assert listener.getsockname()[1] not in (0, free)


def test_a_port_that_somebody_gave_stands_or_is_an_error(tmp_path: Path, taken: int) -> None:
    given = frozenset({"http_listen"})
    address = f"127.0.0.1:{taken}"
    assert ports(tmp_path, "http_listen", {"http_listen": 1}, given, http_listen=address) == [taken]
    file = tmp_path / "c.toml"
    loaded, _ = config.load(file, {"http_listen": address}, {})
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{taken}: another program does.*http_listen"):
        refuse_taken(loaded, given)
    refuse_taken(loaded, frozenset())
