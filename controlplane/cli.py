"""The command line: ``controlplane dev | serve | migrate | key``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import slmfleet
from controlplane import config as configuration
from controlplane.config import Config
from slmfleet import logs
from slmfleet.errors import UsageError, UserError

PROGRAM = "controlplane"
# Libraries whose "info" is of no use to an operator.
CHATTY = ("alembic", "uvicorn", "httpx", "asyncio")
log = logs.get(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage or configuration."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        return _run(arguments)
    except UserError as error:
        return _tell(error)
    except BaseExceptionGroup as group:
        return _tell_group(group)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    names = {field.name for field in dataclasses.fields(Config)}
    flags = {name: value for name, value in given.items() if name in names}
    loaded, explicit = configuration.load(given["config"], flags)
    logs.configure(loaded.log_level, loaded.log_format)
    for talker in CHATTY:
        logging.getLogger(talker).setLevel(logging.WARNING)
    if command == "migrate":
        return _migrate(loaded)
    if command == "key":
        return _key(loaded, given["name"], given["role"])
    # Late: these bring gRPC, FastAPI and SQLAlchemy, which --help and migrate do without.
    from controlplane import launch

    if command == "dev":
        launch.dev(configuration.for_dev(loaded, explicit), explicit)
    else:
        configuration.check_for_serve(loaded)
        launch.serve(loaded)
    return 0


def _migrate(config: Config) -> int:
    from controlplane.db import migrate

    if not config.postgres_url:
        raise UsageError("`controlplane migrate` needs postgres_url: give --postgres-url postgresql://...")
    before = migrate.upgrade(config.postgres_url)
    now = migrate.head()
    print(f"the schema is {now}" + ("" if before == now else f", it was {before or 'empty'}"))
    return 0


def _key(config: Config, name: str, role: str) -> int:
    from controlplane import keys
    from controlplane.embedded.postgres import EmbeddedPostgres

    # Of a running `controlplane dev` the database is reachable through the socket in its data folder.
    url = config.postgres_url or EmbeddedPostgres(config.data_dir / "postgres").url()
    print(asyncio.run(keys.new_key(url, name, role)))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{PROGRAM}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description="The control plane of a fleet of devices that run small language models."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {slmfleet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, summary in (
        ("dev", "run everything on this machine, with an embedded PostgreSQL and MQTT broker, on loopback"),
        ("serve", "run against your own PostgreSQL and MQTT broker"),
        ("migrate", "bring the database's schema up to this version"),
        ("key", "make an API key, or give the one of that name a new secret, and print it"),
    ):
        sub = commands.add_parser(command, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if command == "key":
            sub.add_argument("name", help="name of the key, such as ci")
            sub.add_argument(
                "--role", choices=("admin", "gateway"), default="admin", help="admin: REST and gateway (default: admin)"
            )
        _add_options(sub)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help=f"TOML file with the same names as below, - as _ (default: {configuration.DEFAULT_FILE} where it exists)",
    )  # fmt: skip
    for field in dataclasses.fields(Config):
        # Values are parsed with those of the file and the environment, so that all three are judged alike.
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{field.metadata['doc']} {_default(field)}".replace("%", "%%"),
        )


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, tuple):
        value = f"{value[0]}:{value[1]}"
    return f"[default: {value}]" if value not in ("", None) else "[default: empty]"


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    """Before the event loop has its own handler: leave through every ``finally``."""
    raise SystemExit(128 + signal.SIGTERM)


def _tell(error: UserError) -> int:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return error.exit_code


def _tell_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Sentences for what a person can mend; a traceback for the rest."""
    users, rest = group.split(UserError)
    for error in _leaves(users) if users else []:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    if rest is not None:
        log.critical("the control plane failed", exc_info=rest)
    return 1


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


if __name__ == "__main__":
    sys.exit(main())
