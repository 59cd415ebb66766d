"""A look into a model's files, so that a wrong or broken one is refused when it is imported, not on a hundred nodes.

Only headers are read, by the same code by which a node reads them before it loads the model.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from slmfleet.modelfiles import NotAModel, check_gguf, inspect_onnx, inspect_onnx_genai, read_graph

# What a variant of each format must have, by name.
_NEEDED = {
    "onnx-genai": ("genai_config.json",),
    "onnx": ("model.onnx", "tokenizer.json"),
    "upstream": ("upstream.json",),
}
# What looks into all files of a variant together. (A GGUF file says everything itself.)
_FOLDERS: Mapping[str, Callable[[Path], object]] = {"onnx-genai": inspect_onnx_genai, "onnx": inspect_onnx}
_MAX_SENTENCE = 500


def refuse_file(format_: str, name: str, path: Path) -> str:
    """A sentence that says why the file can't be part of a variant of this format; "" = it may be. Raises OSError."""
    if format_ == "gguf":
        return _refused(check_gguf, {name: path}, name)
    if format_ in _FOLDERS and name.endswith(".onnx"):
        return _refused(read_graph, {name: path}, name)
    return ""


def refuse_variant(format_: str, names: Iterable[str]) -> str:
    """A sentence that says what the variant's files lack, by their names alone; "" = nothing."""
    has = set(names)
    for name in _NEEDED.get(format_, ()):
        if name not in has:
            return f"an {format_} variant needs a file named {name}, and it has none"
    return ""


def refuse_content(format_: str, files: Mapping[str, Path]) -> str:
    """A sentence that says why the files, by name, are no model together; "" = they are, as far as their headers
    tell. Raises OSError."""
    inspect = _FOLDERS.get(format_)
    return _refused(inspect, files, "") if inspect else ""


def _refused(inspect: Callable[[Path], object], files: Mapping[str, Path], entry: str) -> str:
    with _view(files) as folder:
        try:
            inspect(folder / entry)
        except NotAModel as error:
            # It may quote what the file says, and the database takes no NUL.
            return "".join(character if character.isprintable() else "?" for character in str(error)[:_MAX_SENTENCE])
    return ""


@contextlib.contextmanager
def _view(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder in which files that are stored by digest have their names, as on a node."""
    with tempfile.TemporaryDirectory(prefix="slmfleet-import-") as scratch:
        folder = Path(scratch) / "model"
        for name, path in files.items():
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield folder
