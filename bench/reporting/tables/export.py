"""Tables as data: JSON, and CSV with a line for each figure. Both hold everything."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.reporting.tables.leaderboard import Row, Stat, Table
from bench.reporting.tables.ranking import RankTable
from bench.reporting.tables.references import Beside, Reference, beside

_FACTS = ("dataset", "entry", "fingerprint", "partial", "protocol", "variant", "recipe")
_CSV = (
    *("dataset", "fingerprint", "partial", "protocol", "variant", "recipe", "method", "backbone", "guidance", "metric", "mean", "sd", "n"),
    *("standing", "p_equal_to_best", "kind", "entry", "title", "verified", "batch_dependent", "reported", "difference_to_reported"),
    *("critical_difference", "friedman_p"),
)
_KINDS = (("metric", "figures"), ("measure", "measures"), ("cost", "costs"))
"""``kind`` of a line of the CSV, which is also the key of the figure's name in JSON -> key of such figures in a row of the JSON."""


def plain_tables(tables: Sequence[Table], rankings: Sequence[RankTable], reference: Reference | None) -> dict[str, Any]:
    """All tables and rankings as the content of the JSON file."""
    return {"tables": [_table(table, reference) for table in tables], "rankings": [_ranking(ranking) for ranking in rankings]}


def csv_tables(tables: Sequence[Table], rankings: Sequence[RankTable], reference: Reference | None) -> str:
    """All tables and rankings as CSV, a line for each figure. The mean of a ``rank`` is the average rank, its n the number of datasets."""
    content = plain_tables(tables, rankings, reference)
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for table in content["tables"]:
        for row in table["rows"]:
            for kind, key in _KINDS:
                for figure in row[key]:
                    reported = figure.get("reported", {})
                    names = {"kind": kind, "metric": figure[kind], "reported": reported.get("value", "")}
                    writer.writerow({**table, **row, **figure, **names, "difference_to_reported": reported.get("difference", "")})
    for ranking in content["rankings"]:
        columns = {(column["metric"], column["guidance"]): column for column in ranking["columns"]}
        shared = {**ranking, "kind": "rank", "dataset": " + ".join(ranking["datasets"]), "n": len(ranking["datasets"])}
        for row in ranking["rows"]:
            for entry in row["ranks"]:
                of_column = columns[entry["metric"], entry["guidance"]]
                writer.writerow({**shared, **row, **of_column, **entry, "mean": entry["average_rank"]})
    return out.getvalue()


def _table(table: Table, reference: Reference | None) -> dict[str, Any]:
    published = None if reference is None else beside(table, reference)
    facts = {fact: getattr(table, fact) for fact in (*_FACTS, "au_maps", "hardware", "test_samples", "resolution")}
    plain = {**facts, "notes": list(table.notes), "rows": [_row(row, number, published) for number, row in enumerate(table.rows)]}
    if reference is not None and published is not None:
        source = reference.model_dump(mode="json", exclude={"figures", "backbones", "columns", "aliases"})
        plain["reference"] = {**source, "applies": bool(published.figures), "words": published.words}
    return plain


def _row(row: Row, number: int, published: Beside | None) -> dict[str, Any]:
    figures = _figures("metric", row.stats)
    for figure, column in zip(figures, row.stats, strict=True):
        reported = None if published is None else published.figures.get((number, column))
        if reported is not None:
            figure["reported"] = dataclasses.asdict(reported)
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
        "measures": _figures("measure", row.measures),
        "costs": _figures("cost", row.costs),
    }


def _figures(kind: str, stats: Mapping[Any, Stat]) -> list[dict[str, Any]]:
    figures = []
    for (name, guidance), stat in stats.items():
        figure = {kind: name, "guidance": guidance, "mean": stat.mean, "sd": stat.sd, "n": stat.n}
        figure |= {"values": list(stat.values), "interval_over_seeds": stat.interval}
        if stat.judged is not None:
            judged = stat.judged
            figure |= {"intervals_over_samples": judged.intervals, "standing": judged.standing, "p_equal_to_best": judged.p_best}
        figures.append(figure)
    return figures


def _ranking(ranking: RankTable) -> dict[str, Any]:
    facts = {fact: getattr(ranking, fact) for fact in ("datasets", "protocol", "variant", "recipe", "partial", "notes")}
    columns = [
        {"metric": metric, "guidance": guidance, "critical_difference": column.critical_difference, "friedman_p": column.friedman_p}
        for (metric, guidance), column in ranking.columns.items()
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
