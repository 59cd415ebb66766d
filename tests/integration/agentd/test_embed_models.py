"""Embeddings and classification in real workers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from agentd.models.host import Host
from agentd.models.settings import HostSettings
from agentd.models.types import Chunk, LoadableModel, Refused, Vectors
from tests.support.hosts import answer, request, running, status_of
from tests.support.models import loadable, make_tiny_gguf
from tests.support.tiny_onnx import make_classifier
from tests.support.wheels import minilm

pytestmark = pytest.mark.model
SENTENCES = ["The cat sits on the mat.", "A feline is resting on a rug.", "Stock markets fell sharply today."]


def cosine(one, other) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def embed(model: LoadableModel, *batches: list[str]) -> list[Vectors]:
    async def scenario():
        async with running(Host(HostSettings()), [model]) as host:
            return [await host.embed(request(model.key), batch) for batch in batches]

    return asyncio.run(scenario())


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(minilm(tmp_path_factory.mktemp("minilm")), "onnx", "minilm")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", pooled=True), "gguf")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    return loadable(make_classifier(tmp_path_factory.mktemp("classifier")), "onnx", "triage")


def test_meaning_decides_how_near_vectors_are(sentences: LoadableModel):
    [vectors] = embed(sentences, SENTENCES)
    cat, feline, stocks = vectors.values
    assert len(cat) == 384
    assert sum(a * a for a in cat) == pytest.approx(1.0, abs=1e-5)
    # Measured 0.57 and 0.04; without pooling over the right tokens the first falls and the second rises.
    assert cosine(cat, feline) > 0.5
    assert abs(cosine(cat, stocks)) < 0.1
    # Tokens with [CLS] and [SEP], as the tokenizer of BERT counts them.
    assert vectors.prompt_tokens == 28


def test_neighbours_in_a_batch_change_nothing(sentences: LoadableModel):
    long = "word " * 200
    mixed, alone = embed(sentences, [SENTENCES[0], long, SENTENCES[2], SENTENCES[1]], SENTENCES)
    for one, other in ((0, 0), (3, 1), (2, 2)):
        assert mixed.values[one] == pytest.approx(alone.values[other], abs=1e-5)


def test_too_long_an_input_is_refused_with_the_counts(sentences: LoadableModel):
    with pytest.raises(Refused, match="input 1 has 602 tokens and this model reads 512 at once") as caught:
        embed(sentences, ["short", "word " * 600])
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_memory_of_long_inputs_is_given_back(sentences: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [sentences]) as host:
            await host.embed(request(sentences.key), ["short"])
            pid = status_of(host, sentences.key).pid
            before = resident_mib(pid)
            await host.embed(request(sentences.key), ["word " * 500] * 4)
            return before, resident_mib(pid)

    before, after = asyncio.run(scenario())
    assert after - before < 24


def resident_mib(pid: int | None) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def test_gguf_that_pools_gives_vectors_and_no_text(tiny_gguf: LoadableModel):
    one, two = embed(tiny_gguf, ["hello", "other words"], ["hello"])
    assert len(one.values[0]) == 64
    assert one.values[0] == pytest.approx(two.values[0], abs=1e-4)
    assert cosine(one.values[0], one.values[1]) < 0.999
    assert one.prompt_tokens > two.prompt_tokens > 0

    async def scenario():
        async with running(Host(HostSettings()), [tiny_gguf]) as host:
            with pytest.raises(Refused, match="gives embeddings, no text"):
                await answer(host, request(tiny_gguf.key))
            with pytest.raises(Refused, match="input 0 has 600 tokens and this model reads 512") as caught:
                await host.embed(request(tiny_gguf.key), ["y" * 600])
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(Refused, match="input 1 can't be embedded"):
                await host.embed(request(tiny_gguf.key), ["y", ""])

    asyncio.run(scenario())


def test_text_model_gives_no_vectors(tmp_path: Path):
    model = loadable(make_tiny_gguf(tmp_path / "tiny.gguf"), "gguf")
    with pytest.raises(Refused, match="it gives no embeddings") as caught:
        embed(model, ["hello"])
    assert (caught.value.status, caught.value.code) == (400, "unsupported")


def test_classifier_answers_with_its_label(classifier: LoadableModel):
    async def scenario():
        async with running(Host(HostSettings()), [classifier]) as host:
            text, done = await answer(host, request(classifier.key, "fire help"))
            assert (text, done.finish_reason, done.prompt_tokens) == ("urgent", "stop", 2)
            text, _ = await answer(host, request(classifier.key, "thanks"))
            assert text == "calm"
            ask = request(classifier.key, "Fire please", logprobs=True, top_logprobs=2)
            [chunk, _] = [item async for item in host.generate(ask)]
            assert isinstance(chunk, Chunk)
            [entry] = chunk.logprobs["content"]
            # Means of (-4, 4) and (1, 0): logits -1.5 and 2.
            assert entry["logprob"] == pytest.approx(-math.log1p(math.exp(-3.5)), abs=1e-5)
            assert [item["token"] for item in entry["top_logprobs"]] == ["urgent", "calm"]
            with pytest.raises(Refused, match="is a classifier"):
                await host.embed(request(classifier.key), ["fire"])
            with pytest.raises(Refused, match="17 tokens and this model reads 16"):
                await answer(host, request(classifier.key, "fire " * 17))

    asyncio.run(scenario())
