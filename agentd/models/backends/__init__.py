"""Backends: how a worker drives one inference runtime. Only worker processes import the modules of this package's
backends; agentd knows them by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmfleet.modelfiles import ModelFacts, inspect_gguf, inspect_onnx, inspect_onnx_genai, inspect_upstream

if TYPE_CHECKING:
    from agentd.models.backends.base import Backend


@dataclass(frozen=True, slots=True)
class Format:
    """A model format: the backend that serves it, the module it needs, and how its files are inspected."""

    backend: str
    runtime: str
    # The extra of this package that brings the runtime.
    extra: str
    inspect: Callable[[Path], ModelFacts]
    # Modules that it needs beside.
    more: tuple[str, ...] = ()

    def is_installed(self) -> bool:
        """True if a worker could import what it needs; nothing is imported here."""
        return all(importlib.util.find_spec(module) for module in (self.runtime, *self.more))


FORMATS: Mapping[str, Format] = {
    "gguf": Format("agentd.models.backends.llamacpp:LlamaCpp", "xllamacpp", "llamacpp", inspect_gguf),
    "onnx-genai": Format(
        "agentd.models.backends.onnx_genai:OnnxGenai", "onnxruntime_genai", "onnx", inspect_onnx_genai
    ),
    "onnx": Format(
        "agentd.models.backends.onnx_encoder:OnnxEncoder", "onnxruntime", "onnx", inspect_onnx, ("tokenizers", "numpy")
    ),
    # The runtime is elsewhere; h11 reads what it says.
    "upstream": Format("agentd.models.backends.upstream:UpstreamServer", "h11", "upstream", inspect_upstream),
}


def available_formats(more: Mapping[str, str] | None = None) -> frozenset[str]:
    """Formats that can be loaded here, found without importing a runtime. ``more``: HostSettings.backends."""
    found = {name for name, form in FORMATS.items() if form.is_installed()}
    return frozenset(found | set(more or {}))


def load_backend(name: str) -> Backend:
    """Import and make the backend ``"module:Class"``. Called in workers only."""
    module, _, attribute = name.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
