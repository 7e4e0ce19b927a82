"""``bench compare``: the difference between A and B, and whether it is significant."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.cli import options
from bench.cli.console import table_console


class ComparisonFormat(StrEnum):
    """How to print."""

    TABLE = "table"
    MD = "md"
    JSON = "json"


SIDE = "a cell's folder or record.json, a results folder, or a selector: cam/au, or method=cam,guidance=au"


@options.expanded
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"What to compare: {SIDE}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare A with, in the same form.")],
    fmt: Annotated[ComparisonFormat, typer.Option("--format", help="table, md or json.")] = ComparisonFormat.TABLE,
    classes: Annotated[bool, typer.Option(help="Also show the differences of each class.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    *,
    flags: options.ResultsFlags,
) -> None:
    """Compare two cells, sets of cells or results folders on the same samples: differences, intervals, p values, in words.

    A selector takes its cells from --results: words between slashes or commas, each the value of a coordinate (method, guidance,
    backbone, dataset, seed, variant, protocol). Coordinates with a single value in A and in B may differ; cells are matched by all
    other coordinates.
    """
    from bench.io import write_bytes_atomic
    from bench.reporting.tables import compare_text as text
    from bench.reporting.tables.compare import compare, find_side, match
    from bench.reporting.tables.grid import MARKDOWN, PLAIN, markdown, rich_grid

    if fmt is ComparisonFormat.TABLE and out is not None:
        raise ValueError("--out needs a file format: --format md or json")
    root = flags.settings().config.run.results
    matched, alone = match(find_side(a, results=root), find_side(b, results=root))
    comparisons = compare(matched)
    if fmt is ComparisonFormat.TABLE:
        console = table_console()
        for comparison in comparisons:
            console.print(rich_grid(text.grid(comparison, classes=classes, style=PLAIN)))
            for words in text.sentences(comparison):
                console.print(words, markup=False, highlight=False)
            console.print()
        console.print(f"A: {a}. B: {b}. {text.closing(comparisons, alone=alone, style=PLAIN)}", markup=False, highlight=False)
        return
    if fmt is ComparisonFormat.JSON:
        printed = json.dumps({"a": a, "b": b, **text.plain(comparisons, alone=alone)}, indent=2, ensure_ascii=False)
    else:
        parts = [
            "\n\n".join(
                [
                    markdown(text.grid(comparison, classes=classes, style=MARKDOWN)).strip(),
                    *(MARKDOWN.text(words) for words in text.sentences(comparison)),
                ]
            )
            for comparison in comparisons
        ]
        sides = MARKDOWN.text(f"A: {a}. B: {b}.")
        printed = "\n\n".join([*parts, f"{sides} {text.closing(comparisons, alone=alone, style=MARKDOWN)}"])
    if out is None:
        typer.echo(printed)
    else:
        write_bytes_atomic(out, f"{printed}\n".encode())
