"""Every value is judged before anything starts, in one sentence; passwords are never repeated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from controlplane import config as subject
from controlplane.config import Config
from slmfleet.errors import UsageError


def load(tmp_path: Path, toml: str = "", **flags: str) -> tuple[Config, frozenset[str]]:
    file = tmp_path / "controlplane.toml"
    file.write_text(toml)
    return subject.load(file, flags, {})


def test_file_environment_and_flags_in_rising_order(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('beat = "2s"\nttl_beats = 4\nlog_level = "debug"')
    loaded, explicit = subject.load(file, {"log_level": "error"}, {"CONTROLPLANE_TTL_BEATS": "5"})
    assert (loaded.beat, loaded.ttl_beats, loaded.log_level) == (2.0, 5, "error")
    assert loaded.ttl_s == 10.0
    assert {"beat", "ttl_beats", "log_level"} <= explicit


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('beet = "1s"', "unknown key 'beet'.*did you mean 'beat'"),
        ('beat = "soon"', "beat.*duration"),
        ('beat = "0s"', "beat.*100ms"),
        ("ttl_beats = 1", "ttl_beats.*2 to 100"),
        ('http_listen = "8080"', "http_listen.*host:port"),
        ('postgres_url = "mysql://x"', "postgres_url.*postgresql://"),
        ('mqtt_url = "mqtt://h/path"', "mqtt_url.*mqtt://host"),
        ('advertise = "https://x/"', "advertise.*host name"),
        ("certificate_days = 0", "certificate_days.*0.1"),
        ('log_format = "xml"', "log_format.*text, json"),
    ],
)
def test_a_bad_key_or_value_is_one_sentence(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(tmp_path, toml)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_bad_url_is_not_repeated(tmp_path: Path) -> None:
    for key in ("postgres_url", "mqtt_url", "mqtt_node_url"):
        with pytest.raises(UsageError) as caught:
            load(tmp_path, f'{key} = "http://user:hunter2@host/x"')
        assert "hunter2" not in str(caught.value)


def test_dev_listens_on_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    made = subject.for_dev(*load(tmp_path, node_listen="0.0.0.0:9000"))
    assert made.enrollment_listen == ("127.0.0.1", 8443)
    assert made.node_listen == ("0.0.0.0", 9000)
    assert made.advertise == "127.0.0.1"
    assert made.beat == subject.DEV_BEAT_S
    assert subject.for_dev(*load(tmp_path, beat="3s")).beat == 3.0


def test_the_embedded_broker_stays_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mqtt_listen must be on 127\.0\.0\.1"):
        subject.for_dev(*load(tmp_path, mqtt_listen="0.0.0.0:1883"))


def test_serve_refuses_the_embedded_servers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a PostgreSQL server"):
        subject.check_for_serve(load(tmp_path)[0])
    with pytest.raises(UsageError, match="needs an MQTT 5 broker"):
        subject.check_for_serve(load(tmp_path, postgres_url="postgresql://h/d")[0])
    both = {"postgres_url": "postgres://h/d", "mqtt_url": "mqtts://h"}
    subject.check_for_serve(load(tmp_path, **both)[0])
    with pytest.raises(UsageError, match="belong together"):
        subject.check_for_serve(load(tmp_path, **both, mqtt_cert_file="/x")[0])


def test_every_key_says_what_it_is() -> None:
    for field in dataclasses.fields(Config):
        doc = field.metadata["doc"]
        assert doc.endswith("."), field.name
        assert len(doc) > 20, field.name
