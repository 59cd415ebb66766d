"""One control plane a folder, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from controlplane import datafolder as subject
from slmfleet.errors import UserError


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with subject.hold(folder):
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(UserError, match=rf"another controlplane \(pid {os.getpid()}\)"), subject.hold(folder):
            pass
    with subject.hold(folder):
        pass


def test_a_folder_that_can_t_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the data folder"), subject.hold(tmp_path / "file" / "data"):
        pass


def test_the_admin_token_is_its_owner_s_alone(tmp_path: Path) -> None:
    assert subject.read_admin_token(tmp_path) is None
    subject.write_admin_token(tmp_path, "secret")
    subject.write_admin_token(tmp_path, "other")
    assert subject.read_admin_token(tmp_path) == "other"
    assert (tmp_path / "admin.token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["admin.token"]


def test_the_replica_keeps_its_id(tmp_path: Path) -> None:
    assert subject.replica_id(tmp_path) == subject.replica_id(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", json.dumps({"http_listen": "x", "node_listen": 70000})])
def test_ports_that_make_no_sense_are_forgotten(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    assert subject.last_ports(tmp_path) == {}


def test_ports_are_remembered(tmp_path: Path) -> None:
    assert subject.last_ports(tmp_path) == {}
    subject.remember_ports(tmp_path, {"http_listen": 8081})
    assert subject.last_ports(tmp_path) == {"http_listen": 8081}
