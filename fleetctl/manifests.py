"""Manifests out of YAML, each value with its place in the file, so that an error can point at a line.

YAML is read with the JSON-like types of YAML 1.2: ``no``, ``on`` and ``2026-01-01`` stay the text that was written
(in YAML 1.1 a label ``site: no`` is ``false``). A key that stands twice in one mapping is an error, not a surprise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fleetctl.errors import Fault
from slmfleet.errors import UsageError

_Places = Iterator[tuple[str, "Place"]]
SUFFIXES = (".yaml", ".yml", ".json")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar types of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _plain_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # The base class reads 010 as octal and 1:30 as sixty-somethings; YAML 1.2 does not.
    text = str(loader.construct_scalar(node)).lower()
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text, 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _plain_int)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value begins; lines and columns count from 1."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Document:
    """One manifest. ``places`` maps RFC 6901 pointers within it to where their values (or keys) stand.

    ``folder`` is what relative file names in it are relative to.
    """

    value: dict[str, Any]
    places: Mapping[str, Place]
    folder: Path

    @property
    def kind(self) -> str:
        return str(self.value.get("kind", ""))

    @property
    def name(self) -> str:
        metadata = self.value.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    def place(self, pointer: str) -> Place:
        """The place of ``pointer``, or of the nearest thing around it that is there (a missing key has none)."""
        while pointer not in self.places:
            pointer = pointer.rpartition("/")[0]
        return self.places[pointer]


def read(sources: Iterable[str], recursive: bool = False) -> list[Document]:
    """All documents of files, folders (their .yaml, .yml and .json files, by name) and ``-`` (standard input).

    Raises UsageError for what can't be read or parsed, and when there is no document at all.
    """
    sources = list(sources)
    documents: list[Document] = []
    for source in sources:
        for name, folder, text in _texts(source, recursive):
            documents += parse(text, name, folder)
    if not documents:
        raise UsageError(f"no manifest in {', '.join(sources)}")
    return documents


def parse(text: str, source: str, folder: Path = Path()) -> list[Document]:
    """The documents of one YAML text; ``source`` is its name in errors. Empty documents are skipped."""
    documents = []
    loader = _Loader(text)
    loader.name = source
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            places = dict(_places(node, "", source))
            value = loader.construct_document(node)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise UsageError(f"{places['']}: a manifest is a mapping with apiVersion, kind, metadata and spec")
            documents.append(Document(value, places, folder))
    except yaml.MarkedYAMLError as error:
        raise UsageError(_sentence(error, source)) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: no YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return documents


def locate(documents: list[Document], fault: Fault) -> Place | None:
    """The place in the files of a server's fault; its pointer is into ``{"documents": [...]}`` or into that list."""
    match = re.fullmatch(r"#?(?:/documents)?/(\d+)(.*)", fault.pointer)
    if not match or int(match[1]) >= len(documents):
        return None
    return documents[int(match[1])].place(match[2])


def _texts(source: str, recursive: bool) -> Iterator[tuple[str, Path, str]]:
    if source == "-":
        yield "standard input", Path.cwd(), sys.stdin.read()
        return
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in (path.rglob("*") if recursive else path.iterdir()) if p.suffix in SUFFIXES)
        if not found:
            raise UsageError(f"no manifest in {source}: the folder holds no {', '.join(SUFFIXES)} file")
    else:
        found = [path]
    for file in found:
        try:
            yield str(file), file.parent, file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(f"cannot read {file}: it does not exist") from None
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"cannot read {file}: byte {error.start} is no UTF-8, so this is no text file") from None


def _places(node: yaml.Node, pointer: str, source: str, around: tuple[yaml.Node, ...] = ()) -> _Places:
    if node in around:
        raise UsageError(f"{_place(node, source)}: this anchor contains itself; write the value out")
    around = (*around, node)
    yield pointer, _place(node, source)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise UsageError(f"{_place(key, source)}: {name!r} stands twice in this mapping; remove one")
            seen.add(name)
            inner = f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}"
            yield from _places(value, inner, source, around)
            yield inner, _place(key, source)  # a field is pointed at by its name, where the eye looks for it
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _places(item, f"{pointer}/{index}", source, around)


def _place(node: yaml.Node, source: str) -> Place:
    return Place(source, node.start_mark.line + 1, node.start_mark.column + 1)


def _sentence(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    context = f" {error.context}" if error.context else ""
    return f"{where}: no YAML: {error.problem}{context}"
