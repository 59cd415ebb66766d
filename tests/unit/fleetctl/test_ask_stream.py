"""The stream of an answer, line by line."""

import json

import pytest

from fleetctl.ask import Answer, chunks, model_names
from fleetctl.errors import Problem


def line(value: object) -> str:
    return f"data: {json.dumps(value)}"


def test_chunks_end_at_done_and_comments_are_skipped() -> None:
    lines = [": keep-alive", "", line({"a": 1}), "event: x", "data:" + json.dumps({"a": 2}), "data: [DONE]", line({})]
    assert list(chunks(lines)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([line({"a": 1})], "broke off before its end"),
        ([line({"error": {"message": "the node died"}})], "the node died"),
        (["data: {oops"], "no JSON"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(lines: list[str], sentence: str) -> None:
    with pytest.raises(Problem, match=sentence):
        list(chunks(lines))


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("greeter", ("agent/greeter", "greeter")),
        ("agent/greeter", ("agent/greeter",)),
        ("model/smollm2", ("smollm2",)),
    ],
)
def test_a_bare_word_is_an_agent_before_anything_else(target: str, names: tuple[str, ...]) -> None:
    assert model_names(target) == names


def test_the_line_under_an_answer() -> None:
    answer = Answer("Paris.", "edge-1", "r", "m", "stop", 31, 8, 0.214, 0.4, 52.13)
    assert answer.summary() == "edge-1 · 8 tokens · 52.1 tokens/s · first after 0.21 s"
