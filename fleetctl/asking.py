"""The ask command: a question on the command line, on standard input, or a conversation on a terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fleetctl import screen, session
from fleetctl.ask import Answer, ask
from fleetctl.client import Client
from fleetctl.output import Form, FormOption, is_data
from slmfleet.errors import UsageError


def ask_command(
    context: typer.Context,
    agent: Annotated[
        str,
        typer.Argument(help="Name of an agent, a deployment or a model; agent/NAME or model/NAME where two share one."),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="The question; without one, standard input.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 = always the likeliest word.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a word before giving up.")] = 120.0,
    output: FormOption = Form.TABLE,
) -> None:
    """Ask an agent through the gateway and print the answer as it comes.

    -o json: {"answer", "node", "replica", "model", "finishReason", "promptTokens", "outputTokens",
    "firstTokenSeconds", "totalSeconds", "tokensPerSecond" or null}, when the answer is whole.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature}
    given = {key: value for key, value in options.items() if value is not None}
    talk = not prompt and sys.stdin.isatty()
    if talk and is_data(output):
        raise UsageError(f"-o {output.value} is for one question: give a prompt, or text on standard input")
    with session.of(context).client() as client:
        if talk:
            _conversation(client, agent, given, timeout)
            return
        question = " ".join(prompt) if prompt else sys.stdin.read().strip()
        if not question:
            raise UsageError("nothing to ask: give a prompt, or text on standard input")
        messages = [{"role": "user", "content": question}]
        if is_data(output):
            answer = ask(client, agent, messages, lambda _: None, given, timeout)
            screen.data(output.value, answer.facts())
        else:
            _one(client, agent, messages, given, timeout)


def _one(
    client: Client, agent: str, messages: list[dict[str, str]], options: dict[str, Any], timeout_s: float
) -> Answer:
    answer = ask(client, agent, messages, _write, options, timeout_s)
    if not answer.text.endswith("\n"):
        print(flush=True)
    # The figures go to standard error, so that a script gets the answer alone.
    screen.err().print(answer.summary(), style="dim")
    return answer


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _conversation(client: Client, agent: str, options: dict[str, Any], timeout_s: float) -> None:
    notes = screen.err()
    notes.print("Ctrl-D ends the conversation; it is kept nowhere.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question:
            messages.append({"role": "user", "content": question})
            answer = _one(client, agent, messages, options, timeout_s)
            messages.append({"role": "assistant", "content": answer.text})
