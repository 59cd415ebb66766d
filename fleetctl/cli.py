"""fleetctl, the operator's command line: what its words are, and what its exit codes mean."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from fleetctl import asking, reading, screen, session, tokens, writing
from fleetctl.errors import FAILED, USAGE
from fleetctl.output import Form, FormOption, is_data
from fleetctl.session import Session
from slmfleet import __version__
from slmfleet.errors import UserError

app = typer.Typer(
    name="fleetctl",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong call or input, 3 the control plane can't be reached.",
)


@app.callback()
def options(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(help="URL of the control plane (FLEETCTL_SERVER).")] = None,
    token: Annotated[str | None, typer.Option(help="API key (FLEETCTL_TOKEN).")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Data folder of a `controlplane dev` on this machine.")] = None,
    ca_file: Annotated[
        str | None, typer.Option(help="PEM file of the authorities of the server's certificate.")
    ] = None,
) -> None:
    """Steer a fleet of small-language-model agents.

    Server and key come from these flags, FLEETCTL_* variables, ~/.config/slmfleet/fleetctl.toml,
    or a `controlplane dev` that runs on this machine, in this order.
    """
    context.obj = Session({"server": server, "token": token, "data_dir": data_dir, "ca_file": ca_file})


app.command()(writing.apply)
app.command()(reading.get)
app.command("describe")(reading.describe_command)
app.command()(writing.delete)
app.command("ask")(asking.ask_command)
app.command()(reading.explain)
app.command()(writing.label)
app.command()(writing.drain)
app.command()(writing.undrain)
app.add_typer(tokens.app, name="token")


@app.command()
def version(
    context: typer.Context,
    client: Annotated[bool, typer.Option(help="Ask no server.")] = False,
    output: FormOption = Form.TABLE,
) -> None:
    """Print the versions of fleetctl and of the control plane.

    -o json: {"fleetctl", "controlplane": {"version", "server"} or null}.
    """
    if not is_data(output):
        print(f"fleetctl {__version__}", flush=True)
    found = None
    if not client:
        with session.of(context).client() as server:
            found = {"version": server.get("/info").get("version", "unknown"), "server": server.server}
    if is_data(output):
        screen.data(output.value, {"fleetctl": __version__, "controlplane": found})
    elif found:
        print(f"controlplane {found['version']} at {found['server']}")


def main(arguments: list[str] | None = None) -> None:
    """Run fleetctl and end the process with its exit code."""
    sys.exit(run(session.global_flags_first(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command line; errors are one sentence on standard error. Returns the exit code."""
    try:
        result = app(arguments, standalone_mode=False)
    except UserError as error:
        return _complain(str(error), error.exit_code)
    except TyperException as error:
        return _wrong_call(error)
    except Exit as error:
        return error.exit_code
    except (Abort, KeyboardInterrupt):
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `fleetctl get nodes | head`: not an error; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return result if isinstance(result, int) else 0


def _wrong_call(error: TyperException) -> int:
    message = error.format_message()
    if not message:  # called without a command: the help was printed
        return USAGE
    return _complain(f"{message.rstrip('.')} (see fleetctl --help)", USAGE)


def _complain(message: str, code: int) -> int:
    console = screen.err()
    for line in message.splitlines():
        console.print("error: ", style="bold red", end="")
        console.print(line)
    return code
