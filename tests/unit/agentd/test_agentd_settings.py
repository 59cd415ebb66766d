"""The command line and the configuration."""

from __future__ import annotations

import dataclasses

import pytest

from agentd import cli
from agentd.config import Config, default_name, default_state_dir, read
from slmfleet.errors import UsageError


def run(*arguments: str) -> int:
    return cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--frobnicate"), "--frobnicate"),
        (("fly",), "fly"),
        (("run", "--api-listen", "nowhere"), "'nowhere' is no address"),
        (("run", "--max-memory", "much"), "'much' is no size"),
        (("run", "--keep-alive", "-5"), "keep-alive"),
        (("run", "--log-level", "loud"), "none of debug, info"),
        (("run", "--name", "Edge_1"), "node name"),
        (("run", "--threads", "-1"), "negative"),
        (("run", "--telemetry-interval", "0"), "interval"),
        (("run", "--config", "/does/not/exist.toml"), "does not exist"),
        (("enroll",), "--server"),
    ],
)
def test_bad_calls_are_one_line_and_exit_code_2(arguments: tuple[str, ...], said: str, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("agentd: ")
    assert said in output.err


def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "agentd.toml"
    file.write_text("keep_aliv = 3\n")
    assert run("run", "--config", str(file)) == 2
    assert "did you mean 'keep_alive'" in capsys.readouterr().err


def test_flags_win_over_environment_over_file(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "agentd.toml"
    file.write_text('keep_alive = "1m"\nthreads = 3\nmax_loaded_models = 1\n[labels]\nsite = "lyon"\n')
    monkeypatch.setenv("AGENTD_THREADS", "4")
    monkeypatch.setenv("AGENTD_MAX_LOADED_MODELS", "2")
    config = read(file, {"max_loaded_models": "5"})
    assert (config.keep_alive, config.threads, config.max_loaded_models) == (60.0, 4, 5)
    assert config.labels == {"site": "lyon"}


def test_every_key_is_documented_and_a_flag_of_run(capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        run("run", "--help")
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert field.metadata["doc"].endswith(".")
        assert f"--{field.name.replace('_', '-')}" in shown


def test_systemd_names_the_state_folder(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/agentd")
    assert str(default_state_dir()) == "/var/lib/agentd"


def test_the_default_name_is_a_label(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("socket.gethostname", lambda: "My_Host.local")
    assert default_name() == "my-host"
    monkeypatch.setattr("socket.gethostname", lambda: "___")
    assert default_name() == "node"


def test_bad_values_raise_usage_errors() -> None:
    with pytest.raises(UsageError):
        read(None, {"disk_reserve": "-1"})


@pytest.mark.parametrize("command", ["status", "run"])
def test_commands_without_a_node_say_what_to_do(command: str, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(command, "--state-dir", str(tmp_path / "state"), "--api-listen", "127.0.0.1:0") == 1
    said = capsys.readouterr().err
    assert "agentd: " in said
    assert "agentd run" in said if command == "status" else "agentd enroll" in said
