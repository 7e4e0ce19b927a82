"""``bench compare``: is the one better than the other, by how much, and is that more than chance?"""

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
    one: Annotated[str, typer.Argument(metavar="A", help=f"What to compare: {SIDE}.")],
    other: Annotated[str, typer.Argument(metavar="B", help="With what: the same.")],
    fmt: Annotated[ComparisonFormat, typer.Option("--format", help="table, md or json.")] = ComparisonFormat.TABLE,
    classes: Annotated[bool, typer.Option(help="Also show the differences of each class.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write to a file instead.")] = None,
    *,
    flags: options.ResultsFlags,
) -> None:
    """Compare two cells, sets of cells or results folders on the same samples: differences, intervals, p values, in words.

    A selector takes its cells from --results: words between slashes or commas, each the value of a coordinate (method, guidance,
    backbone, dataset, seed, variant, protocol). Coordinates of which A and B have one value each may differ, in all others a cell is
    compared with the one that is alike.
    """
    from bench.io import write_bytes_atomic
    from bench.reporting.tables import compare_text as text
    from bench.reporting.tables.compare import compare, find_side, match
    from bench.reporting.tables.render import MARKDOWN, PLAIN, markdown, rich_grid

    if fmt is ComparisonFormat.TABLE and out is not None:
        raise ValueError("--out needs a file format: --format md or json")
    root = flags.settings().config.run.results
    matched, alone = match(find_side(one, results=root), find_side(other, results=root))
    comparisons = compare(matched)
    if fmt is ComparisonFormat.TABLE:
        console = table_console()
        for comparison in comparisons:
            console.print(rich_grid(text.grid(comparison, classes=classes, style=PLAIN)))
            for words in text.sentences(comparison):
                console.print(words, markup=False, highlight=False)
            console.print()
        console.print(f"A: {one}. B: {other}. {text.closing(comparisons, alone=alone, style=PLAIN)}", markup=False, highlight=False)
        return
    if fmt is ComparisonFormat.JSON:
        printed = json.dumps({"a": one, "b": other, **text.plain(comparisons, alone=alone)}, indent=2, ensure_ascii=False)
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
        sides = MARKDOWN.text(f"A: {one}. B: {other}.")
        printed = "\n\n".join([*parts, f"{sides} {text.closing(comparisons, alone=alone, style=MARKDOWN)}"])
    if out is None:
        typer.echo(printed)
    else:
        write_bytes_atomic(out, f"{printed}\n".encode())
