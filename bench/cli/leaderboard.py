"""``bench leaderboard``: the tables, computed from the records."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.cli import options
from bench.cli.console import table_console


class TableFormat(StrEnum):
    """How to print."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"
    LATEX = "latex"


def leaderboard(
    context: typer.Context,
    results: options.Results = None,
    fmt: Annotated[TableFormat, typer.Option("--format", help="table, md, csv, json or latex.")] = TableFormat.TABLE,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    sets: options.Sets = None,
    plugins: options.Plugins = None,
) -> None:
    """Print the leaderboard of a results folder: without and with AU guidance side by side, mean and deviation over seeds."""
    from bench.data.atomic import write_bytes_atomic
    from bench.reporting.evidence import load_runs
    from bench.reporting.leaderboard import build_tables
    from bench.reporting.render import render

    settings = options.settings_from(context)
    root = settings.config.run.results
    if fmt is TableFormat.TABLE:
        if out is not None:
            raise ValueError("--out needs a file format: --format md, csv, json or latex")
        show_tables(root)
        return
    tables = build_tables(load_runs(_existing(root)))
    text = render(tables, fmt)
    if out is None:
        typer.echo(text)
    else:
        write_bytes_atomic(out, f"{text}\n".encode())


def show_tables(root: Path) -> None:
    """Print all tables of a results folder to the terminal."""
    from bench.reporting.evidence import load_runs
    from bench.reporting.leaderboard import build_tables
    from bench.reporting.render import rich_table

    console = table_console()
    tables = build_tables(load_runs(_existing(root)))
    if not tables:
        console.print(f"no finished cells in {root} yet")
    for table in tables:
        console.print(rich_table(table))


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"no results folder {root}. Make one with: bench run --profile quick --results {root}")
    return root
