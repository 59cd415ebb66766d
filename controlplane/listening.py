"""Where a server listens: an address that somebody gave, or the first of several that can be had.

A port is had by the one who binds it; that it was free a moment ago means nothing. So whoever may move tries one
address after the other, each for real.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from slmfleet.errors import UserError

BACKLOG = 2048

Address = tuple[str, int]
Bound = TypeVar("Bound")


def bind(address: Address, key: str) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises UserError that names ``key``, the option to change."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"cannot listen on {where}: another program does; stop it, or set another {key} (port 0: any free one)"
            ) from None
        raise UserError(f"cannot listen on {where}: {error.strerror or error}; set another {key}") from None


def first_of(addresses: Sequence[Address], attempt: Callable[[Address], Bound]) -> Bound:
    """What ``attempt`` makes of the first address that it can have. Raises the UserError of the last one."""
    *early, last = addresses
    for address in early:
        # Asked first: a server that is refused a port may say so to its log on its own.
        if not _is_free(address):
            continue
        try:
            return attempt(address)
        except UserError:
            # Somebody took it in between.
            continue
    return attempt(last)


def _is_free(address: Address) -> bool:
    try:
        bind(address, "").close()
    except UserError:
        return False
    return True
