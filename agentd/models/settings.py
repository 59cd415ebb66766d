"""Settings of the model host: plain values, filled in by the composition root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


def default_threads(cores: int | None = None) -> int:
    """One less than the processors this process may use: as many threads as cores collapse when one is taken."""
    return max(1, (cores or len(os.sched_getaffinity(0))) - 1)


@dataclass(frozen=True, slots=True)
class BackoffSettings:
    """After the n-th crash in a row a model is not started for ``base * 2**(n-1)`` seconds, at most ``cap``."""

    base_s: float = 10.0
    cap_s: float = 300.0
    # Crashes in a row after which the model is reported as degraded.
    degraded_after: int = 5


@dataclass(frozen=True, slots=True)
class HostSettings:
    """Everything that the model host may be told. Sizes in bytes, durations in seconds."""

    # Memory that all workers together may be granted; 0 = 80 % of the memory of the machine (or of its cgroup).
    max_memory_bytes: int = 0
    # Workers at once; 0 = no limit but memory.
    max_loaded_models: int = 0
    # Requests that run at once in all workers together; 0 = no limit.
    max_concurrent: int = 0
    # Left to the rest of the device when the kernel is asked what is available.
    reserve_bytes: int = 128 * 2**20
    # Context of models that name none; never more than a model was trained for.
    default_context_tokens: int = 4096
    # Seconds a model stays loaded after its last request; 0 = not at all, -1 = for ever.
    keep_alive_s: float = 300.0
    # Threads of each worker; 0 = processors - 1.
    threads: int = 0
    # Requests that one worker serves at once, where its backend can. Each slot costs a whole context of memory.
    slots: int = 1
    # Longest run of prompt tokens between two looks at a cancellation.
    prefill_chunk: int = 128
    # Type of the key-value cache, such as "q8_0"; "" = the backend's default (f16).
    kv_type: str = ""
    # Layers on an accelerator; -1 = what the backend finds best.
    gpu_layers: int = -1
    # Pin the weights in memory: a tight limit then kills a worker instead of making it slow.
    lock_memory: bool = False
    # Requests that may wait for one model.
    max_queued: int = 32
    # From the spawn to readiness: a floor, and what a large file may take per byte (20 MB/s, a worn SD card).
    load_timeout_s: float = 120.0
    load_seconds_per_byte: float = 1 / 20e6
    # A worker that makes no progress for this long hangs; slow models get more, see admission.hang_limit_s.
    hang_floor_s: float = 15.0
    backoff: BackoffSettings = field(default_factory=BackoffSettings)
    # Grace between Stop, SIGTERM and SIGKILL.
    stop_grace_s: float = 2.0
    # Folder for what workers need while they live (mode 0700, emptied at start); None = a fresh temporary one.
    run_dir: Path | None = None
    # A worker may take what was estimated (or measured) times the factor, plus the slack: enforced by a cgroup where
    # one is writable, else watched. 0 = no limits at all.
    memory_limit_factor: float = 0.0
    memory_limit_slack_bytes: int = 0
    # Don't look for cgroups: watch.
    watch_only: bool = False
    # Limits in that cgroup: processors, and processes with threads; 0 = none.
    worker_cpus: float = 0.0
    worker_pids: int = 0
    # More backends, or others: format -> "module:Class".
    backends: Mapping[str, str] = field(default_factory=dict)
    # Variables for workers, over those of this process.
    worker_environment: Mapping[str, str] = field(default_factory=dict)

    def threads_per_worker(self) -> int:
        return self.threads or default_threads()

    def max_threads(self) -> int:
        """As many as there are processors: more only wait for each other."""
        return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Tuning:
    """Bounds that may change while the host runs: from the control plane and from the power profile. They only ever
    tighten the settings; 0 and None = no bound. ``threads`` and ``slots`` count from a model's next load on."""

    max_memory_bytes: int = 0
    max_loaded_models: int = 0
    max_concurrent: int = 0
    keep_alive_cap_s: float | None = None
    threads: int = 0
    slots: int = 0


def tightest(*bounds: int) -> int:
    """The smallest bound, where 0 means none."""
    return min((bound for bound in bounds if bound), default=0)
