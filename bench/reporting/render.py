"""Tables as text: Markdown, LaTeX, CSV, JSON; for the terminal see `rich_table`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bench.reporting.evidence import METRICS, Metric
from bench.reporting.leaderboard import GUIDANCE, GUIDANCE_TITLES, TITLES, Stat, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = ("md", "latex", "csv", "json")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a format writes what a figure is."""

    plus_minus: str = "±"
    best: str = "{}"
    tied: str = "{}"


PLAIN = Style(best="{} *", tied="{} ≈")
MARKDOWN = Style(best="**{}**", tied="{} ≈")
# Characters of the private use area, made TeX after the table: tabulate escapes what it is given.
LATEX = Style(plus_minus="\ue000", best="\ue001{}\ue002", tied="{} \ue003")


def show(metric: Metric, stat: Stat | None, *, style: Style = PLAIN) -> str:
    """A figure as people read it: CL in percent with one digit, cosines with three, ± standard deviation over seeds."""
    if stat is None:
        return "-"
    scale, digits = (100, 1) if metric == "cl" else (1, 3)
    spread = "" if stat.sd is None else f" {style.plus_minus} {scale * stat.sd:.{digits}f}"
    text = f"{scale * stat.mean:.{digits}f}{spread}"
    if stat.judged is None or stat.judged.standing in ("behind", "alone"):
        return text
    return (style.best if stat.judged.standing == "best" else style.tied).format(text)


def caption(table: Table, *, style: Style = PLAIN) -> str:
    """What the figures are, in a sentence or two."""
    facts = (
        f"{table.test_samples} test samples; mean ± standard deviation (ddof = 1) over n seeds; CL = accuracy in %; CAM-COS, ATT-COS = "
        f"cosine with the AU map, mean over expressions; data {table.fingerprint[:8]}, recipe {table.recipe}."
    )
    ties = [f"Best of a column: {style.best.format('so')}; not to be told apart from it: {style.tied.format('so')}. {table.resolution}."]
    return " ".join([facts, *(ties if table.resolution else []), *(f"Note: {note}." for note in table.notes)])


def _header(table: Table) -> list[str]:
    figures = [f"{TITLES[metric]} {GUIDANCE_TITLES[guidance]}" for metric in METRICS for guidance in GUIDANCE]
    return ["Method", *(["Backbone"] if len(table.backbones) > 1 else []), *figures, "n"]


def _body(table: Table, *, style: Style = PLAIN) -> list[list[str]]:
    several = len(table.backbones) > 1
    return [
        [
            row.title,
            *([row.backbone] if several else []),
            *(show(metric, row.stats.get((metric, guidance)), style=style) for metric in METRICS for guidance in GUIDANCE),
            row.seeds,
        ]
        for row in table.rows
    ]


def _alignment(table: Table) -> list[str]:
    return ["left"] * (2 if len(table.backbones) > 1 else 1) + ["right"] * (len(METRICS) * len(GUIDANCE) + 1)


def render(tables: Sequence[Table], fmt: str) -> str:
    """All tables as one text; ``fmt`` is one of `FORMATS`."""
    assert fmt in FORMATS
    if fmt == "json":
        return json.dumps([_plain(table) for table in tables], indent=2, ensure_ascii=False)
    if fmt == "csv":
        return _csv(tables)
    parts = []
    for table in tables:
        if fmt == "md":
            body = tabulate(
                _body(table, style=MARKDOWN), headers=_header(table), tablefmt="pipe", disable_numparse=True, colalign=_alignment(table)
            )
            parts.append(f"### {table.title}\n\n{body}\n\n{caption(table, style=MARKDOWN)}\n")
        else:
            lines = _body(table, style=LATEX)
            body = tabulate(lines, headers=_header(table), tablefmt="latex_booktabs", disable_numparse=True, colalign=_alignment(table))
            title, text = _tex(table.title), _tex(caption(table, style=LATEX))
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{title}. {text}}}\n{_tex_marks(body)}\n\\end{{table}}\n")
    return "\n".join(parts)


def _tex(text: str) -> str:
    """Plain words as TeX."""
    for plain, tex in (
        ("\\", "\\textbackslash{}"),
        ("%", "\\%"),
        ("_", "\\_"),
        ("&", "\\&"),
        ("#", "\\#"),
        ("±", "$\\pm$"),
        ("≈", "$\\approx$"),
    ):
        text = text.replace(plain, tex)
    return _tex_marks(text)


def _tex_marks(text: str) -> str:
    for mark, tex in (("\ue000", "$\\pm$"), ("\ue001", "\\textbf{"), ("\ue002", "}"), ("\ue003", "$\\approx$")):
        text = text.replace(mark, tex)
    return text


def rich_table(table: Table) -> RichTable:
    """The table for the terminal."""
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, caption=caption(table), caption_justify="left")
    for heading, side in zip(_header(table), _alignment(table), strict=True):
        shown.add_column(heading.replace(" ", "\n", 1), justify="left" if side == "left" else "right")
    for line in _body(table):
        shown.add_row(*line)
    return shown


def _plain(table: Table) -> dict[str, Any]:
    rows = [
        {
            "method": row.method,
            "title": row.title,
            "backbone": row.backbone,
            "figures": [{"metric": metric, "guidance": guidance, **_figure(stat)} for (metric, guidance), stat in row.stats.items()],
        }
        for row in table.rows
    ]
    facts = ("dataset", "fingerprint", "protocol", "variant", "recipe", "test_samples", "partial", "resolution")
    return {**{fact: getattr(table, fact) for fact in facts}, "notes": list(table.notes), "rows": rows}


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


def _csv(tables: Sequence[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    facts = ("dataset", "fingerprint", "partial", "protocol", "variant", "recipe")
    writer.writerow([*facts, "method", "backbone", "guidance", "metric", "mean", "sd", "n", "standing", "p_equal_to_best"])
    for table in tables:
        for row in table.rows:
            for (metric, guidance), stat in row.stats.items():
                judged = ["", ""] if stat.judged is None else [stat.judged.standing, stat.judged.p_best]
                figures = [stat.mean, "" if stat.sd is None else stat.sd, stat.n]
                writer.writerow([*(getattr(table, fact) for fact in facts), row.method, row.backbone, guidance, metric, *figures, *judged])
    return out.getvalue()
