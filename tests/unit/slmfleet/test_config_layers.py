"""Configuration: which place wins, and what an error says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from slmfleet.config import (
    explicit,
    load,
    option,
    parse_address,
    parse_bool,
    parse_choice,
    parse_int,
    parse_labels,
    parse_path,
)
from slmfleet.errors import UsageError
from slmfleet.units import parse_duration


@dataclass(frozen=True)
class Settings:
    beat_s: float = option(5.0, "Seconds between two heartbeats.", parse=parse_duration)
    listen: tuple[str, int] = option(("127.0.0.1", 8080), "Where to listen.", parse=parse_address)
    labels: dict[str, str] = option(dict, "Labels.", parse=parse_labels)
    log_format: str = option("text", "Form of the log.", parse=parse_choice("text", "json"))


def read(
    tmp_path: Path, toml: str | None = None, environment: dict[str, str] | None = None, **flags: object
) -> Settings:
    file = None
    if toml is not None:
        file = tmp_path / "x.toml"
        file.write_text(toml)
    return load(Settings, prefix="SLM_", file=file, environment=environment or {}, flags=flags)


def test_defaults(tmp_path: Path) -> None:
    assert read(tmp_path) == Settings(5.0, ("127.0.0.1", 8080), {}, "text")
    assert read(tmp_path).labels is not read(tmp_path).labels


def test_each_place_wins_over_the_one_before(tmp_path: Path) -> None:
    toml = 'beat_s = "10s"\nlisten = "[::1]:1"\n[labels]\nsite = "lyon"\n'
    environment = {"SLM_BEAT_S": "20", "SLM_LABELS": "site=turin,hw=pi5", "OTHER_BEAT_S": "1"}
    assert read(tmp_path, toml) == Settings(10.0, ("::1", 1), {"site": "lyon"}, "text")
    assert read(tmp_path, toml, environment) == Settings(20.0, ("::1", 1), {"site": "turin", "hw": "pi5"}, "text")
    assert read(tmp_path, toml, environment, beat_s="1m", listen=None).beat_s == 60.0


@pytest.mark.parametrize(
    ("toml", "environment", "sentence"),
    [
        ("beat = 1", {}, "unknown key 'beat' in .*x.toml .did you mean 'beat_s'"),
        ("zzz = 1", {}, "unknown key 'zzz' in .*; known keys: beat_s, labels, listen, log_format"),
        ("beat_s = 'soon'", {}, "bad value for 'beat_s' in .*x.toml: 'soon' is no duration"),
        ("beat_s = ", {}, "cannot read the configuration .*x.toml: "),
        ("", {"SLM_LISTEN": "8080"}, "bad value for 'listen' in the environment: '8080' is no address"),
        ("", {"SLM_COLOUR": "red"}, "unknown key 'colour' in the environment; known keys: "),
        ("", {"SLM_LISTENS": "a:1"}, "unknown key 'listens' in the environment .did you mean 'listen'"),
        ("log_format = 'xml'", {}, "'xml' is none of text, json"),
        ("labels = 'site'", {}, "'site' is no label: write key=value"),
    ],
)
def test_errors_name_key_place_and_reason(
    tmp_path: Path, toml: str, environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        read(tmp_path, toml, environment)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load(Settings, prefix="SLM_", file=tmp_path / "none.toml", environment={})


def test_explicit_names(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("beat_s = 1")
    assert explicit("SLM_", file, {"listen": "x:1", "labels": None}, {"SLM_LOG_FORMAT": "json"}) == {
        "beat_s",
        "listen",
        "log_format",
    }


def test_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [parse_bool(value) for value in (True, "Yes", "off", 0)] == [True, True, False, False]
    assert parse_int("7") == 7
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse_path("~/x") == Path("/home/ada/x")
    assert parse_labels(["a=1", " b = 2 "]) == {"a": "1", "b": "2"}
    assert parse_address("localhost:0") == ("localhost", 0)
    for parse, value in ((parse_bool, "maybe"), (parse_int, "1.5"), (parse_address, "a:99999"), (parse_address, ":1")):
        with pytest.raises(ValueError, match=r"is no|is neither"):
            parse(value)


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_key(tmp_path: Path) -> None:
    links = {
        "SLM_SERVICE_HOST": "10.0.0.1",
        "SLM_SERVICE_PORT": "80",
        "SLM_SERVICE_PORT_HTTP": "80",
        "SLM_PORT": "tcp://10.0.0.1:80",
        "SLM_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert read(tmp_path, environment=links) == read(tmp_path)
