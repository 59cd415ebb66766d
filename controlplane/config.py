"""The control plane's configuration: every key, with its unit, its default and why that default.

Read once by the command line, passed down as plain values; see ``slmfleet.config`` for the three places it comes from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlplane.ingest.mqtt import MqttSettings
from slmfleet import config
from slmfleet.config import option, parse_address, parse_choice, parse_int, parse_path
from slmfleet.errors import UsageError
from slmfleet.units import parse_duration

PREFIX = "CONTROLPLANE_"
DEFAULT_FILE = Path("/etc/slmfleet/controlplane.toml")
SERVED = ("http_listen", "enrollment_listen", "node_listen", "artifacts_listen")
LISTENERS = (*SERVED, "mqtt_listen")
LOOPBACK = "127.0.0.1"
# `controlplane dev` is looked at by a person who waits: seconds matter more than the load of ten thousand nodes.
DEV_BEAT_S = 1.0
_NOT_AS_FLAG = (
    f"With a password in it set it in the file or as {PREFIX}{{}}: other users of this machine can read flags in ps."
)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]*[A-Za-z0-9])?")


def default_data_dir() -> Path:
    """systemd's ``StateDirectory`` where there is one, else a folder of the user's own."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "slmfleet" / "dev"


def parse_postgres_url(value: Any) -> str:
    """``postgresql://...`` or nothing."""
    text = str(value)
    if text and not text.startswith(("postgresql://", "postgres://", "postgresql+asyncpg://")):
        raise ValueError("not a PostgreSQL URL: write postgresql://user:password@host:5432/database")
    return "postgresql://" + text.partition("://")[2] if text else ""


def parse_mqtt_url(value: Any) -> str:
    """``mqtt://...``, ``mqtts://...`` or nothing. The value may hold a password, so no error repeats it."""
    text = str(value)
    if text:
        MqttSettings.from_url(text)
    return text


def parse_beat(value: Any) -> float:
    """Seconds, from 0.1 to 300."""
    seconds = parse_duration(value)
    if not 0.1 <= seconds <= 300:
        raise ValueError(f"{value!r} is no beat: write a duration from 100ms to 5m, such as 5s")
    return seconds


def parse_ttl_beats(value: Any) -> int:
    """A whole number, two or more: one lost beat must not make a node suspect."""
    number = parse_int(value)
    if not 2 <= number <= 100:
        raise ValueError(f"{number} is out of range: write a number from 2 to 100")
    return number


def parse_days(value: Any) -> float:
    """Days, a tenth or more."""
    try:
        days = float(str(value))
    except ValueError:
        raise ValueError(f"{value!r} is no number of days") from None
    if not 0.1 <= days <= 3650:
        raise ValueError(f"{value!r} is out of range: write days from 0.1 to 3650")
    return days


def parse_host(value: Any) -> str:
    """A host name or address without a port."""
    text = str(value).strip().strip("[]")
    if text and not _HOST.fullmatch(text):
        raise ValueError(f"{value!r} is no host name or address: write it without a port, such as fleet.example.org")
    return text


def parse_optional_path(value: Any) -> Path | None:
    """A path, or nothing."""
    return parse_path(value) if str(value) else None


@dataclass(frozen=True)
class Config:
    """See each field's text; ``controlplane serve --help`` prints the same."""

    data_dir: Path = option(
        default_data_dir,
        "Folder of what this server keeps beside its database: certificate authority, model files, first API key.",
        parse_path,
    )
    http_listen: tuple[str, int] = option(
        (LOOPBACK, 8080), "host:port of REST, gateway and docs: plain HTTP, so loopback or behind a TLS proxy.",
        parse_address,
    )  # fmt: skip
    enrollment_listen: tuple[str, int] = option(
        ("0.0.0.0", 8443), "host:port where nodes enrol and renew certificates (TLS).", parse_address
    )
    node_listen: tuple[str, int] = option(
        ("0.0.0.0", 8444), "host:port of the sessions and relays that nodes open (mutual TLS).", parse_address
    )
    artifacts_listen: tuple[str, int] = option(
        ("0.0.0.0", 8445), "host:port where nodes fetch model files (mutual TLS).", parse_address
    )
    mqtt_listen: tuple[str, int] = option(
        (LOOPBACK, 1883), "host:port of the embedded MQTT broker, `dev` only; the host must be 127.0.0.1.",
        parse_address,
    )  # fmt: skip
    advertise: str = option(
        "", "Host name or address by which nodes reach this server; empty: this machine's own name (dev: 127.0.0.1).",
        parse_host,
    )  # fmt: skip
    postgres_url: str = option(
        "", "postgresql://user:password@host:5432/database, libpq's parameters after a ? (sslmode, ...); `dev` starts "
        f"its own server when empty. {_NOT_AS_FLAG.format('POSTGRES_URL')}", parse_postgres_url,
    )  # fmt: skip
    mqtt_url: str = option(
        "", "mqtt[s]://user:password@host:port of the broker; `dev` starts its own when empty. "
        f"{_NOT_AS_FLAG.format('MQTT_URL')}", parse_mqtt_url,
    )  # fmt: skip
    mqtt_node_url: str = option(
        "", "mqtt[s]://[user:password@]host:port that nodes are told; empty: that of mqtt_url, and each node logs in "
        f"with its id and a password of its own. {_NOT_AS_FLAG.format('MQTT_NODE_URL')}", parse_mqtt_url,
    )  # fmt: skip
    mqtt_ca_file: Path | None = option(
        None, "PEM file of the authority behind the broker's certificate; empty: the system's and the fleet's own.",
        parse_optional_path,
    )  # fmt: skip
    mqtt_cert_file: Path | None = option(
        None,
        "PEM file of the client certificate for an mqtts:// broker; empty: one by the fleet's authority, for the name "
        "controlplane.",
        parse_optional_path,
    )
    mqtt_key_file: Path | None = option(None, "PEM file of the private key of mqtt_cert_file.", parse_optional_path)
    beat: float = option(
        5.0, "Seconds between two heartbeats of a node (dev: 1); failover times are multiples of it.", parse_beat
    )
    ttl_beats: int = option(3, "Beats of silence after which a node is suspect.", parse_ttl_beats)
    certificate_days: float = option(
        30.0, "Days that a node's certificate is good for; nodes renew at two thirds of it.", parse_days
    )
    stop_timeout: float = option(
        10.0, "Seconds that running requests get to end when the control plane stops.", parse_duration
    )
    log_level: str = option(
        "info", "One of debug, info, warning, error.", parse_choice("debug", "info", "warning", "error")
    )
    log_format: str = option("text", "Log lines as text or json.", parse_choice("text", "json"))

    @property
    def ttl_s(self) -> float:
        """Seconds of silence after which a node is suspect."""
        return self.beat * self.ttl_beats


def load(
    file: Path | None, flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[Config, frozenset[str]]:
    """The configuration, and the names that somebody set on purpose. Raises UsageError.

    ``file`` None: ``DEFAULT_FILE`` where it exists.
    """
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    loaded = config.load(Config, prefix=PREFIX, file=file, environment=environment, flags=flags)
    return loaded, frozenset(config.explicit(PREFIX, file, flags, environment))


def for_dev(given: Config, explicit: frozenset[str]) -> Config:
    """What ``controlplane dev`` makes of it: loopback, and a quick beat, where nothing else was said."""
    changes: dict[str, Any] = {name: (LOOPBACK, getattr(given, name)[1]) for name in LISTENERS if name not in explicit}
    if "beat" not in explicit:
        changes["beat"] = DEV_BEAT_S
    if not given.advertise:
        changes["advertise"] = LOOPBACK
    if given.mqtt_listen[0] not in (LOOPBACK, "localhost"):
        raise UsageError(
            "mqtt_listen must be on 127.0.0.1: the embedded broker knows no certificates; give --mqtt-url to use one "
            "that does"
        )
    return replace(given, **changes)


def check_for_serve(given: Config) -> None:
    """Raises UsageError when something that production needs is missing."""
    for name, what, example in (
        ("postgres_url", "a PostgreSQL server", "postgresql://user:password@host:5432/database"),
        ("mqtt_url", "an MQTT 5 broker", "mqtts://user:password@host:8883"),
    ):
        if not getattr(given, name):
            raise UsageError(
                f"`controlplane serve` needs {what}: set {name} (such as {example}) in the configuration, the variable "
                f"{PREFIX}{name.upper()} or the flag --{name.replace('_', '-')}; the embedded servers are for "
                "`controlplane dev` alone"
            )
    if bool(given.mqtt_cert_file) != bool(given.mqtt_key_file):
        raise UsageError("mqtt_cert_file and mqtt_key_file belong together: set both or none")
