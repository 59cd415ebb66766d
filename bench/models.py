"""Models to measure with: the demo's real one, and a stub that costs nothing but the way to it and back."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report import ROOT
from fleetctl import manifests

_STRING, _UINT32 = 8, 4


def stub_environment() -> dict[str, str]:
    """Variables with which agentd serves GGUF files through the test suite's stub backend instead of llama.cpp."""
    return {"AGENTD_BACKENDS": "gguf=bench.stub:GgufStub", "PYTHONPATH": str(ROOT)}


def stub_model(name: str, folder: Path) -> dict[str, Any]:
    """A Model manifest over a file with nothing but a GGUF header, written into ``folder``."""
    file = folder / f"{name}.gguf"
    file.write_bytes(_header({"general.architecture": "llama", "llama.context_length": 2048, "llama.block_count": 1}))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    files = [{"source": f"file:{file}", "sha256": digest, "name": "model.gguf"}]
    spec = {"version": "1", "contextTokens": 2048, "variants": [{"name": "stub", "format": "gguf", "files": files}]}
    return {"kind": "Model", "metadata": {"name": name}, "spec": spec}


def real_model() -> dict[str, Any]:
    """The Model manifest of the demo."""
    documents = manifests.read([str(ROOT / "deploy" / "demo" / "fleet.yaml")])
    return next(document.value for document in documents if document.kind == "Model")


def deployment(model: str, **spec: Any) -> dict[str, Any]:
    """A Deployment of a bare model, by its own name."""
    return {"kind": "Deployment", "metadata": {"name": model}, "spec": {"model": model, **spec}}


def _header(keys: Mapping[str, str | int]) -> bytes:
    """A GGUF version 3 file without tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(keys))]
    for key, value in keys.items():
        parts.append(_text(key))
        if isinstance(value, str):
            parts += [struct.pack("<I", _STRING), _text(value)]
        else:
            parts.append(struct.pack("<II", _UINT32, value))
    return b"".join(parts)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()
