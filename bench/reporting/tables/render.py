"""Tables as text: first a `Grid` of strings for each table, then the text in one of the formats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from bench.evaluation.measures import COLUMNS
from bench.reporting.tables.evidence import Metric
from bench.reporting.tables.export import csv_tables, plain_tables
from bench.reporting.tables.grid import LATEX, LATEX_PREAMBLE, MARKDOWN, MINUS, PLAIN, Grid, Heading, Style, latex, markdown, rich_grid
from bench.reporting.tables.leaderboard import COSTS, FIGURES, GUIDANCE, GUIDANCE_TITLES, TITLES, Row, Stat, Table, Unit
from bench.reporting.tables.ranking import RankTable
from bench.reporting.tables.references import Reference, beside

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = ("md", "latex", "csv", "json")
Columns = Literal["metrics", "measures", "cost", "all"]
"""Figures to show: the metrics always; beside them the optional measures, the cost, or both. CSV and JSON hold everything."""
_HEADINGS = tuple(Heading(TITLES[metric], GUIDANCE_TITLES[guidance]) for metric, guidance in FIGURES)


def show(metric: Metric, stat: Stat | None, *, style: Style = PLAIN) -> str:
    """A figure as text: CL in percent with one digit, cosines with three, ± standard deviation over seeds, with its mark."""
    text = _spread(stat, scale=_scale(metric), digits=1 if metric == "cl" else 3, style=style)
    standing = stat.judged.standing if stat is not None and stat.judged is not None else "alone"
    return {"best": style.best, "tied": style.tied}.get(standing, "{}").format(text)


def _scale(metric: Metric) -> int:
    """CL is shown in percent."""
    return 100 if metric == "cl" else 1


def _spread(stat: Stat | None, *, scale: float, digits: int, style: Style) -> str:
    if stat is None:
        return "-"
    spread = "" if stat.sd is None else f" {style.plus_minus} {scale * stat.sd:.{digits}f}"
    return f"{scale * stat.mean:.{digits}f}{spread}"


def caption(table: Table, *, style: Style = PLAIN) -> str:
    """What the figures and marks of a table mean."""
    facts = (
        f"{table.test_samples} test samples; mean ± standard deviation (ddof = 1) over n seeds; CL = accuracy in %; CAM-COS, ATT-COS = "
        f"cosine with the AU map, mean over expressions; data {table.fingerprint[:8]}, recipe {table.recipe}."
    )
    parts = [style.text(facts)]
    if table.resolution:
        marks = f"Best of a column: {style.best.format('x')}; not significantly different from the best: {style.tied.format('x')}."
        parts.append(f"{marks} {style.text(table.resolution)}.")
    if any(row.verified for row in table.rows):
        parts.append(f"{style.verified.format('x')}: evaluated again from its weights; other rows are self-reported.")
    else:
        parts.append(style.text("All rows are self-reported."))
    if any(row.batch_dependent for row in table.rows):
        mark = style.batch_dependent.format("").strip()
        parts.append(f"{mark}: logits or maps change with the batch they are computed in; not tested, not ranked.")
    if any(row.spread for row in table.rows):
        causes = " and ".join(dict.fromkeys(cause for row in table.rows if row.spread for cause in row.process_causes))
        mixed = any(len(row.process_counts) > 1 for row in table.rows)
        words = f"[processes]: {causes} make the weights depend on the number of processes of the training"
        parts.append(style.text(words + ("; a row with several numbers mixes trainings that are not alike." if mixed else ".")))
    if any(row.blank_maps.mark for row in table.rows):
        words = "[maps constant]: maps of the true class, over all seeds; a constant map points nowhere, and its cosine is 0"
        also = "; so is the cosine of a map with NaN or infinite values, as in the published code"
        parts.append(style.text(words + (also if any(row.blank_maps.not_finite for row in table.rows) else "") + "."))
    return " ".join([*parts, *(style.text(f"Note: {note}.") for note in table.notes)])


def row_name(row: Row, *, style: Style) -> str:
    """The title of a row with its marks."""
    name = style.text(row.title)
    name = style.verified.format(name) if row.verified else name
    name = style.batch_dependent.format(name) if row.batch_dependent else name
    return " ".join([name, *(style.text(mark) for mark in (row.spread, row.blank_maps.mark) if mark)])


def _main(table: Table, *, reference: Reference | None, style: Style) -> Grid:
    several = len(table.backbones) > 1
    published = None if reference is None else beside(table, reference)

    def line(name: str, backbone: str, figures: Sequence[str], seeds: str) -> tuple[str, ...]:
        return (name, *([style.text(backbone)] if several else []), *figures, seeds)

    lines: list[tuple[str, ...]] = []
    for number, row in enumerate(table.rows):
        figures = [show(column[0], row.stats.get(column), style=style) for column in FIGURES]
        lines.append(line(row_name(row, style=style), row.backbone, figures, row.seeds))
        reported = {column: figure for (of_row, column), figure in published.figures.items() if of_row == number} if published else {}
        if reference is not None and reported:
            # With two digits, as published tables have them.
            values = {column: f"{_scale(column[0]) * figure.value:.2f}" for column, figure in reported.items()}
            gaps = {column: f"{_scale(column[0]) * figure.difference:+.2f}".replace("-", MINUS) for column, figure in reported.items()}
            for words, texts in ((f"reported, {reference.status}", values), (f"ours {MINUS} reported", gaps)):
                name = style.below.format(style.text(words))
                lines.append(line(name, "", [style.text(texts.get(column, "-")) for column in FIGURES], ""))
    return Grid(
        title=style.text(table.title),
        headings=(Heading("Method"), *([Heading("Backbone")] if several else []), *_HEADINGS, Heading("n")),
        words=2 if several else 1,
        lines=tuple(lines),
        caption=caption(table, style=style) + (f" {style.text(published.words)}." if published else ""),
    )


def _measures(table: Table, *, style: Style) -> Grid | None:
    present = {name for row in table.rows for name, _ in row.measures}
    arrows = {"higher": "↑", "lower": "↓"}
    units = {
        name: Unit(f"{column.title} {arrows[column.better]}", "", 1, 3)
        for name, column in COLUMNS.items()
        if name in present and column.part_of is None
    }
    units |= {name: Unit(name, "", 1, 3) for name in sorted(present - COLUMNS.keys())}
    words = "Mean over classes; ↑ higher is better, ↓ lower is better"
    return _further("further measures", table, units, [row.measures for row in table.rows], words, style)


def _costs(table: Table, *, style: Style) -> Grid | None:
    units = {name: unit for name, unit in COSTS.items() if any(name == cost for row in table.rows for cost, _ in row.costs)}
    # A cost that is equal for every seed has no spread to show.
    costs = [{key: stat if stat.sd else Stat(values=stat.values[:1]) for key, stat in row.costs.items()} for row in table.rows]
    words = f"Computed on {'; '.join(table.hardware)}" + (": not comparable between machines" if len(table.hardware) > 1 else "")
    if "evaluation_images_per_second" in units:
        words += "; shared evaluation: one pass serves all methods that read out one training, and includes the batch check"
    return _further("cost", table, units, costs, words, style)


def _further(
    name: str, table: Table, units: Mapping[str, Unit], stats: Sequence[Mapping[tuple[str, str], Stat]], words: str, style: Style
) -> Grid | None:
    """A table of further figures, ``stats`` by row; a line for each row and guidance that has any. None if no row has any."""
    lines = []
    for (row, of_row), guidance in itertools.product(zip(table.rows, stats, strict=True), GUIDANCE):
        figures = [_spread(of_row.get((key, guidance)), scale=unit.scale, digits=unit.digits, style=style) for key, unit in units.items()]
        if any(text != "-" for text in figures):
            lines.append((row_name(row, style=style), style.text(row.backbone), GUIDANCE_TITLES[guidance], *figures))
    if not lines:
        return None
    headings = (Heading(style.text(unit.title), unit.unit) for unit in units.values())
    return Grid(
        title=style.text(f"{table.title}: {name}"),
        headings=(Heading("Method"), Heading("Backbone"), Heading("Guidance"), *headings),
        words=3,
        lines=tuple(lines),
        caption=style.text(f"{words}; mean ± standard deviation over seeds."),
    )


def _ranking(ranking: RankTable, *, style: Style) -> Grid:
    marks = {"best": style.best, "tied": style.tied, "behind": "{}"}
    lines = []
    for row in ranking.rows:
        ranks = (
            marks[ranking.standing(row, column)].format(f"{row.ranks[column]:.2f}") if column in row.ranks else "-" for column in FIGURES
        )
        lines.append((style.text(row.title), style.text(row.backbone), *ranks))
    columns = [ranking.columns.get(column) for column in FIGURES]
    distances = ("-" if column is None else f"{column.critical_difference:.2f}" for column in columns)
    p_values = ("-" if column is None or column.friedman_p is None else f"{column.friedman_p:.3g}" for column in columns)
    lines += [("Critical difference", "", *distances), ("Friedman p", "", *p_values)]
    words = (
        f"Average ranks, 1 = best, of the rows that all {len(ranking.datasets)} datasets have; recipe {ranking.recipe}. Friedman p: p "
        "value of all rows being equal. Critical difference: Nemenyi, level 5 % (J. Demsar, JMLR 2006)."
    )
    legend = f"Best: {style.best.format('x')}; closer to the best than the critical difference: {style.tied.format('x')}."
    return Grid(
        title=style.text(ranking.title),
        headings=(Heading("Method"), Heading("Backbone"), *_HEADINGS),
        words=2,
        lines=tuple(lines),
        caption=" ".join([style.text(words), legend, *(style.text(f"Note: {note}.") for note in ranking.notes)]),
    )


def grids(
    tables: Sequence[Table], rankings: Sequence[RankTable], *, reference: Reference | None, columns: Columns, style: Style
) -> Iterator[Grid]:
    """All grids in the order of printing: each table, followed by its further figures; rankings last. Arguments as of `render`."""
    for table in tables:
        yield _main(table, reference=reference, style=style)
        further = [_measures(table, style=style)] if columns in ("measures", "all") else []
        further += [_costs(table, style=style)] if columns in ("cost", "all") else []
        yield from (grid for grid in further if grid is not None)
    for ranking in rankings:
        yield _ranking(ranking, style=style)


def render(
    tables: Sequence[Table],
    fmt: str,
    *,
    rankings: Sequence[RankTable] = (),
    reference: Reference | None = None,
    columns: Columns = "metrics",
) -> str:
    """All tables as one text.

    Args:
        tables: to print.
        fmt: one of `FORMATS`.
        rankings: of the tables, see `bench.reporting.tables.ranking.rank`; they come last.
        reference: published figures to show beside ours.
        columns: which figures Markdown and LaTeX show.
    """
    assert fmt in FORMATS
    if fmt == "json":
        return json.dumps(plain_tables(tables, rankings, reference), indent=2, ensure_ascii=False)
    if fmt == "csv":
        return csv_tables(tables, rankings, reference)
    style, write, preamble = (MARKDOWN, markdown, []) if fmt == "md" else (LATEX, latex, [LATEX_PREAMBLE])
    return "\n".join([*preamble, *map(write, grids(tables, rankings, reference=reference, columns=columns, style=style))])


def rich_tables(
    tables: Sequence[Table],
    *,
    rankings: Sequence[RankTable] = (),
    reference: Reference | None = None,
    columns: Columns = "metrics",
) -> list[RichTable]:
    """All tables for the terminal; arguments as of `render`."""
    return [rich_grid(grid) for grid in grids(tables, rankings, reference=reference, columns=columns, style=PLAIN)]
