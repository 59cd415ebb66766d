"""Start of a worker process. Nothing heavy is imported before the environment is right."""

from __future__ import annotations

import argparse
import os
import socket

from agentd.models.worker.environment import TRAPS, die_with_parent


def main() -> None:
    """Serve until Stop or end of file; never returns, so that no runtime's destructor can hang the end."""
    parser = argparse.ArgumentParser(prog="agentd.models.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    for name, value in TRAPS.items():
        os.environ.setdefault(name, value)
    die_with_parent(arguments.parent)
    from agentd.models.worker.channel import Channel
    from agentd.models.worker.service import Service

    Service(Channel(socket.socket(fileno=arguments.fd))).run()


if __name__ == "__main__":
    main()
