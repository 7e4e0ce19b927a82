"""Tables as text: Markdown, LaTeX, CSV, JSON; for the terminal see `rich_tables`."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tabulate import tabulate

from bench.evaluation.measures import COLUMNS
from bench.reporting.tables.evidence import METRICS, Column, Metric
from bench.reporting.tables.leaderboard import COSTS, GUIDANCE, GUIDANCE_TITLES, TITLES, Row, Stat, Table
from bench.reporting.tables.ranking import RankTable
from bench.reporting.tables.references import Beside, Reference, Reported, beside

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MINUS = "\N{MINUS SIGN}"
FORMATS = ("md", "latex", "csv", "json")
Columns = Literal["metrics", "measures", "cost", "all"]
"""Which figures are shown: the metrics always, and beside them the optional measures, the cost, or both. CSV and JSON hold everything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a format writes what a figure is."""

    text: Callable[[str], str] = str
    """Makes plain words harmless."""
    plus_minus: str = "±"
    best: str = "{}"
    tied: str = "{}"
    verified: str = "{} ✓"
    batch_dependent: str = "{} ⚠ batch-dependent"
    below: str = "↳ {}"
    """A line that belongs to the row above it."""


class Heading(NamedTuple):
    """Of a column; those of one ``top`` stand together."""

    top: str
    bottom: str = ""

    @property
    def line(self) -> str:
        return f"{self.top} {self.bottom}".strip()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table as it is printed, in the words of a `Style`."""

    title: str
    headings: tuple[Heading, ...]
    words: int
    """How many of the first columns hold words; the others hold figures."""
    lines: tuple[tuple[str, ...], ...]
    caption: str


def _tex(text: str) -> str:
    """Plain words as TeX."""
    return "".join(_TEX.get(char, char) for char in _line(text))


_TEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "±": "$\\pm$",
    "≈": "$\\approx$",
    MINUS: "$-$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
}


def _markdown(text: str) -> str:
    """Plain words as Markdown, which may hold HTML and be part of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&])", r"\\\1", _line(text))


def _line(text: str) -> str:
    """Text on one line, without control characters."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text)


PLAIN = Style(best="{}*", tied="{}≈")
MARKDOWN = Style(text=_markdown, best="**{}**", tied="{} ≈")
LATEX = Style(
    text=_tex,
    plus_minus="$\\pm$",
    best="\\textbf{{{}}}",
    tied="{} $\\approx$",
    verified="{} $\\surd$",
    batch_dependent="{} $\\dagger$ batch-dependent",
    below="\\quad {}",
)


def show(metric: Metric, stat: Stat | None, *, style: Style = PLAIN) -> str:
    """A figure as people read it: CL in percent with one digit, cosines with three, ± standard deviation over seeds."""
    if stat is None:
        return "-"
    scale, digits = (100, 1) if metric == "cl" else (1, 3)
    text = _spread(stat, scale=scale, digits=digits, style=style)
    if stat.judged is None or stat.judged.standing in ("behind", "alone"):
        return text
    return (style.best if stat.judged.standing == "best" else style.tied).format(text)


def _spread(stat: Stat | None, *, scale: float, digits: int, style: Style) -> str:
    if stat is None:
        return "-"
    spread = "" if stat.sd is None else f" {style.plus_minus} {scale * stat.sd:.{digits}f}"
    return f"{scale * stat.mean:.{digits}f}{spread}"


def caption(table: Table, *, style: Style = PLAIN) -> str:
    """What the figures and marks are, in a few sentences."""
    facts = (
        f"{table.test_samples} test samples; mean ± standard deviation (ddof = 1) over n seeds; CL = accuracy in %; CAM-COS, ATT-COS = "
        f"cosine with the AU map, mean over expressions; data {table.fingerprint[:8]}, recipe {table.recipe}."
    )
    parts = [style.text(facts)]
    if table.resolution:
        marks = f"Best of a column: {style.best.format('so')}; not to be told apart from it: {style.tied.format('so')}."
        parts.append(f"{marks} {style.text(table.resolution)}.")
    if any(row.verified for row in table.rows):
        parts.append(f"{style.verified.format('So')}: evaluated again from its weights; other rows are self-reported.")
    else:
        parts.append(style.text("All rows are self-reported."))
    if any(row.batch_dependent for row in table.rows):
        mark = style.batch_dependent.format("").strip()
        parts.append(f"{mark}: logits or maps change with the batch they are computed in; not judged, not ranked.")
    if any(row.spread for row in table.rows):
        causes = " and ".join(dict.fromkeys(cause for row in table.rows if row.spread for cause in row.process_causes))
        mixed = any(len(row.process_counts) > 1 for row in table.rows)
        words = f"[processes]: {causes} make the weights depend on the number of processes of the training"
        parts.append(style.text(words + ("; such a row with several numbers mixes trainings that are not alike." if mixed else ".")))
    if any(row.blank_maps.mark for row in table.rows):
        words = "[maps constant]: of the true class, over all seeds; such a map shows no place, and its cosine is 0"
        also = "; so is that of a map with NaN or infinite values, as in the published code"
        parts.append(style.text(words + (also if any(row.blank_maps.not_finite for row in table.rows) else "") + "."))
    return " ".join([*parts, *(style.text(f"Note: {note}.") for note in table.notes)])


def row_name(row: Row, *, style: Style) -> str:
    """What a table calls a row: its title, with its marks."""
    name = style.text(row.title)
    name = style.verified.format(name) if row.verified else name
    name = style.batch_dependent.format(name) if row.batch_dependent else name
    return " ".join([name, *(style.text(mark) for mark in (row.spread, row.blank_maps.mark) if mark)])


_FIGURES: tuple[Column, ...] = tuple((metric, guidance) for metric in METRICS for guidance in GUIDANCE)
_FIGURE_HEADINGS = tuple(Heading(TITLES[metric], GUIDANCE_TITLES[guidance]) for metric, guidance in _FIGURES)


def _main(table: Table, *, reference: Reference | None, style: Style) -> Grid:
    several = len(table.backbones) > 1
    found = None if reference is None else beside(table, reference)
    lines: list[tuple[str, ...]] = []
    for number, row in enumerate(table.rows):
        figures = (show(column[0], row.stats.get(column), style=style) for column in _FIGURES)
        lines.append((row_name(row, style=style), *([style.text(row.backbone)] if several else []), *figures, row.seeds))
        reported = {column: found.figures.get((number, column)) for column in _FIGURES} if found else {}
        if any(reported.values()):
            assert reference is not None
            for words, show_one in ((f"reported, {reference.status}", _reported), (f"ours {MINUS} reported", _difference)):
                name = style.below.format(style.text(words))
                lines.append((name, *([""] if several else []), *(style.text(show_one(c, reported[c])) for c in _FIGURES), ""))
    return Grid(
        title=style.text(table.title),
        headings=(Heading("Method"), *([Heading("Backbone")] if several else []), *_FIGURE_HEADINGS, Heading("n")),
        words=2 if several else 1,
        lines=tuple(lines),
        caption=caption(table, style=style) + (f" {style.text(found.words)}." if found else ""),
    )


def _reported(column: Column, reported: Reported | None) -> str:
    """With two digits, as published tables have them."""
    return "-" if reported is None else f"{(100 if column[0] == 'cl' else 1) * reported.value:.2f}"


def _difference(column: Column, reported: Reported | None) -> str:
    return "-" if reported is None else f"{(100 if column[0] == 'cl' else 1) * reported.difference:+.2f}".replace("-", MINUS)


class _Unit(NamedTuple):
    """How a cost is shown."""

    title: str
    unit: str
    scale: float
    digits: int


_UNITS: Mapping[str, _Unit] = {
    "parameters": _Unit("Parameters", "M", 1e-6, 2),
    "macs": _Unit("MACs", "G", 1e-9, 3),
    "training_seconds": _Unit("Training", "min", 1 / 60, 2),
    "training_images_per_second": _Unit("Training", "images/s", 1, 0),
    "training_peak_memory_bytes": _Unit("Training", "peak GiB", 2**-30, 2),
    "evaluation_images_per_second": _Unit("Shared evaluation", "images/s", 1, 0),
    "map_seconds_per_image": _Unit("Map", "ms/image", 1e3, 2),
    "evaluation_peak_memory_bytes": _Unit("Evaluation", "peak GiB", 2**-30, 2),
}
assert tuple(_UNITS) == COSTS


def _measures(table: Table, *, style: Style) -> Grid | None:
    there = {name for row in table.rows for name, _ in row.measures}
    names = [*(name for name, column in COLUMNS.items() if name in there and column.part_of is None), *sorted(there - COLUMNS.keys())]

    def figures(row: Row, guidance: str) -> list[str]:
        return [_spread(row.measures.get((name, guidance)), scale=1, digits=3, style=style) for name in names]

    arrows = {"higher": " ↑", "lower": " ↓"}
    titles = [f"{COLUMNS[name].title}{arrows[COLUMNS[name].better]}" if name in COLUMNS else name for name in names]
    headings = [Heading(style.text(title)) for title in titles]
    words = "Mean over classes; ↑ higher is better, ↓ lower"
    return _further("further measures", table, _by_guidance(table, figures, style), headings, words, style)


def _costs(table: Table, *, style: Style) -> Grid | None:
    names = [name for name in COSTS if any(name == there for row in table.rows for there, _ in row.costs)]

    def figures(row: Row, guidance: str) -> list[str]:
        units = [_UNITS[name] for name in names]
        stats = [row.costs.get((name, guidance)) for name in names]
        # What is the same for every seed has no spread to show.
        settled = [stat if stat is None or stat.sd else Stat(values=stat.values[:1]) for stat in stats]
        return [_spread(stat, scale=unit.scale, digits=unit.digits, style=style) for stat, unit in zip(settled, units, strict=True)]

    where = f"Computed on {'; '.join(table.hardware)}" + (": not comparable between machines" if len(table.hardware) > 1 else "")
    if "evaluation_images_per_second" in names:
        where += "; shared evaluation: one pass serves all read-outs of a training, and checks that they do not depend on the batch"
    headings = [Heading(_UNITS[name].title, _UNITS[name].unit) for name in names]
    return _further("cost", table, _by_guidance(table, figures, style), headings, where, style)


def _by_guidance(table: Table, figures: Callable[[Row, str], list[str]], style: Style) -> list[tuple[str, ...]]:
    """A line for each row and guidance that has any of some figures."""
    lines = []
    for row, guidance in itertools.product(table.rows, GUIDANCE):
        shown = figures(row, guidance)
        if any(text != "-" for text in shown):
            lines.append((row_name(row, style=style), style.text(row.backbone), GUIDANCE_TITLES[guidance], *shown))
    return lines


def _further(what: str, table: Table, lines: list[tuple[str, ...]], headings: list[Heading], words: str, style: Style) -> Grid | None:
    if not lines:
        return None
    return Grid(
        title=style.text(f"{table.title}: {what}"),
        headings=(Heading("Method"), Heading("Backbone"), Heading("Guidance"), *headings),
        words=3,
        lines=tuple(lines),
        caption=style.text(f"{words}; mean ± standard deviation over seeds."),
    )


def _ranking(ranking: RankTable, *, style: Style) -> Grid:
    lines = []
    for row in ranking.rows:
        shown = []
        for column in _FIGURES:
            if column in row.ranks:
                mark = {"best": style.best, "tied": style.tied, "behind": "{}"}[ranking.standing(row, column)]
                shown.append(mark.format(f"{row.ranks[column]:.2f}"))
            else:
                shown.append("-")
        lines.append((style.text(row.title), style.text(row.backbone), *shown))
    found = [ranking.columns.get(column) for column in _FIGURES]
    lines.append(("Critical difference", "", *("-" if one is None else f"{one.critical_difference:.2f}" for one in found)))
    lines.append(("Friedman p", "", *("-" if one is None or one.friedman_p is None else f"{one.friedman_p:.3g}" for one in found)))
    words = (
        f"1 = best of the rows that are on all {len(ranking.datasets)} datasets; recipe {ranking.recipe}. Friedman p: of all being equal. "
        "Critical difference: Nemenyi, level 5 % (J. Demsar, JMLR 2006)."
    )
    marks = f"Best: {style.best.format('so')}; nearer to it than the critical difference: {style.tied.format('so')}."
    return Grid(
        title=style.text(ranking.title),
        headings=(Heading("Method"), Heading("Backbone"), *_FIGURE_HEADINGS),
        words=2,
        lines=tuple(lines),
        caption=" ".join([style.text(words), marks, *(style.text(f"Note: {note}.") for note in ranking.notes)]),
    )


def grids(
    tables: Sequence[Table], rankings: Sequence[RankTable], *, reference: Reference | None, columns: Columns, style: Style
) -> Iterator[Grid]:
    """What is printed, in order: each table, its further figures below it; rankings last. For arguments see `render`."""
    for table in tables:
        further = [_measures(table, style=style)] if columns in ("measures", "all") else []
        further += [_costs(table, style=style)] if columns in ("cost", "all") else []
        yield _main(table, reference=reference, style=style)
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
        reference: published figures to put beside ours.
        columns: which figures Markdown and LaTeX show.
    """
    assert fmt in FORMATS
    if fmt == "json":
        plain = {"tables": [_plain(table, reference) for table in tables], "rankings": [_plain_ranking(ranking) for ranking in rankings]}
        return json.dumps(plain, indent=2, ensure_ascii=False)
    if fmt == "csv":
        return _csv(tables, rankings, reference)
    style, write = (MARKDOWN, markdown) if fmt == "md" else (LATEX, _latex)
    shown = grids(tables, rankings, reference=reference, columns=columns, style=style)
    return "\n".join([*([_PREAMBLE] if fmt == "latex" else []), *map(write, shown)])


def markdown(grid: Grid) -> str:
    """A grid of style `MARKDOWN`."""
    sides = ["left"] * grid.words + ["right"] * (len(grid.headings) - grid.words)
    headers = [heading.line for heading in grid.headings]
    body = tabulate(grid.lines, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=sides)
    return f"### {grid.title}\n\n{body}\n\n{grid.caption}\n"


_PREAMBLE = """\
% needs \\usepackage{booktabs} and \\usepackage{graphicx}
\\ifdefined\\benchtable\\else\\newsavebox{\\benchtable}\\fi
"""


def _latex(grid: Grid) -> str:
    """A booktabs table, shrunk where it is wider than the page."""
    tops, rules, bottoms, start = [], [], [], 1
    for top, group in itertools.groupby(grid.headings, key=lambda heading: heading.top):
        bottoms_there = [heading.bottom for heading in group]
        span = len(bottoms_there)
        if any(bottoms_there):
            tops.append(f"\\multicolumn{{{span}}}{{c}}{{{top}}}")
            rules.append(f"\\cmidrule(lr){{{start}-{start + span - 1}}}")
        else:
            tops.append(top)
        bottoms += bottoms_there
        start += span
    heads = [_row(tops), *([" ".join(rules), _row(bottoms)] if rules else [])]
    sides = "l" * grid.words + "r" * (len(grid.headings) - grid.words)
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering\\small\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{grid.title}}}\\smallskip",
            f"\\sbox{{\\benchtable}}{{\\begin{{tabular}}{{{sides}}}",
            "\\toprule",
            *heads,
            "\\midrule",
            *map(_row, grid.lines),
            "\\bottomrule",
            "\\end{tabular}}",
            "\\ifdim\\wd\\benchtable>\\textwidth\\resizebox{\\textwidth}{!}{\\usebox{\\benchtable}}\\else\\usebox{\\benchtable}\\fi",
            f"\\par\\smallskip\\parbox{{\\textwidth}}{{\\footnotesize {grid.caption}}}",
            "\\end{table}",
            "",
        ]
    )


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def rich_tables(
    tables: Sequence[Table],
    *,
    rankings: Sequence[RankTable] = (),
    reference: Reference | None = None,
    columns: Columns = "metrics",
) -> list[RichTable]:
    """The same for the terminal."""
    return [rich_grid(grid) for grid in grids(tables, rankings, reference=reference, columns=columns, style=PLAIN)]


def rich_grid(grid: Grid) -> RichTable:
    """A grid of style `PLAIN`. Words are shown as they are: what looks like rich's markup is none."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(grid.title), caption=Text(grid.caption), caption_justify="left")
    for number, heading in enumerate(grid.headings):
        shown.add_column(Text(f"{heading.top}\n{heading.bottom}".strip()), justify="left" if number < grid.words else "right")
    for line in grid.lines:
        shown.add_row(*map(Text, line))
    return shown


_FACTS = ("dataset", "entry", "fingerprint", "partial", "protocol", "variant", "recipe")


def _plain(table: Table, reference: Reference | None) -> dict[str, Any]:
    found = None if reference is None else beside(table, reference)
    facts = {fact: getattr(table, fact) for fact in (*_FACTS, "au_maps", "hardware", "test_samples", "resolution")}
    rows = [_plain_row(row, number, found) for number, row in enumerate(table.rows)]
    plain: dict[str, Any] = {**facts, "notes": list(table.notes), "rows": rows}
    if reference is not None and found is not None:
        source = reference.model_dump(mode="json", exclude={"figures", "backbones", "columns", "aliases"})
        plain["reference"] = {**source, "applies": bool(found.figures), "words": found.words}
    return plain


def _plain_row(row: Row, number: int, found: Beside | None) -> dict[str, Any]:
    figures = []
    for (metric, guidance), stat in row.stats.items():
        figure = {"metric": metric, "guidance": guidance, **_figure(stat)}
        reported = None if found is None else found.figures.get((number, (metric, guidance)))
        figures.append(figure if reported is None else {**figure, "reported": dataclasses.asdict(reported)})
    return {
        "method": row.method,
        "title": row.title,
        "backbone": row.backbone,
        "verified": row.verified,
        "batch_dependent": row.batch_dependent,
        "process_counts": list(row.process_counts),
        "maps": dataclasses.asdict(row.blank_maps),
        "process_causes": list(row.process_causes),
        "figures": figures,
        "measures": [{"measure": name, "guidance": guidance, **_figure(stat)} for (name, guidance), stat in row.measures.items()],
        "costs": [{"cost": name, "guidance": guidance, **_figure(stat)} for (name, guidance), stat in row.costs.items()],
    }


def _figure(stat: Stat) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "mean": stat.mean,
        "sd": stat.sd,
        "n": stat.n,
        "values": list(stat.values),
        "interval_over_seeds": stat.interval,
    }
    if stat.judged is not None:
        judged = stat.judged
        plain |= {"intervals_over_samples": judged.intervals, "standing": judged.standing, "p_equal_to_best": judged.p_best}
    return plain


def _plain_ranking(ranking: RankTable) -> dict[str, Any]:
    facts = {fact: getattr(ranking, fact) for fact in ("datasets", "protocol", "variant", "recipe", "partial", "notes")}
    columns = [
        {"metric": metric, "guidance": guidance, "critical_difference": found.critical_difference, "friedman_p": found.friedman_p}
        for (metric, guidance), found in ranking.columns.items()
    ]
    rows = [
        {
            "method": row.method,
            "title": row.title,
            "backbone": row.backbone,
            "ranks": [
                {"metric": column[0], "guidance": column[1], "average_rank": value, "standing": ranking.standing(row, column)}
                for column, value in row.ranks.items()
            ],
        }
        for row in ranking.rows
    ]
    return {**facts, "columns": columns, "rows": rows}


_CSV = (
    *("dataset", "fingerprint", "partial", "protocol", "variant", "recipe", "method", "backbone", "guidance", "metric", "mean", "sd", "n"),
    *("standing", "p_equal_to_best", "kind", "entry", "title", "verified", "batch_dependent", "reported", "difference_to_reported"),
    *("critical_difference", "friedman_p"),
)


def _csv(tables: Sequence[Table], rankings: Sequence[RankTable], reference: Reference | None) -> str:
    """One line a figure; ``kind`` tells metrics, optional measures, costs, and average ranks (their mean) apart."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, restval="", lineterminator="\n")
    writer.writeheader()
    for table in tables:
        found = None if reference is None else beside(table, reference)
        for number, row in enumerate(table.rows):
            for fields in _csv_figures(row, number, found):
                shared = {fact: getattr(table, fact) for fact in _FACTS}
                writer.writerow({**shared, **{name: getattr(row, name) for name in _CSV_ROW}, **fields})
    for ranking in rankings:
        shared = {"kind": "rank", "dataset": " + ".join(ranking.datasets)}
        shared |= {fact: getattr(ranking, fact) for fact in ("partial", "protocol", "variant", "recipe")}
        for ranked in ranking.rows:
            for column, value in ranked.ranks.items():
                of = ranking.columns[column]
                fields = {"metric": column[0], "guidance": column[1], "mean": value, "n": len(ranking.datasets)}
                fields |= {"standing": ranking.standing(ranked, column), "critical_difference": of.critical_difference}
                names = {name: getattr(ranked, name) for name in ("method", "title", "backbone")}
                writer.writerow({**shared, **names, **fields, "friedman_p": "" if of.friedman_p is None else of.friedman_p})
    return out.getvalue()


_CSV_ROW = ("method", "title", "backbone", "verified", "batch_dependent")


def _csv_figures(row: Row, number: int, found: Beside | None) -> Iterator[dict[str, Any]]:
    for (metric, guidance), stat in row.stats.items():
        fields = {"kind": "metric", "metric": metric, "guidance": guidance, **_csv_stat(stat)}
        if stat.judged is not None:
            fields |= {"standing": stat.judged.standing, "p_equal_to_best": stat.judged.p_best}
        reported = None if found is None else found.figures.get((number, (metric, guidance)))
        if reported is not None:
            fields |= {"reported": reported.value, "difference_to_reported": reported.difference}
        yield fields
    for kind, stats in (("measure", row.measures), ("cost", row.costs)):
        for (name, guidance), stat in stats.items():
            yield {"kind": kind, "metric": name, "guidance": guidance, **_csv_stat(stat)}


def _csv_stat(stat: Stat) -> dict[str, Any]:
    return {"mean": stat.mean, "sd": "" if stat.sd is None else stat.sd, "n": stat.n}
