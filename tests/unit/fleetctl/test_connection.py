"""Which server and which key: precedence, and keys that stay with their server."""

import json
from pathlib import Path

import pytest

from fleetctl.connection import resolve
from fleetctl.errors import Unreachable
from slmfleet.errors import UsageError

NOTHING: dict[str, str | None] = {"server": None, "token": None, "data_dir": None, "ca_file": None}


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "runtime.json").write_text(json.dumps({"pid": 1, "http": "127.0.0.1:8080"}))
    (folder / "admin.token").write_text("dev-key\n")
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleetctl.toml"
    path.write_text('server = "https://kept.example"\ntoken = "kept-key"\n')
    return path


def found(flags: dict[str, str | None], environment: dict[str, str], file: Path) -> tuple[str, str | None]:
    connection = resolve({**NOTHING, **flags}, environment, file)
    return connection.server, connection.token


def test_flags_beat_the_environment_beats_the_file(file: Path) -> None:
    environment = {"FLEETCTL_SERVER": "http://env", "FLEETCTL_TOKEN": "env-key"}
    assert found({"server": "http://flag", "token": "flag-key"}, environment, file) == ("http://flag", "flag-key")
    assert found({}, environment, file) == ("http://env", "env-key")
    assert found({}, {}, file) == ("https://kept.example", "kept-key")


def test_a_local_control_plane_is_found_last(dev: Path, file: Path) -> None:
    nothing = file.with_name("none.toml")
    assert found({"data_dir": str(dev)}, {}, nothing) == ("http://127.0.0.1:8080", "dev-key")
    assert found({"data_dir": str(dev)}, {}, file) == ("https://kept.example", "kept-key")


def test_a_key_of_the_file_is_not_sent_to_another_server(file: Path) -> None:
    assert found({"server": "http://elsewhere"}, {}, file) == ("http://elsewhere", None)
    assert found({"server": "https://kept.example/"}, {}, file) == ("https://kept.example", "kept-key")


def test_a_local_key_goes_to_the_local_server_alone(dev: Path, file: Path) -> None:
    flags = {"data_dir": str(dev), "server": "127.0.0.1:8080"}
    assert found(flags, {}, file) == ("http://127.0.0.1:8080", "dev-key")
    assert found({**flags, "server": "http://127.0.0.1:8081"}, {}, file) == ("http://127.0.0.1:8081", None)


def test_a_key_may_stand_in_a_file_of_its_own(tmp_path: Path, file: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    environment = {"FLEETCTL_SERVER": "http://s", "FLEETCTL_TOKEN_FILE": str(key)}
    assert found({}, environment, file) == ("http://s", "secret")
    key.unlink()
    with pytest.raises(UsageError, match="cannot read the API key"):
        found({}, environment, file)


@pytest.mark.parametrize("runtime", ["", "[]", '{"pid": 1}'])
def test_without_any_server_the_sentence_says_what_to_do(tmp_path: Path, runtime: str) -> None:
    (tmp_path / "runtime.json").write_text(runtime)
    with pytest.raises(Unreachable, match="give --server URL"):
        found({"data_dir": str(tmp_path)}, {}, tmp_path / "none.toml")


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fleetctl.toml"
    path.write_text('sever = "x"\n')
    with pytest.raises(UsageError, match=r"unknown key 'sever' .*did you mean 'server'"):
        found({}, {}, path)
