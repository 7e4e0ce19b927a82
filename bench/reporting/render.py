"""Tables as text: Markdown, LaTeX, CSV, JSON; for the terminal see `rich_table`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bench.reporting.leaderboard import GUIDANCE, GUIDANCE_TITLES, METRICS, TITLES, Metric, Stat, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

FORMATS = ("md", "latex", "csv", "json")


def show(metric: Metric, stat: Stat | None, *, plus_minus: str = "±") -> str:
    """A figure as people read it: CL in percent with one digit, cosines with three, ± standard deviation over seeds."""
    if stat is None:
        return "-"
    scale, digits = (100, 1) if metric == "cl" else (1, 3)
    spread = "" if stat.sd is None else f" {plus_minus} {scale * stat.sd:.{digits}f}"
    return f"{scale * stat.mean:.{digits}f}{spread}"


def caption(table: Table) -> str:
    """What the figures are, in a sentence or two."""
    facts = (
        f"{table.test_samples} test samples; mean ± standard deviation (ddof = 1) over n seeds; CL = accuracy in %; CAM-COS, ATT-COS = "
        f"cosine with the AU map, mean over expressions; data {table.fingerprint[:8]}, recipe {table.recipe}."
    )
    return " ".join([facts, *(f"Note: {note}." for note in table.notes)])


def _header(table: Table) -> list[str]:
    figures = [f"{TITLES[metric]} {GUIDANCE_TITLES[guidance]}" for metric in METRICS for guidance in GUIDANCE]
    return ["Method", *(["Backbone"] if len(table.backbones) > 1 else []), *figures, "n"]


def _body(table: Table, *, plus_minus: str = "±") -> list[list[str]]:
    several = len(table.backbones) > 1
    return [
        [
            row.title,
            *([row.backbone] if several else []),
            *(show(metric, row.stats.get((metric, guidance)), plus_minus=plus_minus) for metric in METRICS for guidance in GUIDANCE),
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
            body = tabulate(_body(table), headers=_header(table), tablefmt="pipe", disable_numparse=True, colalign=_alignment(table))
            parts.append(f"### {table.title}\n\n{body}\n\n{caption(table)}\n")
        else:
            lines = _body(table, plus_minus="+-")
            body = tabulate(lines, headers=_header(table), tablefmt="latex_booktabs", disable_numparse=True, colalign=_alignment(table))
            body = body.replace("+-", "$\\pm$")
            text = caption(table).replace("%", "\\%").replace("±", "$\\pm$").replace("_", "\\_").replace("&", "\\&")
            parts.append(
                f"\\begin{{table}}\n\\centering\n\\caption{{{table.title.replace('_', chr(92) + '_')}. {text}}}\n{body}\n\\end{{table}}\n"
            )
    return "\n".join(parts)


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
            "figures": [
                {"metric": metric, "guidance": guidance, "mean": stat.mean, "sd": stat.sd, "n": stat.n, "values": list(stat.values)}
                for (metric, guidance), stat in row.stats.items()
            ],
        }
        for row in table.rows
    ]
    facts = ("dataset", "fingerprint", "protocol", "variant", "recipe", "test_samples")
    return {**{fact: getattr(table, fact) for fact in facts}, "notes": list(table.notes), "rows": rows}


def _csv(tables: Sequence[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["dataset", "fingerprint", "protocol", "variant", "recipe", "method", "backbone", "guidance", "metric", "mean", "sd", "n"]
    )
    for table in tables:
        for row in table.rows:
            for (metric, guidance), stat in row.stats.items():
                facts = [table.dataset, table.fingerprint, table.protocol, table.variant, table.recipe]
                writer.writerow([*facts, row.method, row.backbone, guidance, metric, stat.mean, "" if stat.sd is None else stat.sd, stat.n])
    return out.getvalue()
