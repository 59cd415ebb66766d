"""Which control plane to talk to, and with which key.

In this order: flags, environment (``FLEETCTL_SERVER``, ``FLEETCTL_TOKEN``, ...), ``~/.config/slmfleet/fleetctl.toml``,
and at last a control plane that ``controlplane dev`` runs on this machine, found by its data folder.

A key goes only to the server that it was given for: a key from the file or from a data folder is not sent to another
server that a flag names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetctl.errors import Unreachable
from slmfleet.config import load, option, parse_path
from slmfleet.errors import UsageError

PREFIX = "FLEETCTL_"


def default_data_dir() -> Path:
    """``~/.local/share/slmfleet/dev``, the folder of ``controlplane dev``."""
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "slmfleet" / "dev"


@dataclass(frozen=True)
class Config:
    """Settings of ``fleetctl``; the file is ``~/.config/slmfleet/fleetctl.toml``."""

    server: str = option("", "URL of the control plane, such as https://fleet.example.org:8080.")
    token: str = option("", "API key for `server`.")
    token_file: Path | None = option(None, "File that holds the API key, instead of `token`.", parse=parse_path)
    ca_file: Path | None = option(
        None, "PEM file of the authorities that sign the server's HTTPS certificate; default: the system's.", parse_path
    )
    data_dir: Path = option(
        default_data_dir,
        "Data folder of a `controlplane dev` on this machine; used when no server is given.",
        parse=parse_path,
    )


@dataclass(frozen=True, slots=True)
class Connection:
    """Where to, and with what. ``token`` is None when no key is known for this server."""

    server: str
    token: str | None
    ca_file: Path | None


def default_file() -> Path:
    """Where the configuration of the person who calls stands."""
    return Path.home() / ".config/slmfleet/fleetctl.toml"


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None) -> Connection:
    """The connection that flags, environment, file and a local control plane give, in that order.

    Raises UsageError for a bad setting, Unreachable when no server is known.
    """
    path = file or default_file()
    kept_in = path if path.exists() else None
    kept = load(Config, prefix=PREFIX, file=kept_in, environment={})
    given = load(Config, prefix=PREFIX, file=None, environment=environment, flags=flags)
    both = load(Config, prefix=PREFIX, file=kept_in, environment=environment, flags=flags)
    local = _local(both.data_dir)
    if not both.server:
        if local is None:
            raise Unreachable(
                "no control plane is known: give --server URL and --token KEY, set FLEETCTL_SERVER and FLEETCTL_TOKEN, "
                f"write them into {path}, or start one here with `controlplane dev` (looked in {both.data_dir})"
            )
        return Connection(local.server, _key(given) or local.token, both.ca_file)
    server = _url(both.server)
    token: str | None = _key(given)
    if not token and server == _url(kept.server):
        token = _key(kept)
    if not token and local is not None and server == local.server:
        token = local.token
    return Connection(server, token or None, both.ca_file)


def _local(data_dir: Path) -> Connection | None:
    try:
        running = json.loads((data_dir / "runtime.json").read_text())
        address = str(running["http"])
        token = (data_dir / "admin.token").read_text().strip()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Connection(_url(address), token, None)


def _url(server: str) -> str:
    return (server if "://" in server or not server else f"http://{server}").rstrip("/")


def _key(config: Config) -> str:
    if config.token or config.token_file is None:
        return config.token
    try:
        return config.token_file.read_text().strip()
    except OSError as error:
        raise UsageError(f"cannot read the API key in {config.token_file}: {error.strerror}") from None
