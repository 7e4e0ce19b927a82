"""``bench publish``: show the results to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli import options
from bench.cli.leaderboard import existing


@options.expanded
def publish(
    site: Annotated[Path | None, typer.Option(help="Make a static site in this folder; it opens from disk.", file_okay=False)] = None,
    faces: Annotated[
        bool, typer.Option("--faces", help="Site: show faces that are not the project's own, too. Their licence may forbid to publish it.")
    ] = False,
    hub: Annotated[str | None, typer.Option(help="Push records and tables, no weights, to this dataset repository: OWNER/NAME.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Hub: make the repository a private one, if it is new.")] = False,
    reference: options.Reference = None,
    data: options.Data = None,
    *,
    flags: options.ResultsFlags,
) -> None:
    """Make a site of a results folder, or push it to the Hugging Face Hub."""
    from rich.console import Console

    from bench.reporting.tables.references import load_reference

    if site is None and hub is None:
        raise ValueError("bench publish needs to know where: --site DIR for a static site, --hub OWNER/NAME for the Hugging Face Hub")
    if faces and site is None:
        raise ValueError("--faces is about the pictures of a site: give --site DIR, too")
    if private and hub is None:
        raise ValueError("--private is about a repository of the hub: give --hub OWNER/NAME, too")
    run = flags.settings(run__data=data).config.run
    results_folder = existing(run.results)
    beside = None if reference is None else load_reference(reference)
    console = Console(soft_wrap=True)
    if site is not None:
        from bench.reporting.site.write import write_site

        pages = write_site(results_folder, site, data=run.data, faces=faces, reference=beside)
        console.print(f"{site / 'index.html'}: {pages} pages", highlight=False, markup=False)
    if hub is not None:
        from bench.reporting.hub import push

        url = push(results_folder, hub, private=private, reference=beside)
        console.print(url, highlight=False, markup=False)
