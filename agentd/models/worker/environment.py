"""Traps of the runtimes, defused through the environment before anything heavy is imported."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

TRAPS: Mapping[str, str] = {
    # OpenMP threads spin at barriers; with as many threads as cores one busy neighbour then costs time-outs.
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "passive",
    # ggml's abort() otherwise spawns a debugger, which hangs a device without one.
    "GGML_NO_BACKTRACE": "1",
    # Official builds of ONNX Runtime report home by default.
    "ORT_DISABLE_TELEMETRY": "1",
    # Each thread would get its own malloc arena of up to 64 MiB; read before main(), so set it when spawning.
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
_PR_SET_PDEATHSIG = 1
# Settings of agentd itself may be secrets; a worker needs none of them.
_PRIVATE_PREFIXES = ("AGENTD_", "SLMFLEET_", "CONTROLPLANE_")


def worker_environment(base: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: ``base`` without agentd's own settings, the traps' cures, then ``more``."""
    kept = {key: value for key, value in base.items() if not key.startswith(_PRIVATE_PREFIXES)}
    return {**kept, **TRAPS, **more}


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the thread that spawned us ends; end now if that already happened."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(3)
