"""Build hook: turn ``proto/slmfleet/v1/*.proto`` into ``slmfleet/v1/*_pb2*.py`` at install time.

The generated code is never edited and never committed, so it cannot drift from the contract. It is written
beside the hand-written ``slmfleet`` package for editable installs and wheels alike.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(root: Path) -> list[Path]:
    """Compile every ``.proto`` under ``root/proto`` into ``root``; return the files that were written."""
    from grpc_tools import protoc

    sources = sorted((root / "proto").rglob("*.proto"))
    if not sources:
        raise SystemExit(f"cannot generate the wire code: no .proto file under {root / 'proto'}")
    out = root / "slmfleet" / "v1"
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*_pb2*"):
        stale.unlink()
    (out / "__init__.py").write_text('"""Generated from proto/slmfleet/v1; do not edit."""\n')
    well_known = str(importlib.resources.files("grpc_tools") / "_proto")
    arguments = [
        "protoc",
        f"-I{root / 'proto'}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        f"--grpc_python_out={root}",
        *map(str, sources),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("cannot generate the wire code: protoc failed; its message is above")
    return sorted(out.glob("*.py*"))


class ProtoBuildHook(BuildHookInterface):
    """Runs ``generate`` before hatchling collects the files of a wheel or an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name == "wheel":
            generate(Path(self.root))
