"""Files that lie: whatever the bytes, one clear error or plausible facts, in little memory."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmfleet.modelfiles import (
    ModelFacts,
    NotAModel,
    inspect_gguf,
    inspect_onnx,
    inspect_onnx_genai,
    inspect_upstream,
)
from slmfleet.modelfiles.gguf import is_embedding_gguf
from slmfleet.modelfiles.onnx_header import read_graph
from slmfleet.modelfiles.templates import tool_format
from tests.support.models import make_tiny_gguf
from tests.support.tiny_onnx import LABELS, field, make_classifier, value_info

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MOST_BYTES = 24 * 2**20


def plausible(inspect: Callable[[Path], ModelFacts], path: Path) -> None:
    """NotAModel or facts that arithmetic can bear; nothing else, and in bounded memory."""
    tracemalloc.start()
    try:
        with contextlib.suppress(NotAModel):
            facts = inspect(path)
            numbers = (
                facts.context_tokens, facts.layers, facts.embedding, facts.key_size, facts.value_size,
                facts.vocabulary, *facts.kv_heads,
            )  # fmt: skip
            assert all(isinstance(number, int) and 0 <= number <= 2**31 for number in numbers)
            assert len(facts.kv_heads) <= 1024
            assert isinstance(facts.architecture, str)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


# --- GGUF: well-formed headers with any values, and damaged ones ----------------------------------------------------

KEYS = st.sampled_from(
    ["general.architecture", "general.file_type", "llama.block_count", "llama.embedding_length", "llama.vocab_size",
     "llama.attention.head_count", "llama.attention.head_count_kv", "llama.context_length", "llama.pooling_type",
     "llama.attention.key_length", "tokenizer.ggml.tokens", "tokenizer.chat_template", "x"]
)  # fmt: skip


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


SCALARS = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: struct.pack("<II", 4, n)),
    st.integers(-(2**31), 2**31 - 1).map(lambda n: struct.pack("<Ii", 5, n)),
    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<IQ", 10, n)),
    st.floats(width=32).map(lambda n: struct.pack("<If", 6, n)),
    st.floats().map(lambda n: struct.pack("<Id", 12, n)),
    st.booleans().map(lambda n: struct.pack("<I?", 7, n)),
    st.text(max_size=20).map(lambda t: struct.pack("<I", 8) + text(t)),
    st.just(struct.pack("<I", 8) + text("llama")),
)
ARRAYS = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9).map(
        lambda n: struct.pack(f"<IIQ{len(n)}i", 9, 5, len(n), *n)
    ),
    st.lists(st.floats(width=32), max_size=9).map(lambda n: struct.pack(f"<IIQ{len(n)}f", 9, 6, len(n), *n)),
    st.lists(st.text(max_size=5), max_size=9).map(lambda n: struct.pack("<IIQ", 9, 8, len(n)) + b"".join(map(text, n))),
    # Announced, not there.
    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<IIQ", 9, 8, n)),
    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<IIQ", 9, 0, n)),
    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<IQ", 8, n)),
)


NUMBERS = st.integers(0, 300) | st.integers(0, 2**64 - 1)
TENSORS = st.builds(
    lambda name, shape, kind, offset: text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset),
    st.text(max_size=5), st.lists(NUMBERS, max_size=5), st.integers(0, 45), NUMBERS,
)  # fmt: skip


@st.composite
def gguf_headers(draw: st.DrawFn) -> bytes:
    pairs = draw(st.lists(st.tuples(KEYS, st.one_of(SCALARS, ARRAYS)), max_size=12))
    named = [("general.architecture", struct.pack("<I", 8) + text("llama")), *pairs]
    tensors = draw(st.lists(TENSORS, max_size=3))
    announced = draw(st.sampled_from([0, len(tensors), len(tensors), 2**40]))
    header = b"GGUF" + struct.pack("<IQQ", 3, announced, len(named))
    return header + b"".join(text(name) + value for name, value in named) + b"".join(tensors)


@FUZZ
@given(gguf_headers())
def test_any_values_in_a_gguf_header(tmp_path: Path, data: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    plausible(inspect_gguf, path)
    with contextlib.suppress(NotAModel):
        assert isinstance(is_embedding_gguf(path), bool)


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic(tmp_path: Path, data: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + data)
    plausible(inspect_gguf, path)


def test_header_full_of_text_is_no_memory(tmp_path: Path):
    value = struct.pack("<I", 8) + text(b"x" * 2**20)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 64) + b"".join(text(f"k{n}") + value for n in range(64)))
    with pytest.raises(NotAModel, match="holds more than 16777216 bytes of values"):
        inspect_gguf(path)


def test_long_vocabulary_is_skipped_whole(tmp_path: Path):
    """Texts that straddle the reader's blocks must not shift what comes after them."""
    words = [b"w" * (n % 700) for n in range(5000)]
    pairs = [
        ("general.architecture", struct.pack("<I", 8) + text("llama")),
        ("tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))),
        ("tokenizer.ggml.scores", struct.pack("<IIQ", 9, 6, 90_000) + b"\1" * 360_000),
        ("llama.context_length", struct.pack("<II", 4, 4711)),
        ("general.file_type", struct.pack("<II", 4, 15)),
        ("tokenizer.chat_template", struct.pack("<I", 8) + text("{{ tools }}<tool_call>")),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(text(name) + value for name, value in pairs)
    )
    facts = inspect_gguf(path)
    assert (facts.vocabulary, facts.context_tokens, facts.quantization) == (5000, 4711, "Q4_K_M")
    assert (facts.has_chat_template, facts.tool_format, facts.task) == (True, "hermes", "generate")


def test_pooling_makes_an_embedding_model(tmp_path: Path):
    pooled = make_tiny_gguf(tmp_path / "pooled.gguf", pooled=True)
    plain = make_tiny_gguf(tmp_path / "plain.gguf")
    assert (inspect_gguf(pooled).task, is_embedding_gguf(pooled)) == ("embed", True)
    assert (inspect_gguf(plain).task, is_embedding_gguf(plain)) == ("generate", False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", ""),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}<|python_tag|> and <tool_call>", "llama3"),
        ("{% for tool in tools %}{{ tool | tojson }}", "json"),
    ],
)
def test_tool_formats(template: str, expected: str):
    assert tool_format(template) == expected


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("onnx"))


def test_facts_of_a_classifier(classifier: Path):
    facts = inspect_onnx(classifier)
    assert (facts.task, facts.labels, facts.context_tokens, facts.quantization) == ("classify", LABELS, 16, "fp32")


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6), st.integers(0, 1000))
def test_damaged_onnx(classifier: Path, tmp_path: Path, changes, cut: int):
    data = bytearray((classifier / "model.onnx").read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    (tmp_path / "model.onnx").write_bytes(data[: max(len(data) - cut, 0)])
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    plausible(inspect_onnx, tmp_path)


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes_as_onnx(tmp_path: Path, data: bytes):
    path = tmp_path / "model.onnx"
    for content in (data, field(7, data)):
        path.write_bytes(content)
        with contextlib.suppress(NotAModel):
            read_graph(path)


def test_endless_parts_end(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, field(11, b"") * 2000))
    with pytest.raises(NotAModel, match="too many inputs or outputs"):
        read_graph(path)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (value_info("logits", 1, ("b", "t", 30522)), "needs the format onnx-genai"),
        (b"", "gives nothing"),
    ],
)
def test_other_onnx_models_are_named(classifier: Path, tmp_path: Path, output: bytes, words: str):
    graph = field(11, value_info("input_ids", 7, ("b", "t"))) + (field(12, output) if output else b"")
    (tmp_path / "model.onnx").write_bytes(field(7, graph))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(NotAModel, match=words):
        inspect_onnx(tmp_path)


def test_pooling_that_nobody_does_is_refused(tmp_path: Path):
    graph = field(11, value_info("input_ids", 7, ("b", "t"))) + field(12, value_info("h", 1, ("b", "t", 8)))
    (tmp_path / "model.onnx").write_bytes(field(7, graph))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert inspect_onnx(tmp_path).embedding == 8
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(NotAModel, match="pooling_mode_max_tokens; only mean and cls"):
        inspect_onnx(tmp_path)


# --- JSON configurations --------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DECODER = {
    "filename": "model.onnx", "head_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2,
}  # fmt: skip
GENAI = {"type": "llama", "context_length": 512, "vocab_size": 288, "decoder": DECODER}


@FUZZ
@given(st.sampled_from([*GENAI, *DECODER]), JSON)
def test_any_value_in_a_genai_configuration(tmp_path: Path, name: str, value: object):
    decoder = {**DECODER, **({name: value} if name in DECODER else {})}
    model = {**GENAI, "decoder": decoder, **({name: value} if name in GENAI else {})}
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    plausible(inspect_onnx_genai, tmp_path)


@pytest.mark.parametrize("name", ["genai_config.json", "upstream.json"])
def test_deep_json_is_no_crash(tmp_path: Path, name: str):
    (tmp_path / name).write_text("[" * 200_000)
    with pytest.raises(NotAModel, match="is no JSON"):
        (inspect_onnx_genai if name.startswith("genai") else inspect_upstream)(tmp_path)


@FUZZ
@given(st.sampled_from(["url", "model", "key", "maxConcurrent", "contextTokens", "stallSeconds", "other"]), JSON)
def test_any_value_in_an_upstream(tmp_path: Path, name: str, value: object):
    given = {"url": "http://127.0.0.1:1/v1", "model": "m", name: value}
    (tmp_path / "upstream.json").write_text(json.dumps(given))
    plausible(inspect_upstream, tmp_path)


@pytest.mark.parametrize(
    "url",
    ["ftp://x/v1", "http://", "http://u:p@x/v1", "http://x/v1?key=1", "http://x:99999/", "http://x y/", "x", "http://x:0/",
     "http://[::1/", "http://ex\nample/"],
)  # fmt: skip
def test_urls_that_lead_astray(tmp_path: Path, url: str):
    (tmp_path / "upstream.json").write_text(json.dumps({"url": url, "model": "m"}))
    with pytest.raises(NotAModel, match=r"`url` in upstream\.json must be"):
        inspect_upstream(tmp_path)


def test_key_is_a_name_and_no_path(tmp_path: Path):
    for key in ("../../etc/shadow", "/etc/shadow", "", ".hidden", "a/b"):
        (tmp_path / "upstream.json").write_text(json.dumps({"url": "http://x/v1", "model": "m", "key": key}))
        if key:
            with pytest.raises(NotAModel, match="must be the name of a key file"):
                inspect_upstream(tmp_path)
        else:
            inspect_upstream(tmp_path)
