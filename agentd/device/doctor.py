"""``agentd doctor``: each check one line, ok, warn or fail, and what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from agentd import statefolder
from agentd.config import Config
from agentd.device import inventory, power
from agentd.identity import files as identity_files
from agentd.identity.files import Identity, renewal_at
from agentd.models.backends import FORMATS, available_formats
from slmfleet.config import parse_address
from slmfleet.errors import UserError
from slmfleet.units import format_size

CONNECT_S = 5.0


class Grade(StrEnum):
    """How a check went. Only ``fail`` makes the exit code 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    grade: Grade
    what: str
    sentence: str


def examine(config: Config) -> int:
    """Run all checks and print them; 1 if one failed."""
    findings = list(checks(config))
    for finding in findings:
        print(f"{finding.grade:<4}  {finding.what:<12} {finding.sentence}")
    return int(any(finding.grade == Grade.FAIL for finding in findings))


def checks(config: Config) -> Iterator[Finding]:
    """All findings; a check that can't be made is a finding, too."""
    simple: tuple[tuple[str, Callable[[Config], Iterator[Finding]]], ...] = (
        ("python", _python), ("state", _state), ("runtimes", _runtimes), ("memory", _memory), ("limits", _limits),
        ("power", _power), ("identity", _identity), ("api", _api),
    )  # fmt: skip
    for what, check in simple:
        try:
            yield from check(config)
        except (UserError, OSError) as error:
            yield Finding(Grade.FAIL, what, str(error))


def _python(_: Config) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        Grade.OK if sys.version_info >= (3, 11) else Grade.FAIL, "python", f"{version}, {ssl.OPENSSL_VERSION}"
    )


def _state(config: Config) -> Iterator[Finding]:
    statefolder.prepare(config.state_dir)
    if not os.access(config.state_dir, os.W_OK | os.X_OK):
        yield Finding(Grade.FAIL, "state", f"{config.state_dir} is not writable: give it to the user that runs agentd")
        return
    yield Finding(Grade.OK, "state", f"{config.state_dir} is writable")
    disk = shutil.disk_usage(config.state_dir)
    enough = disk.free > config.disk_reserve + 2**30
    sentence = f"{format_size(disk.free)} of {format_size(disk.total)} free"
    if not enough:
        sentence += f"; {format_size(config.disk_reserve)} stay in reserve: free some, models are large"
    yield Finding(Grade.OK if enough else Grade.WARN, "disk", sentence)


def _runtimes(_: Config) -> Iterator[Finding]:
    found = available_formats()
    for name, form in sorted(FORMATS.items()):
        if name in found:
            yield Finding(Grade.OK, "runtime", f"{form.runtime} loads {name}")
        else:
            yield Finding(
                Grade.WARN, "runtime", f"{name} can't be loaded: pip install 'slmfleet[{form.extra}]' if you need it"
            )
    if not found:
        yield Finding(Grade.FAIL, "runtime", "no runtime is installed: pip install 'slmfleet[llamacpp]'")


def _memory(config: Config) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.max_memory > total:
        yield Finding(
            Grade.WARN, "memory", f"max_memory is {format_size(config.max_memory)}, the device has "
            f"{format_size(total)}: lower it",
        )  # fmt: skip
    elif total < 900 * 10**6:
        yield Finding(Grade.WARN, "memory", f"{format_size(total)}: enough for models of about 0.3 GB")
    else:
        yield Finding(Grade.OK, "memory", format_size(total))


def _limits(config: Config) -> Iterator[Finding]:
    kind = inventory.limits_kind()
    if not config.memory_limit_factor:
        yield Finding(
            Grade.WARN, "limits", "memory_limit_factor is 0: nothing holds a worker to its memory; remove it to have "
            "the default",
        )  # fmt: skip
    elif kind == "watchdog":
        yield Finding(
            Grade.WARN, "limits", "watchdog: no control group is writable, so agentd looks at the memory of its "
            "workers each second and ends one that takes too much; for limits by the kernel run agentd under systemd "
            "with Delegate=yes",
        )  # fmt: skip
    else:
        yield Finding(
            Grade.OK, "limits", f"{kind}: the kernel enforces the limits of workers, memory expected x "
            f"{config.memory_limit_factor:g} + 128 MiB each",
        )  # fmt: skip


def _power(config: Config) -> Iterator[Finding]:
    choice = power.choose(config.power_profile, power.Sensors().read())
    yield Finding(Grade.OK, "power", f"{choice.profile.value}: {choice.reason}")


def _identity(config: Config) -> Iterator[Finding]:
    identity = identity_files.load(config.state_dir)
    if identity is None:
        yield Finding(Grade.FAIL, "identity", "not enrolled: run `agentd enroll --server host:port --token-file FILE`")
        return
    mode = identity.key_file.stat().st_mode & 0o777
    if mode & 0o077:
        yield Finding(Grade.FAIL, "identity", f"{identity.key_file} is readable by others: chmod 600 it")
    else:
        yield Finding(Grade.OK, "identity", f"{identity.name} ({identity.node_id})")
    yield _certificate(identity, time.time())
    yield _reachable("session", identity, identity.endpoints.node_api)
    yield _reachable("artifacts", identity, identity.endpoints.artifacts.removeprefix("https://").partition("/")[0])


def _certificate(identity: Identity, now_s: float) -> Finding:
    days = (identity.not_after_s - now_s) / 86400
    if days <= 0:
        return Finding(
            Grade.FAIL, "certificate", f"expired {-days:.1f} days ago: agentd renews it when it reaches the control "
            f"plane at {identity.endpoints.enrollment}; check the clock, too",
        )  # fmt: skip
    if now_s > renewal_at(identity.not_before_s, identity.not_after_s) + 86400:
        return Finding(
            Grade.WARN, "certificate", f"{days:.1f} days left and a renewal is overdue: see agentd's log for why"
        )
    return Finding(Grade.OK, "certificate", f"{days:.1f} days left")


def _reachable(what: str, identity: Identity, address: str) -> Finding:
    try:
        with socket.create_connection(parse_address(address), CONNECT_S) as plain:
            context = identity.ssl_context()
            context.set_alpn_protocols(["h2"] if what == "session" else ["http/1.1"])
            with context.wrap_socket(plain, server_hostname=identity_files.SERVER_NAME):
                return Finding(Grade.OK, what, f"{address} answers with mutual TLS")
    except ssl.SSLError as error:
        return Finding(
            Grade.FAIL, what, f"{address} answers, but TLS fails ({error.reason or error}): was the authority replaced?"
        )
    except (OSError, ValueError) as error:
        # A node works offline: unreachable is a warning.
        return Finding(Grade.WARN, what, f"cannot reach {address} ({error}): the node serves what it has")


def _api(config: Config) -> Iterator[Finding]:
    from agentd.api.server import bind

    running = statefolder.read_runtime(config.state_dir)
    if running is not None:
        yield Finding(Grade.OK, "api", f"agentd runs (pid {running['pid']}) and listens on {running['api']}")
        return
    host, port = config.api_listen
    try:
        bind(config.api_listen).close()
    except UserError as error:
        yield Finding(Grade.FAIL, "api", str(error))
    else:
        yield Finding(Grade.OK, "api", f"{host}:{port} is free")
