"""``bench leaderboard``: the tables, computed from the records."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import options
from bench.cli.console import table_console

if TYPE_CHECKING:
    from bench.reporting.tables.references import Reference
    from bench.reporting.tables.render import Columns


class TableFormat(StrEnum):
    """How to print."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"
    LATEX = "latex"


class ShownColumns(StrEnum):
    """Which figures to print."""

    METRICS = "metrics"
    MEASURES = "measures"
    COST = "cost"
    ALL = "all"


@options.expanded
def leaderboard(
    fmt: Annotated[TableFormat, typer.Option("--format", help="table, md, csv, json or latex.")] = TableFormat.TABLE,
    columns: Annotated[
        ShownColumns, typer.Option(help="metrics; with measures, cost, or all: further tables. csv and json hold everything.")
    ] = ShownColumns.METRICS,
    reference: options.Reference = None,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    *,
    flags: options.ResultsFlags,
) -> None:
    """Print the leaderboard of a results folder: without and with AU guidance side by side, mean and deviation over seeds.

    Where two datasets share rows, a ranking over them follows.
    """
    from bench.io import write_bytes_atomic
    from bench.reporting.tables.evidence import load_runs
    from bench.reporting.tables.leaderboard import build_tables
    from bench.reporting.tables.ranking import rank
    from bench.reporting.tables.references import load_reference
    from bench.reporting.tables.render import render

    settings = flags.settings()
    root = settings.config.run.results
    beside = None if reference is None else load_reference(reference)
    if fmt is TableFormat.TABLE:
        if out is not None:
            raise ValueError("--out needs a file format: --format md, csv, json or latex")
        show_tables(root, reference=beside, columns=columns.value)
        return
    tables = build_tables(load_runs(existing(root)))
    text = render(tables, fmt.value, rankings=rank(tables), reference=beside, columns=columns.value)
    if out is None:
        typer.echo(text)
    else:
        write_bytes_atomic(out, f"{text}\n".encode())


def show_tables(root: Path, *, reference: Reference | None = None, columns: Columns = "metrics") -> None:
    """Print all tables of a results folder to the terminal."""
    from bench.reporting.tables.evidence import load_runs
    from bench.reporting.tables.leaderboard import build_tables
    from bench.reporting.tables.ranking import rank
    from bench.reporting.tables.render import rich_tables

    console = table_console()
    tables = build_tables(load_runs(existing(root)))
    if not tables:
        console.print(f"no finished cells in {root} yet", markup=False)
    for table in rich_tables(tables, rankings=rank(tables), reference=reference, columns=columns):
        console.print(table)


def existing(root: Path) -> Path:
    """The results folder, which must be there.

    Raises:
        FileNotFoundError: it is not; the message gives the command that makes one.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no results folder {root}. Make one with: bench run --profile quick --results {root}")
    return root
