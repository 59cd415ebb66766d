"""OpenAI-compatible servers as models: a real one, and one that misbehaves in every way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentd.models.backends.base import LoadSpec
from agentd.models.backends.upstream import UpstreamServer
from agentd.models.host import Host
from agentd.models.settings import HostSettings
from agentd.models.types import GenerationFailed, LoadableModel, Refused
from slmfleet.modelfiles.upstream import HOSTS, KEYS
from tests.support.hosts import answer, request, running, status_of
from tests.support.models import loadable, make_tiny_gguf
from tests.support.rogue_server import MODEL, RogueServer
from tests.support.wheels import llama_server

pytestmark = pytest.mark.model


@pytest.fixture
def rogue() -> Iterator[RogueServer]:
    with RogueServer() as server:
        yield server


def upstream(folder: Path, url: str, model: str = MODEL, **more: object) -> LoadableModel:
    folder.mkdir(exist_ok=True)
    (folder / "upstream.json").write_text(json.dumps({"url": url, "model": model, "stallSeconds": 2, **more}))
    return loadable(folder, "upstream", "far")


def test_answers_like_a_model_of_this_device(rogue: RogueServer, tmp_path: Path):
    model = upstream(tmp_path / "m", rogue.url)

    async def scenario():
        async with running(Host(HostSettings()), [model]) as host:
            ask = request(model.key, "good", 5, seed=3, top_p=0.5, slot_id=3)
            text, done = await answer(host, ask)
            assert (text, done.finish_reason, done.prompt_tokens, done.output_tokens) == ("one two", "stop", 9, 2)
            assert done.timings.decode_s >= 0
            assert (await answer(host, request(model.key, "crumbs")))[0] == "one two"
            completion = request(model.key, messages=None, prompt="once upon")
            assert (await answer(host, completion))[0] == "once upon a time"
            vectors = await host.embed(request(model.key), ["ab", "abcd"])
            assert ([list(v) for v in vectors.values], vectors.prompt_tokens) == ([[2.0, 1.0], [4.0, 1.0]], 4)
            assert status_of(host, model.key).memory_bytes < 60 * 10**6

    asyncio.run(scenario())
    sent = rogue.requests[0]
    assert (sent["model"], sent["stream"], sent["seed"], sent["max_tokens"]) == (MODEL, True, 3, 5)
    # A key that is none of OpenAI's never travels.
    assert "slot_id" not in sent


FAILURES = {
    "hang": "was silent for 2 s",
    "hang midway": "was silent for 2 s",
    "comments": "sent nothing of use for 2 s",
    "comment flood": "sent more than 1081344 bytes",
    "flood": "does not stop at 8 tokens",
    "endless line": "an event is longer than 1048576 bytes",
    "endless header": "broke off, or does not speak HTTP",
    "dies": "broke off, or does not speak HTTP",
    "ends early": "broke off before its end",
    "no http": "does not speak HTTP",
    "html": "answers with text/html where text/event-stream was expected",
    "bad json": "chunk is no JSON",
    "bad delta": "`delta.content` is no text",
    "error event": "cuda is gone",
    "redirect": "redirects are not followed",
    "401": "refuses this node's key",
    "500": "answered with status 500: oops",
}


def test_every_misbehaviour_is_one_sentence_and_costs_that_request_only(rogue: RogueServer, tmp_path: Path):
    model = upstream(tmp_path / "m", rogue.url)

    async def failure(host: Host, how: str) -> str:
        with pytest.raises(GenerationFailed) as caught:
            await answer(host, request(model.key, how))
        return caught.value.message

    async def scenario():
        async with running(Host(HostSettings()), [model]) as host:
            await host.load(model.key)
            pid = status_of(host, model.key).pid
            async with asyncio.timeout(60):
                said = {how: await failure(host, how) for how in FAILURES}
            for how, words in FAILURES.items():
                assert words in said[how], how
            with pytest.raises(GenerationFailed, match="its answer is no JSON"):
                await answer(host, request(model.key, "good", response_format={"type": "json_object"}))
            for inputs, words in (
                (["few"], "number of vectors"),
                (["nan"], "no lists of numbers"),
                (["twice", "x"], "numbered wrongly"),
            ):
                with pytest.raises(GenerationFailed, match=words):
                    await host.embed(request(model.key), inputs)
            # The worker lived through all of it.
            assert (await answer(host, request(model.key, "good")))[0] == "one two"
            assert (status_of(host, model.key).pid, status_of(host, model.key).crashes) == (pid, 0)
            assert status_of(host, model.key).memory_bytes < 80 * 10**6

    asyncio.run(scenario())


def test_requests_that_the_server_turns_away_are_turned_away_here(rogue: RogueServer, tmp_path: Path):
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "shop").write_text("sk-secret\n")
    model = upstream(tmp_path / "m", rogue.url, key="shop")

    async def refusal(host: Host, how: str) -> Refused:
        with pytest.raises(Refused) as caught:
            await answer(host, request(model.key, how))
        return caught.value

    async def scenario():
        async with running(Host(HostSettings(worker_environment={KEYS: str(keys)})), [model]) as host:
            busy = await refusal(host, "429")
            assert (busy.status, busy.code, busy.retry_after_s) == (429, "upstream_busy", 7.0)
            bad = await refusal(host, "400")
            assert (bad.status, bad.code) == (400, "invalid_request")
            assert "no: *** said" in bad.message
            assert bad.message.isprintable()
            context = await refusal(host, "context")
            assert context.code == "context_length_exceeded"
            assert "9 tokens and this model's context holds 8" in context.message
            assert "Authorization: Bearer sk-secret" in [h[:1].upper() + h[1:] for h in rogue.headers]
            schema = {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}
            with pytest.raises(Refused, match="points at nothing") as caught:
                await answer(host, request(model.key, "good", response_format=schema))
            assert caught.value.code == "invalid_schema"
            await asyncio.to_thread(rogue.close)
            gone = await refusal(host, "good")
            assert (gone.status, gone.code, gone.retry_after_s) == (503, "upstream_unavailable", 5.0)

    asyncio.run(scenario())


def test_client_that_leaves_ends_the_work_there(rogue: RogueServer, tmp_path: Path):
    model = upstream(tmp_path / "m", rogue.url, stallSeconds=600)

    async def scenario():
        # Shorter than the silence: waiting for a server that may be silent is no hang of the worker.
        async with running(Host(HostSettings(hang_floor_s=3.0)), [model]) as host:
            await host.load(model.key)
            stream = host.generate(request(model.key, "hang"))
            waiting = asyncio.create_task(anext(stream), name="waiting")
            done, _ = await asyncio.wait([waiting], timeout=5.0)
            assert not done
            waiting.cancel()
            await asyncio.wait([waiting])
            await stream.aclose()
            assert await asyncio.to_thread(rogue.gone.wait, 5)
            assert status_of(host, model.key).crashes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "other"}, "has no model 'other'; it has: some-model"),
        ({"url": "http://127.0.0.1:9/v1"}, "cannot connect to 127.0.0.1:9"),
        ({"url": "http://192.0.2.1:80/v1"}, "`upstream_hosts` does not name it"),
        ({"url": "http://192.0.2.2:80/v1", "key": "shop"}, "never sent to 192.0.2.2:80 in the clear"),
        ({"key": "shop"}, "has no folder of keys"),
        ({"url": "http://127.0.0.1:9/v1", "timeout": 3}, "unknown key 'timeout'"),
    ],
)
def test_upstream_that_cannot_be_loaded(rogue: RogueServer, tmp_path: Path, settings: dict, reason: str):
    model = upstream(tmp_path / "m", **{"url": rogue.url, **settings})

    async def scenario():
        host = Host(HostSettings(worker_environment={HOSTS: "192.0.2.2:80"}))
        async with running(host, [model]):
            with pytest.raises(Refused) as caught:
                await answer(host, request(model.key, "good"))
            assert caught.value.status == 503
            assert reason in caught.value.message
            assert rogue.requests == []

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real llama-server with a tiny model. (Built for other processors, it can't run quantized ones here.)"""
    folder = tmp_path_factory.mktemp("server")
    program = llama_server(folder)
    model = make_tiny_gguf(folder / "tiny.gguf")
    command = [str(program), "--model", str(model), "--alias", "tiny", "--host", "127.0.0.1", "--port", "0"]
    command += ["--ctx-size", "1024", "--parallel", "2", "--threads", "1", "--cache-ram", "0"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent), "GGML_NO_BACKTRACE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True, errors="replace") as server:
        assert server.stderr is not None
        seen = []
        for line in server.stderr:
            seen.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("llama-server ended: " + "".join(seen[-5:]))
        yield found[1] + "/v1"
        server.terminate()


def letters(least: int, most: int) -> dict:
    """Constrain an answer to a string of letters: the model's free noise is no UTF-8, which its server refuses."""
    schema = {"type": "string", "pattern": f"^[a-z]{{{least},{most}}}$"}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def test_real_llama_server(real: str, tmp_path: Path):
    model = upstream(tmp_path / "m", real, "tiny", stallSeconds=20)

    async def scenario():
        async with running(Host(HostSettings()), [model]) as host:
            text, done = await answer(host, request(model.key, "hi there", 60, **letters(20, 25)))
            assert re.fullmatch("[a-z]{20,25}", json.loads(text))
            assert done.finish_reason == "stop"
            assert done.output_tokens >= 22
            assert done.prompt_tokens > 8
            # Two at once: the owner knows that this worker has more than one place.
            one, two = await asyncio.gather(
                *(answer(host, request(model.key, "hi there", 60, **letters(20, 25))) for _ in range(2))
            )
            assert one[0] == two[0] == text
            with pytest.raises(
                Refused, match=r"the prompt has \d+ tokens and this model's context holds 512"
            ) as caught:
                await answer(host, request(model.key, "hi there " * 200))
            assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
            stream = host.generate(request(model.key, "hi", 400, **letters(300, 350)))
            await anext(stream)
            await stream.aclose()
            async with asyncio.timeout(10):
                await answer(host, request(model.key, "hi", 60, **letters(3, 4)))
            assert host.take_counters()[model.key].requests_cancelled == 1

    asyncio.run(scenario())


def test_server_that_stays_away_is_given_up(tmp_path: Path):
    """The check after which the worker ends, without the 90 seconds that it takes."""
    with RogueServer() as server:
        spec = LoadSpec(upstream(tmp_path / "m", server.url).entry, 512, 1)
        backend = UpstreamServer()
        assert backend.load(spec).slots == 4
        # Its watch would end this very process.
        backend.stop()
        assert backend.is_silent() is False
    assert [backend.is_silent() for _ in range(3)] == [False, False, True]
