"""``agentd run | enroll | status | doctor``.

argparse and plain prints: what the command line imports stays in the daemon's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentd.config import DEFAULT_FILE, PREFIX, Config, read
from slmfleet import __version__, logs
from slmfleet.errors import UsageError, UserError

_ENROLL_KEYS = ("state_dir", "server", "token_file", "name", "labels", "log_level", "log_format")
_LOOK_KEYS = ("state_dir", "server", "api_listen", "max_memory", "disk_reserve", "log_level", "log_format")


class _Parser(argparse.ArgumentParser):
    """One clear line instead of usage plus error."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; its exit code."""
    try:
        options = parser().parse_args(arguments)
        return int(options.command(options) or 0)
    except UserError as error:
        print(f"agentd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line. Every key of the configuration that a command uses is a flag of it."""
    top = _Parser(prog="agentd", description="Runs small-language-model agents on this device.")
    top.add_argument("--version", action="version", version=f"agentd {__version__}")
    commands = top.add_subparsers(dest="name_of_command", required=True, metavar="run | enroll | status | doctor")

    run = _command(commands, "run", "run the daemon", _run, [field.name for field in dataclasses.fields(Config)])
    run.epilog = f"Each flag is also a key of the file and a variable {PREFIX}<KEY>; flags win, then variables."

    enroll = _command(commands, "enroll", "make this device a node of a fleet", _enroll, _ENROLL_KEYS)
    enroll.add_argument("--token", help="the one-time token itself (other users of this machine can read it in ps)")
    enroll.add_argument("--under-lock", action="store_true", help=argparse.SUPPRESS)

    status = _command(commands, "status", "say what the daemon on this device does", _status, _LOOK_KEYS)
    status.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")

    _command(commands, "doctor", "check this device and say what to mend", _doctor, _LOOK_KEYS)
    return top


def _command(commands: Any, name: str, text: str, function: Any, keys: Sequence[str]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"agentd {name}: {text}.")
    command.set_defaults(command=function)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file; default {DEFAULT_FILE} where it exists"
    )
    for field in dataclasses.fields(Config):
        if field.name in keys:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            command.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=f"config_{field.name}",
                metavar="VALUE",
                help=f"{field.metadata['doc']} Default: {_shown(default)}".replace("%", "%%"),
            )
    return command


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return f"{default[0]}:{default[1]}"
    return str(default) if default not in ("", {}) else "none"


def _read(options: argparse.Namespace) -> Config:
    flags = {key.removeprefix("config_"): value for key, value in vars(options).items() if key.startswith("config_")}
    config = read(options.config, flags)
    logs.configure(config.log_level, config.log_format)
    return config


def _run(options: argparse.Namespace) -> int:
    config = _read(options)
    from agentd.upkeep import few_arenas

    few_arenas()
    import asyncio

    from agentd import daemon
    from agentd.models.host import Host

    failure: UserError | None = None
    try:
        asyncio.run(daemon.run(config, Host))
    except* UserError as group:
        failure = _first(group)
    # Raised inside ``except*`` it would come out wrapped in a group again (CPython before 3.11.4).
    if failure is not None:
        raise failure
    return 0


def _first(group: BaseExceptionGroup[Any]) -> UserError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    return error


def _enroll(options: argparse.Namespace) -> int:
    config = _read(options)
    from contextlib import nullcontext

    from agentd import statefolder
    from agentd.device import inventory
    from agentd.identity.files import load
    from agentd.identity.pinning import parse_token
    from agentd.models.backends import available_formats
    from slmfleet.config import parse_address

    if not config.server:
        raise UsageError("say where to enrol: --server host:port (the control plane's enrolment port)")
    try:
        parse_address(config.server)
    except ValueError as error:
        raise UsageError(f"bad value for 'server': {error}") from None
    with nullcontext() if options.under_lock else statefolder.lock(config.state_dir):
        known = load(config.state_dir)
        if known is not None:
            raise UserError(
                f"this node is enrolled already, as {known.name} ({known.node_id}): nothing was changed; remove "
                f"{known.folder} first to enrol it anew"
            )
        token = parse_token(_token_text(options.token, config.token_file))
        # Imported as late as can be: the daemon itself never gets here.
        from agentd.identity.enroll import enroll

        facts = inventory.take(config.state_dir, sorted(available_formats()), inventory.limits_kind())
        identity = enroll(config.state_dir, config.server, token, config.name, config.labels, facts)
    print(f"enrolled as {identity.name} ({identity.node_id})")
    return 0


def _token_text(token: str | None, token_file: str) -> str:
    if token:
        return token
    if not token_file:
        raise UsageError("give the enrolment token: --token-file FILE (or --token TOKEN)")
    try:
        return Path(token_file).expanduser().read_text()
    except OSError as error:
        raise UserError(f"cannot read the token file {token_file}: {error.strerror}") from error


def _status(options: argparse.Namespace) -> int:
    config = _read(options)
    from agentd.status import show

    return show(config.state_dir, options.output)


def _doctor(options: argparse.Namespace) -> int:
    config = _read(options)
    from agentd.device.doctor import examine

    return examine(config)
