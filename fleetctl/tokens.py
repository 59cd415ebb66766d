"""Enrolment tokens: what lets a device become a node, once."""

from __future__ import annotations

from typing import Annotated

import typer

from fleetctl import columns, kinds, screen, session, writing
from fleetctl.output import Form, FormOption, Output, OutputOption, is_data
from slmfleet.config import parse_labels
from slmfleet.errors import UsageError
from slmfleet.units import parse_duration

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke enrolment tokens.")


@app.command()
def create(
    context: typer.Context,
    ttl: Annotated[str, typer.Option(help="How long it is good: 30m, 1h, 2d.")] = "1h",
    uses: Annotated[int, typer.Option(min=1, help="How many devices may enrol with it.")] = 1,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="key=value for every node that enrols with it.")
    ] = None,
    output: FormOption = Form.TABLE,
) -> None:
    """Make a token. It is shown once; standard output holds it alone, for scripts.

    -o json: {"token", "id", "state", "usesLeft", "expiresAt", "createdAt", "labels", ...}, as the server has it.
    """
    try:
        seconds, labels = parse_duration(ttl), parse_labels(label or [])
    except ValueError as error:
        raise UsageError(str(error)) from None
    if seconds <= 0:
        raise UsageError(f"--ttl {ttl} is over before it begins: give a time above zero, such as 1h")
    with session.of(context).client() as client:
        body = {"ttlSeconds": int(seconds), "uses": uses, "labels": labels}
        answer = client.call("POST", "/enrollment-tokens", body=body)
        if is_data(output):
            screen.data(output.value, answer)
            return
        endpoints = client.get("/info").get("endpoints") or {}
    print(answer["token"])
    server = endpoints.get("enrollment", "HOST:8443")
    hint = f"agentd enroll --server {server} --token-file FILE --name NAME"
    screen.err().print(f"On the device, with the token in a file of mode 0600: {hint}", style="dim")


@app.command("list")
def list_(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List tokens; their secrets are never shown again. -o json: {"items": [{...}, ...]}."""
    with session.of(context).client() as client:
        rows = list(client.items(f"/{kinds.TOKEN.path}"))
    if is_data(output):
        screen.data(output.value, {"items": rows})
    elif rows:
        screen.table(screen.out(), columns.token_columns(session.now()), rows, wide=output is Output.WIDE)
    else:
        screen.err().print("No tokens yet.", style="dim")


@app.command()
def revoke(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...")],
    output: FormOption = Form.TABLE,
) -> None:
    """Make tokens worthless at once; nodes that enrolled with them stay.

    -o json: {"results": [{"kind": "Token", "name", "action": "revoked"}]}.
    """
    writing.delete_all(session.of(context), [(kinds.TOKEN, token) for token in ids], False, output)
