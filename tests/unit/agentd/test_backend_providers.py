"""Which execution provider of ONNX Runtime is used, and why."""

from __future__ import annotations

import pytest

from agentd.models.backends.providers import CPU, choose_providers

CUDA, TENSORRT, OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
DIRECTML, COREML, QNN = "DmlExecutionProvider", "CoreMLExecutionProvider", "QNNExecutionProvider"


@pytest.mark.parametrize(
    ("available", "accelerators", "system", "first", "reason"),
    [
        ([CPU], set(), "Linux", CPU, "nothing but the processor"),
        ([TENSORRT, CUDA, CPU], {"nvidia"}, "Linux", CUDA, "its device is here"),
        ([TENSORRT, CUDA, CPU], set(), "Linux", CPU, "cuda has no device here"),
        ([CUDA, OPENVINO, CPU], {"intel"}, "Linux", OPENVINO, "openvino is offered"),
        ([QNN, CPU], {"npu"}, "Linux", QNN, "qnn is offered"),
        ([DIRECTML, CPU], set(), "Windows", DIRECTML, "directml is offered"),
        ([DIRECTML, CPU], set(), "Linux", CPU, "nothing but the processor"),
        ([COREML, CPU], set(), "Darwin", COREML, "coreml is offered"),
        (["AzureExecutionProvider", CPU], {"gpu"}, "Linux", CPU, "nothing but the processor"),
    ],
)
def test_best_that_is_really_here(available, accelerators, system, first, reason):
    choice = choose_providers(available, accelerators, system)
    assert choice.providers[0] == first
    assert choice.providers[-1] == CPU
    assert reason in choice.reason


def test_by_name():
    assert choose_providers([TENSORRT, CUDA, CPU], {"nvidia"}, wanted="tensorrt").providers == (TENSORRT, CPU)
    assert choose_providers([CUDA, CPU], {"nvidia"}, wanted="cpu").providers == (CPU,)
    with pytest.raises(ValueError, match="built without openvino"):
        choose_providers([CPU], wanted="openvino")
    with pytest.raises(ValueError, match="unknown execution provider 'gpu'"):
        choose_providers([CPU], wanted="gpu")
