"""Reading manifests: types, places, and what is said of bad files."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fleetctl import manifests
from fleetctl.errors import Fault
from slmfleet.errors import UsageError

TWO = """\
kind: Model
metadata: {name: m}
spec:
  variants:
    - name: q4
      files:
        - source: file:x
---
# nothing here
---
kind: Agent
metadata:
  name: greeter
spec:
  instructons: hello
"""


def place(documents: list[manifests.Document], pointer: str) -> str:
    return str(manifests.locate(documents, Fault(pointer, "wrong")))


def test_documents_have_their_values_and_empty_ones_are_skipped() -> None:
    model, agent = manifests.parse(TWO, "fleet.yaml")
    assert (model.kind, model.name) == ("Model", "m")
    assert agent.value["spec"] == {"instructons": "hello"}


@pytest.mark.parametrize(
    ("pointer", "where"),
    [
        ("/documents/0/spec/variants/0/files/0/source", "fleet.yaml:7:11"),
        ("/documents/1/spec/instructons", "fleet.yaml:15:3"),
        ("/1/metadata/name", "fleet.yaml:13:3"),
        ("#/documents/1/metadata/name", "fleet.yaml:13:3"),
        # A key that is missing is told where it should be: at the nearest thing around it.
        ("/documents/1/spec/model/ref", "fleet.yaml:14:1"),
        ("/documents/0", "fleet.yaml:1:1"),
    ],
)
def test_a_pointer_finds_its_line_and_column(pointer: str, where: str) -> None:
    assert place(manifests.parse(TWO, "fleet.yaml"), pointer) == where


@pytest.mark.parametrize("pointer", ["", "/documents/7/spec", "/elsewhere"])
def test_a_pointer_into_no_document_has_no_place(pointer: str) -> None:
    assert manifests.locate(manifests.parse(TWO, "fleet.yaml"), Fault(pointer, "wrong")) is None


def test_a_key_with_a_slash_is_found_by_its_escaped_pointer() -> None:
    documents = manifests.parse("metadata:\n  labels:\n    example.org/a~b: x\n", "f")
    assert place(documents, "/documents/0/metadata/labels/example.org~1a~0b") == "f:3:5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("010", 10),
        ("0x1f", 31),
        ("1e3", 1000.0),
        ("true", True),
        ("", None),
        ("'1'", "1"),
    ],
)
def test_scalars_have_the_types_of_yaml_1_2(text: str, value: object) -> None:
    [document] = manifests.parse(f"a: {text}", "f")
    assert document.value["a"] == value
    assert type(document.value["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [1,\n", "f:3:1: no YAML"),
        ("a: 1\na: 2\n", "f:2:1: 'a' stands twice"),
        ("- 1\n", "f:1:1: a manifest is a mapping"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: !!python/object:os.system x\n", "f:1:4: no YAML: could not determine a constructor"),
        ("a: *nowhere\n", "f:1:4: no YAML: found undefined alias"),
    ],
)
def test_what_is_no_manifest_is_told_with_its_place(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        manifests.parse(text, "f")
    assert sentence in str(caught.value)


def test_folders_are_read_by_name_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text("kind: B")
    (tmp_path / "a.json").write_text('{"kind": "A"}')
    (tmp_path / "notes.txt").write_text("kind: C")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.yaml").write_text("kind: D")
    assert [document.kind for document in manifests.read([str(tmp_path)])] == ["A", "B"]
    assert [document.kind for document in manifests.read([str(tmp_path)], recursive=True)] == ["A", "B", "D"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"# only a comment\n", None])
def test_files_that_hold_nothing_readable_are_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.yaml"):
        manifests.read([str(file)])


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc é:#-'\"\n\t0~", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~ ", max_size=4), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abk", min_size=1, max_size=3), _values, min_size=1, max_size=3))
def test_json_is_yaml_and_every_value_has_a_place(value: dict[str, object]) -> None:
    [document] = manifests.parse(json.dumps(value, indent=1), "f")
    assert document.value == value

    def pointers(item: object, at: str) -> list[str]:
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        steps = [(str(key).replace("~", "~0").replace("/", "~1"), inner) for key, inner in pairs]
        return [at, *(deep for key, inner in steps for deep in pointers(inner, f"{at}/{key}"))]

    assert set(document.places) == set(pointers(value, ""))


def test_the_dumper_and_this_reader_agree() -> None:
    value = {"site": "no", "count": 3, "text": "2026-01-01", "on": {"x": None}}
    assert manifests.parse(json.dumps(value), "f")[0].value == yaml.safe_load(json.dumps(value))
