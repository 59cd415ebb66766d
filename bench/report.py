"""One line of JSON for one benchmark."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from slmfleet import __version__

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Result:
    """What a benchmark found. ``figures`` are the ones that count; ``detail`` explains them."""

    name: str
    figures: Mapping[str, float]
    # Each round, in the order in which they ran; one unit for both, said in ``unit``.
    ours: Sequence[float]
    baseline: Sequence[float]
    unit: str
    confidence: tuple[float, float]
    # What was run, so that somebody else can run it.
    commands: Sequence[str]
    detail: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """The JSON line."""
        value = {
            "name": self.name,
            **{key: _round(figure) for key, figure in self.figures.items()},
            "ours": [_round(item) for item in self.ours],
            "baseline": [_round(item) for item in self.baseline],
            "unit": self.unit,
            "confidence": [_round(item) for item in self.confidence],
            "commands": list(self.commands),
            **self.detail,
            "machine": machine(),
        }
        return json.dumps(value)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and which commit."""
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "slmfleet": __version__,
        "commit": _commit(),
        "load1": os.getloadavg()[0],
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _round(value: float) -> float:
    return float(f"{value:.5g}")
