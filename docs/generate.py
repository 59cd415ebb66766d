"""Write docs/configuration.md out of the dataclasses that the programs read their settings into.

``python docs/generate.py`` writes it, ``python docs/generate.py --check`` exits with 1 when it is not current.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import agentd.config
import controlplane.config
import fleetctl.connection
from slmfleet.units import parse_size

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration

<!-- Written by docs/generate.py; do not edit. -->

Each key can stand in a TOML file, in the environment and on the command line; the later wins. `max_memory` is
`max_memory = "4Gi"` in the file, `AGENTD_MAX_MEMORY=4Gi` in agentd's environment and `--max-memory 4Gi` as a flag.
Durations are seconds or text such as `250ms`, `30s`, `10m`, `1h30m`; sizes are bytes or text such as `512Mi`, `4Gi`,
`4GB`. An unknown key or a bad value is one line on standard error and exit code 2.
"""
PROGRAMS: tuple[tuple[str, str, type, str], ...] = (
    ("agentd", agentd.config.PREFIX, agentd.config.Config, "`--config`, else `/etc/slmfleet/agentd.toml`"),
    (
        "controlplane",
        controlplane.config.PREFIX,
        controlplane.config.Config,
        "`--config`, else `/etc/slmfleet/controlplane.toml`",
    ),
    (
        "fleetctl",
        fleetctl.connection.PREFIX,
        fleetctl.connection.Config,
        "`FLEETCTL_CONFIG`, else `~/.config/slmfleet/fleetctl.toml`",
    ),
)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(*program) for program in PROGRAMS)])


def _section(name: str, prefix: str, settings: type, file: str) -> str:
    rows = [f"## {name}", "", f"File: {file}. Environment: `{prefix}...`.", ""]
    rows += ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(settings):
        meaning = field.metadata["doc"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | {_default(field)} | {meaning} |")
    return "\n".join([*rows, ""])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        factory = field.default_factory
        if factory in (dict, list, tuple):
            return "none"
        # It depends on the machine: its docstring says how.
        return " ".join((factory.__doc__ or "").split()).rstrip(".").replace("``", "`")
    return _shown(field.default, field.metadata["parse"])


def _shown(value: Any, parse: Any) -> str:
    if value is None or value == "" or (isinstance(value, (Mapping, tuple, list)) and not value):
        return "none"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int):
        return f"`{value[0]}:{value[1]}`"
    if parse is parse_size and isinstance(value, int) and value:
        return f"`{_size(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _size(value: int) -> str:
    for unit, name in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)


def main() -> int:
    """Write or check."""
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
