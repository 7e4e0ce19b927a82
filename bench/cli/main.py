"""``bench``: assembles the verbs and turns errors made for users into one readable message."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from bench import __version__
from bench.cli import compare, data, explain, gallery, leaderboard, listing, plan, publish, run, status, submit, verify

app = typer.Typer(
    name="bench",
    help="A benchmark harness for class activation maps in facial expression recognition.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    epilog="Try it: bench run --profile quick",
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("leaderboard")(leaderboard.leaderboard)
app.command("compare")(compare.compare)
app.command("gallery")(gallery.gallery)
app.command("explain")(explain.explain)
app.command("publish")(publish.publish)
app.command("submit")(submit.submit)
app.command("verify")(verify.verify)
app.command("list")(listing.list_entries)
app.add_typer(data.app, name="data")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"bench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, and show tracebacks of errors.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("PIL", "matplotlib", "accelerate", "timm", "urllib3", "filelock", "torch", "httpx", "httpcore", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 some cells failed, 2 the request cannot be carried out, 75 stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign shows another: no reason to end
    try:
        app()
    except (ValueError, OSError) as error:
        if "--verbose" in sys.argv or "-v" in sys.argv:
            raise
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(error)}", highlight=False)
        sys.exit(2)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error) or type(error).__name__)
