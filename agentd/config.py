"""agentd's configuration: every key, with its unit, its default and why that default.

Read once by the command line, passed down as plain values; see ``slmfleet.config`` for the three places it comes from.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmfleet import config
from slmfleet.config import option, parse_address, parse_bool, parse_choice, parse_int, parse_labels, parse_path
from slmfleet.units import parse_duration, parse_size

PREFIX = "AGENTD_"
DEFAULT_FILE = Path("/etc/slmfleet/agentd.toml")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def default_state_dir() -> Path:
    """systemd's ``StateDirectory`` where there is one, else a folder of the user's own."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "slmfleet" / "agentd"


def default_keys_dir() -> Path:
    """systemd's credentials (``LoadCredential=``) where there are some, else a folder of the user's own."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "slmfleet" / "keys"


def default_name() -> str:
    """The host's name made a DNS label."""
    label = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")[:63].strip("-")
    return label or "node"


def parse_name(value: Any) -> str:
    """A DNS label (RFC 1123): what a node may be called."""
    if not _LABEL.fullmatch(str(value)):
        raise ValueError(
            f"{value!r} is no node name: write lower-case letters, digits and inner hyphens, at most 63, such as edge-1"
        )
    return str(value)


def parse_endpoint(value: Any) -> str:
    """host:port, or nothing."""
    if value:
        parse_address(value)
    return str(value)


def parse_hosts(value: Any) -> str:
    """host:port, comma-separated or as a list, to the former."""
    parts = value.split(",") if isinstance(value, str) else list(value)
    hosts = [part.strip() for part in map(str, parts) if part.strip()]
    for host in hosts:
        parse_address(host)
    return ",".join(hosts)


def parse_count(value: Any) -> int:
    """A whole number, zero or more."""
    number = parse_int(value)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number


def parse_keep_alive(value: Any) -> float:
    """Seconds, zero or more, or -1 for "never unload"."""
    seconds = parse_duration(value)
    if seconds < 0 and seconds != -1:
        raise ValueError(f"{value!r} is no keep-alive: write a duration such as 5m, 0 (unload at once) or -1 (never)")
    return seconds


def parse_factor(value: Any) -> float:
    """A number, zero or more."""
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{value!r} is no number") from None
    if not 0 <= number <= 1000 or isinstance(value, bool):
        raise ValueError(f"{value!r} is out of range: write a number from 0 to 1000")
    return number


def parse_layers(value: Any) -> int:
    """A whole number, -1 or more."""
    number = parse_int(value)
    if number < -1:
        raise ValueError(f"{number} is no number of layers: write -1 for what the runtime finds best, or 0 and more")
    return number


def parse_interval(value: Any) -> float:
    """Seconds, at least one tenth."""
    seconds = parse_duration(value)
    if not 0.1 <= seconds < 86400 * 7:
        raise ValueError(f"{value!r} is no interval: write at least 100ms and less than 7 days, such as 30s")
    return seconds


@dataclass(frozen=True)
class Config:
    """See each field's text; ``agentd run --help`` prints the same."""

    state_dir: Path = option(
        default_state_dir, "Folder of all that this node keeps: identity, database, model files.", parse_path
    )
    api_listen: tuple[str, int] = option(
        ("127.0.0.1", 11535), "host:port of the local OpenAI-compatible API; port 0 takes a free one.", parse_address
    )
    name: str = option(default_name, "Wished name of the node, a DNS label; used at enrolment only.", parse_name)
    labels: Mapping[str, str] = option(
        dict, "Labels of the node at enrolment, key=value, comma-separated.", parse_labels
    )
    server: str = option("", "host:port of the control plane's enrolment service; used until the node is enrolled.")
    token_file: str = option("", "File that holds a one-time enrolment token; used until the node is enrolled.")
    node_api: str = option(
        "", "host:port where the control plane takes sessions, for one that moved; empty: as it said last.",
        parse_endpoint,
    )  # fmt: skip
    keep_alive: float = option(
        300.0, "Seconds that a model stays loaded after its last request; 0 = unload at once, -1 = never unload.",
        parse_keep_alive,
    )  # fmt: skip
    max_memory: int = option(
        0, "Bytes of memory that all model workers together may use; 0 = 80 % of what is available.", parse_size
    )
    max_loaded_models: int = option(
        0, "Models loaded at the same time; 0 = as many as fit into max_memory.", parse_count
    )
    max_concurrent_agents: int = option(
        0, "Requests that run at once in all models together; 0 = as many as their workers have slots.", parse_count
    )
    memory_limit_factor: float = option(
        2.0, "A worker may take its expected memory times this (and 128 MiB): enforced by a cgroup where one is "
        "writable, else watched. 0 = no limits.", parse_factor,
    )  # fmt: skip
    worker_cpus: float = option(
        0.0, "Processors that one worker may use, such as 1.5, where a cgroup is writable; 0 = no limit.", parse_factor
    )
    worker_pids: int = option(
        1024, "Processes and threads of one worker, where a cgroup is writable; 0 = no limit.", parse_count
    )
    power_profile: str = option(
        "auto", "performance, balanced or saver: what models may spend; auto chooses by battery, heat and throttling.",
        parse_choice("auto", "performance", "balanced", "saver"),
    )  # fmt: skip
    model_cache_bytes: int = option(
        0, "Bytes of model files kept on disk; 0 = no bound but disk_reserve. Files that are needed are never deleted.",
        parse_size,
    )  # fmt: skip
    disk_reserve: int = option(256 * 2**20, "Bytes of disk that downloads leave free for everybody else.", parse_size)
    threads: int = option(0, "Processor threads of one model worker; 0 = all processors but one.", parse_count)
    slots: int = option(
        1, "Requests that one worker serves at once, where its backend can; each takes a whole context of memory.",
        parse_count,
    )  # fmt: skip
    gpu_layers: int = option(-1, "Layers on an accelerator; -1 = what the runtime finds best, 0 = none.", parse_layers)
    kv_type: str = option(
        "", "Type of the key-value cache; empty: the backend's own, f16.",
        parse_choice("", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"),
    )  # fmt: skip
    lock_memory: bool = option(
        False, "Pin the weights in memory: too tight a limit then ends a worker instead of making it slow.", parse_bool
    )
    backends: Mapping[str, str] = option(
        dict, "Backends of your own, format=module:Class, comma-separated; one for a known format replaces it.",
        parse_labels,
    )  # fmt: skip
    upstream_hosts: str = option(
        "", "host:port, comma-separated, that models of format upstream may be at beside this device itself; what is "
        "asked of such a model leaves the device.", parse_hosts,
    )  # fmt: skip
    upstream_keys: Path = option(
        default_keys_dir, "Folder of the keys for upstream servers, one file each; a model names the file.", parse_path
    )
    context_tokens: int = option(2048, "Context of a model that states none, in tokens.", parse_count)
    telemetry_interval: float = option(30.0, "Seconds between two rows of telemetry.", parse_interval)
    outbox_bytes: int = option(
        64 * 2**20, "Bytes of unsent telemetry and events kept while offline; the oldest metrics are dropped first.",
        parse_size,
    )  # fmt: skip
    max_request_bytes: int = option(4 * 2**20, "Largest request body that the local API reads, in bytes.", parse_size)
    max_requests: int = option(256, "Requests that may run or wait at once; one more is refused with 503.", parse_count)
    stop_timeout: float = option(10.0, "Seconds that running requests get to end when agentd stops.", parse_duration)
    log_level: str = option("info", "One of debug, info, warning, error.",
                            parse_choice("debug", "info", "warning", "error"))  # fmt: skip
    log_format: str = option("text", "Log lines as text or json.", parse_choice("text", "json"))


def read(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The configuration from ``file`` (default: /etc/slmfleet/agentd.toml where it exists), environment and flags.

    Raises UsageError with one sentence.
    """
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    return config.load(Config, prefix=PREFIX, file=file, flags=flags)
