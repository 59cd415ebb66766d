"""Which of ONNX Runtime's execution providers to use. Pure.

What a build of the runtime offers is no proof that the device is there: a CUDA build on a machine without a GPU
offers CUDA. So a provider is taken only where its device was seen, or where the owner asks for it by name.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class _Provider:
    name: str
    # Seen in device/inventory.py's words; "" = the operating system or processor is enough.
    accelerator: str
    # Words of platform.system() under which it can exist; () = any.
    systems: tuple[str, ...] = ()


# Best first. TensorRT is faster than CUDA once it runs, but compiles for minutes at each first load: by name only.
_ORDER = (
    _Provider("CUDAExecutionProvider", "nvidia", ("Linux", "Windows")),
    _Provider("MIGraphXExecutionProvider", "amd", ("Linux",)),
    _Provider("QNNExecutionProvider", "npu", ("Linux", "Windows")),
    _Provider("DmlExecutionProvider", "", ("Windows",)),
    _Provider("CoreMLExecutionProvider", "", ("Darwin",)),
    _Provider("OpenVINOExecutionProvider", "intel", ("Linux", "Windows")),
)
_BY_NAME = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Providers in the order in which the runtime shall try them, and why."""

    providers: tuple[str, ...]
    reason: str


def choose_providers(
    available: Sequence[str], accelerators: Set[str] = frozenset(), system: str = "Linux", wanted: str = ""
) -> Choice:
    """``available``: what the runtime was built with; ``accelerators``: devices that were seen; ``wanted``: "", or one
    of cpu, cuda, tensorrt, migraphx, qnn, directml, coreml, openvino. The processor is always the last resort.

    Raises ValueError with one sentence if what is wanted can't be had.
    """
    if wanted:
        name = _BY_NAME.get(wanted)
        if name is None:
            raise ValueError(f"unknown execution provider {wanted!r}: use one of {', '.join(sorted(_BY_NAME))}")
        if name not in available:
            raise ValueError(f"this onnxruntime was built without {wanted}: it has {', '.join(available)}")
        return Choice(tuple(dict.fromkeys((name, CPU))), f"{wanted} was asked for")
    passed_over = []
    for provider in _ORDER:
        if provider.name not in available or (provider.systems and system not in provider.systems):
            continue
        if provider.accelerator and provider.accelerator not in accelerators:
            passed_over.append(f"{_short(provider.name)} has no device here")
            continue
        return Choice((provider.name, CPU), f"{_short(provider.name)} is offered and its device is here")
    return Choice((CPU,), "; ".join(passed_over) or "nothing but the processor is offered")


def _short(name: str) -> str:
    return next((word for word, full in _BY_NAME.items() if full == name), name)
