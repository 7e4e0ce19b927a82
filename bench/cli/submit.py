"""``bench submit``: pack records for a pull request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli import options


@options.expanded
def submit(
    out: Annotated[Path, typer.Option(help="Archive to write (NAME.tar.gz), or a new folder.")],
    methods: Annotated[str | None, typer.Option(help="Methods to pack, comma-separated. Default: all that have records.")] = None,
    *,
    flags: options.ResultsFlags,
) -> None:
    """Verify a results folder and pack the records of some methods, without weights or pictures, with a text for the pull request."""
    from rich.console import Console

    from bench.audit.submit import UnsoundError, make_submission, write_submission
    from bench.audit.verify_record import shown

    names = [part.strip() for part in methods.split(",") if part.strip()] if methods else None
    root = flags.settings().config.run.results
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        submission = make_submission(root, methods=names)
    except UnsoundError as error:
        for problem in error.problems:
            console.print(str(problem), style="red")
        console.print(str(error), style="bold red")
        raise typer.Exit(1) from None
    for item in submission.personal:
        console.print(f"{item.field} tells of you or your machine in {item.records} records: {shown(item.value)}", style="yellow")
    if submission.personal:
        console.print("records are packed as they are; docs/submit.md says how to run without such fields", style="yellow")
    write_submission(submission, out)
    Console(highlight=False, markup=False, soft_wrap=True).print(f"{out}: {len(submission.cells)} records", style="green")
