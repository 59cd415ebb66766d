"""The test suite's stub backend behind a GGUF header: the control plane takes nothing else for a model."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from agentd.models.backends.base import Loaded, LoadSpec
from tests.support.stub_backend import StubBackend


class GgufStub(StubBackend):
    """Answers at once with words; its model file says nothing."""

    def load(self, spec: LoadSpec) -> Loaded:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as options:
            options.write("{}")
            options.flush()
            return super().load(dataclasses.replace(spec, entry=Path(options.name)))
