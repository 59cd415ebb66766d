"""What a model's files say about it; one module per format. The control plane reads it before it hands a model out,
a node before it spawns a process.

Bounded: a file that lies about its lengths costs one clear error, not memory and not time.
"""

from slmfleet.modelfiles.facts import ModelFacts, NotAModel
from slmfleet.modelfiles.genai import inspect_onnx_genai
from slmfleet.modelfiles.gguf import check_gguf, inspect_gguf
from slmfleet.modelfiles.onnx import inspect_onnx
from slmfleet.modelfiles.onnx_header import read_graph
from slmfleet.modelfiles.upstream import inspect_upstream

__all__ = [
    "ModelFacts",
    "NotAModel",
    "check_gguf",
    "inspect_gguf",
    "inspect_onnx",
    "inspect_onnx_genai",
    "inspect_upstream",
    "read_graph",
]
