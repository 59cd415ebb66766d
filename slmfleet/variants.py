"""Which variant of a model a device should run. Pure, and shared: the control plane places by it, a node chooses by it.

A variant is the same weights in another format or quantization. More bits for each weight are better answers and, since
decoding is bound by memory bandwidth, proportionally slower ones. So each class of device has a ceiling, the most bits
that it runs well, and gets the best quality under it that fits its memory:

============  ==============================================================  =======================
class         devices                                                         ceiling
============  ==============================================================  =======================
small         under 1 GB for models                                           Q4_K, Q4_0, int4
plain         a processor alone: phones, single-board computers, kiosks       Q4_K, Q4_1, int4
desktop       8 cores and 16 GB, or a small accelerator                       Q5_K, Q5_1, Q6_K
workstation   a GPU of its own, or 16 cores and 64 GB                         Q8_0, int8
server        a workstation whose profile is ``performance``                  F16, BF16
============  ==============================================================  =======================

The profile ``saver`` counts a device one class lower, ``performance`` one higher. What does not fit at its ceiling goes
lower, down to Q2_K. A variant that is served elsewhere (format ``upstream``) comes after all that run on the device.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from slmfleet.units import format_size

UPSTREAM = "upstream"
# A worker beside its weights: interpreter and runtime, and a tenth of the weights for context and buffers (measured
# with llama.cpp and SmolLM2: 193 MB for a file of 98 MB).
_WORKER_BYTES = 96 * 2**20
_SCRATCH_SHARE = 0.1
# Ceilings in bits for each weight, by class.
_CLASSES = (("small", 4.9), ("plain", 5.1), ("desktop", 6.7), ("workstation", 9.0), ("server", 16.5))
_SMALL, _PLAIN, _DESKTOP, _WORKSTATION = range(4)
_PROFILE_STEPS = {"saver": -1, "balanced": 0, "performance": 1}
# Bits for each weight, scales included (as published files come out), by the beginning of the name.
_BITS = (
    ("IQ1", 1.8), ("TQ1", 1.7), ("TQ2", 2.1), ("IQ2", 2.5), ("Q2", 3.0), ("IQ3", 3.4), ("Q3_K_S", 3.6),
    ("Q3_K_L", 4.2), ("Q3", 3.9), ("IQ4_XS", 4.3), ("IQ4", 4.5), ("Q4_0", 4.5), ("Q4_K_S", 4.6), ("Q4_1", 5.0),
    ("Q4", 4.85), ("MXFP4", 4.3), ("Q5_0", 5.5), ("Q5_K_S", 5.5), ("Q5_1", 6.0), ("Q5", 5.7), ("Q6", 6.6),
    ("Q8", 8.5), ("BF16", 16.0), ("FP16", 16.0), ("F16", 16.0), ("FP32", 32.0), ("F32", 32.0), ("FP8", 8.0),
    ("FP4", 4.5), ("INT4", 4.5), ("INT8", 8.2), ("AWQ", 4.3), ("GPTQ", 4.3),
)  # fmt: skip
# Of a name that says nothing: what most files that people publish have.
_UNKNOWN_BITS = 4.85


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant. ``quantization`` as its makers write it, "" when unknown."""

    name: str
    format: str
    quantization: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """What decides of a device. ``model_bytes``: memory that models may take, 0 = unknown (everything fits)."""

    model_bytes: int = 0
    cores: int = 0
    # As inventories name them: "nvidia", "amd", "npu", "gpu".
    accelerators: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant, and why it."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class NoChoice:
    """Why there is none. ``lacks``: "backend" or "memory"."""

    lacks: str
    reason: str


@functools.lru_cache(maxsize=256)
def bits_per_weight(quantization: str) -> float:
    """About how many bits a weight takes; files of unknown quantization count as Q4_K_M."""
    name = re.sub(r"[^A-Z0-9]+", "_", quantization.upper()).strip("_").removeprefix("UD_")
    return next((bits for start, bits in _BITS if name.startswith(start)), _UNKNOWN_BITS)


def memory_need(candidate: Candidate) -> int:
    """Bytes that a worker with it takes, before anything is known of its shape."""
    if candidate.format == UPSTREAM:
        return _WORKER_BYTES
    return int(candidate.size_bytes * (1 + _SCRATCH_SHARE)) + _WORKER_BYTES


def device_class(hardware: Hardware, profile: str = "balanced") -> tuple[str, float]:
    """Name and ceiling (bits for each weight)."""
    memory = hardware.model_bytes
    if hardware.accelerators & {"nvidia", "amd"} or (hardware.cores >= 16 and memory >= 48 * 10**9):
        level = _WORKSTATION
    elif hardware.accelerators & {"npu", "gpu"} or (hardware.cores >= 8 and memory >= 12 * 10**9):
        level = _DESKTOP
    else:
        level = _PLAIN
    if memory and memory < 10**9:
        level = _SMALL
    level += _PROFILE_STEPS.get(profile, 0)
    return _CLASSES[min(max(level, 0), len(_CLASSES) - 1)]


def choose_variant(
    candidates: Sequence[Candidate],
    formats: Set[str],
    hardware: Hardware,
    profile: str = "balanced",
    order: Sequence[str] = (),
) -> Choice | NoChoice:
    """The variant to run.

    ``formats``: those that a backend on the device loads; ``profile``: saver, balanced or performance; ``order``:
    quantizations from the most wanted on, over the rule above. Of equals the first in ``candidates`` wins.
    """
    loadable = [candidate for candidate in candidates if candidate.format in formats]
    if not loadable:
        needed = ", ".join(sorted({candidate.format for candidate in candidates})) or "nothing"
        have = ", ".join(sorted(formats)) or "none"
        return NoChoice(
            "backend", f"no backend here loads {needed} (installed: {have}): install one, or add another variant"
        )
    fitting = [c for c in loadable if not hardware.model_bytes or memory_need(c) <= hardware.model_bytes]
    if not fitting:
        least = min(map(memory_need, loadable))
        return NoChoice(
            "memory",
            f"the smallest variant that can be loaded needs {format_size(least)}, and models may take "
            f"{format_size(hardware.model_bytes)} here: add a smaller variant, or give models more memory",
        )
    wanted = [quantization.upper() for quantization in order]
    name, ceiling = device_class(hardware, profile)

    def rank(candidate: Candidate) -> tuple[bool, int, bool, float]:
        bits = bits_per_weight(candidate.quantization)
        quantization = candidate.quantization.upper()
        place = wanted.index(quantization) if quantization in wanted else len(wanted)
        # Under the ceiling the most bits, over it the fewest.
        return (candidate.format == UPSTREAM, place, bits > ceiling, bits if bits > ceiling else -bits)

    best = min(fitting, key=rank)
    return Choice(best.name, _reason(best, candidates, loadable, fitting, wanted, name, ceiling))


def _reason(
    best: Candidate,
    candidates: Sequence[Candidate],
    loadable: Sequence[Candidate],
    fitting: Sequence[Candidate],
    wanted: Sequence[str],
    device: str,
    ceiling: float,
) -> str:
    if len(candidates) == 1:
        return "it is the only variant"
    because = []
    if best.format == UPSTREAM:
        because.append("none that runs on this device can be used")
    elif best.quantization.upper() in wanted:
        because.append(f"{best.quantization} comes first in the order that was asked for")
    elif bits_per_weight(best.quantization) > ceiling:
        because.append(f"it has the fewest bits, and all have more than a {device} device runs well")
    else:
        because.append(f"the best quality up to what a {device} device runs well")
    for count, what in (
        (len(candidates) - len(loadable), "no backend for"),
        (len(loadable) - len(fitting), "no room for"),
    ):
        if count:
            because.append(f"{what} {count} other{'s' if count > 1 else ''}")
    return "; ".join(because)
