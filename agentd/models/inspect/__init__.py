"""What a model's files say about it, read before any process is spawned; one module per format.

Bounded: a file that lies about its lengths costs one clear error, not memory and not time.
"""

from agentd.models.inspect.facts import ModelFacts, NotAModel
from agentd.models.inspect.genai import inspect_onnx_genai
from agentd.models.inspect.gguf import inspect_gguf
from agentd.models.inspect.onnx import inspect_onnx
from agentd.models.inspect.upstream import inspect_upstream

__all__ = ["ModelFacts", "NotAModel", "inspect_gguf", "inspect_onnx", "inspect_onnx_genai", "inspect_upstream"]
