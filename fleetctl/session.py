"""What one call of fleetctl carries from its global flags to its command."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from pathlib import Path

import typer

from fleetctl.client import Client
from fleetctl.connection import Connection, resolve

# Flags that kubectl's users expect to work before and after the command; main() moves them to the front.
GLOBAL_FLAGS = ("--server", "--token", "--data-dir", "--ca-file")


@dataclass
class Session:
    """The global flags as given; the connection is worked out when a command first needs it."""

    flags: dict[str, str | None] = field(default_factory=dict)
    _connection: Connection | None = None

    def connection(self) -> Connection:
        """Which server, which key."""
        if self._connection is None:
            file = os.environ.get("FLEETCTL_CONFIG")
            known = {key: value for key, value in os.environ.items() if key != "FLEETCTL_CONFIG"}
            self._connection = resolve(self.flags, known, Path(file) if file else None)
        return self._connection

    def client(self) -> Client:
        """A client; close it, or use it in a ``with``."""
        connection = self.connection()
        return Client(connection.server, connection.token, connection.ca_file)


def of(context: typer.Context) -> Session:
    """The session of a running command."""
    session = context.find_object(Session)
    assert session is not None, "the callback of the app sets it"
    return session


def now() -> datetime.datetime:
    """The present, for ages; read once a command."""
    return datetime.datetime.now(datetime.UTC)


def global_flags_first(arguments: list[str]) -> list[str]:
    """``get nodes --server X`` as ``--server X get nodes``; what follows ``--`` stays."""
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            return [*front, *rest, "--", *waiting]
        if argument in GLOBAL_FLAGS:
            front += [argument, *([value] if (value := next(waiting, None)) is not None else [])]
        elif argument.startswith(tuple(f"{flag}=" for flag in GLOBAL_FLAGS)):
            front.append(argument)
        else:
            rest.append(argument)
    return [*front, *rest]
