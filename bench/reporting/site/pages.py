"""Content of the pages as plain data for the templates. Numbers become text here; no text becomes HTML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.evaluation.statistics import Interval
from bench.reporting.site.figures import Picture
from bench.reporting.tables.evidence import Metric
from bench.reporting.tables.grid import Style
from bench.reporting.tables.leaderboard import FIGURES, GUIDANCE, GUIDANCE_TITLES, TITLES, Row, Stat, Table
from bench.reporting.tables.render import row_name, show
from bench.sweep.record import Record

STRONG = ("\ue001", "\ue002")
"""Characters around bold text. The `marks` filter of the templates turns them into HTML, after escaping."""
STYLE = Style(best=f"{STRONG[0]}{{}}{STRONG[1]}", tied="{} ≈")
NOTHING = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link with its short and its full text."""

    href: str
    text: str
    full: str
    current: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridCell:
    """A figure, with a shade of 0 (white) to 10 (dark) behind it."""

    text: str
    shade: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of figures."""

    caption: str
    corner: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[GridCell, ...]], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """A table of strips of maps: one row a strip, one column a tile of it."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, Picture], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoardCell:
    """One figure of the leaderboard."""

    text: str
    sort: str
    """What it is sorted by: a plain decimal."""
    certainty: tuple[str, ...]
    """Intervals and standing in words, where they are known."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoardRow:
    """One row of the leaderboard."""

    title: str
    name: str
    """The title with its marks."""
    backbone: str
    cells: tuple[BoardCell, ...]
    runs: tuple[tuple[str, tuple[Link, ...]], ...]
    """Guidance in words -> the pages of its seeds."""


def slug(*parts: object) -> str:
    """Words as a part of a file name: lower-case ASCII letters, digits and hyphens."""
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in parts)))[:100].strip("-")


def cell_page(record: Record) -> str:
    """File of the page of a cell, relative to the site."""
    name = record.cell
    # The key comes from a file that others may have written: only its hash goes into a path.
    key = hashlib.sha256(record.key.encode()).hexdigest()[:10]
    return f"cells/{slug(name.method, name.guidance, name.backbone, name.dataset, f'seed{name.seed}')}-{key}.html"


def maps_page(number: int, table: Table) -> str:
    """File of the page of maps of the n-th table, relative to the site."""
    return f"maps/{number}-{slug(table.dataset, table.protocol, table.variant)}.html"


def board_row(row: Row, records: Mapping[str, Record]) -> BoardRow:
    """A row of the leaderboard; ``records`` by key."""
    members = sorted((records[key] for key in row.keys), key=lambda record: record.cell.seed)
    runs = {
        GUIDANCE_TITLES[guidance]: tuple(
            Link(
                href=cell_page(record),
                text=str(record.cell.seed),
                full=f"{row.title}, {row.backbone}, {GUIDANCE_TITLES[guidance]}, seed {record.cell.seed}",
            )
            for record in members
            if record.cell.guidance == guidance
        )
        for guidance in GUIDANCE
    }
    return BoardRow(
        title=row.title,
        name=row_name(row, style=STYLE),
        backbone=row.backbone,
        cells=tuple(_board_cell(metric, row.stats.get((metric, guidance))) for metric, guidance in FIGURES),
        runs=tuple((guidance, links) for guidance, links in runs.items() if links),
    )


def board_heads() -> tuple[str, ...]:
    """Headings of the figures of a leaderboard, in the order of `BoardRow.cells`."""
    return tuple(f"{TITLES[metric]} {GUIDANCE_TITLES[guidance]}" for metric, guidance in FIGURES)


def _board_cell(metric: Metric, stat: Stat | None) -> BoardCell:
    text = show(metric, stat, style=STYLE)
    if stat is None:
        return BoardCell(text=NOTHING, sort="-1", certainty=())  # below every figure
    return BoardCell(text=text, sort=f"{stat.mean:.9f}", certainty=_certainty(metric, stat))


def _certainty(metric: Metric, stat: Stat) -> tuple[str, ...]:
    def words(interval: Interval) -> str:
        low, high = interval
        return f"{100 * low:.1f} to {100 * high:.1f}" if metric == "cl" else f"{low:.3f} to {high:.3f}"

    parts = []
    if stat.interval is not None:
        parts.append(f"for other seeds {words(stat.interval)}")
    if stat.judged is not None:
        parts.append(f"for other samples {', '.join(map(words, stat.judged.intervals))}")
        standing = {"best": "best", "tied": "tied with the best", "behind": "behind the best"}.get(stat.judged.standing)
        if standing is not None:
            parts.append(standing if standing == "best" else f"{standing}, p = {stat.judged.p_best:.2g}")
    return tuple(parts)


def confusion(record: Record) -> Grid:
    """The confusion matrix, shaded by the share of the true class."""
    counts: Sequence[Sequence[int]] = record.metrics["cl"]["confusion"]
    classes = record.data.classes
    return Grid(
        caption="Confusion matrix: test samples by true class (row) and predicted class (column); shaded by the share of the true class.",
        corner="True class",
        heads=classes,
        rows=tuple(
            (name, tuple(GridCell(text=str(count), shade=_shade(count / max(1, sum(row)))) for count in row))
            for name, row in zip(classes, counts, strict=True)
        ),
    )


def layer_cosines(record: Record) -> Grid:
    """The cosine of every layer's attention, and of the map, with the AU map of every expression."""
    summaries = {f"Layer {layer} attention": summary for layer, summary in record.metrics["att_cos"].items()}
    summaries["Map of the true class"] = record.metrics["cam_cos"]["true"]
    expressions = tuple(record.metrics["cam_cos"]["true"]["per_class"])
    return Grid(
        caption=f"Cosine with the AU map, per layer and expression; ATT-COS is layer {record.attention_layer}.",
        corner="Where",
        heads=(*expressions, "mean"),
        rows=tuple(
            (
                name,
                tuple(_cosine(value) for value in (*(summary["per_class"][e]["mean"] for e in expressions), summary["macro"])),
            )
            for name, summary in summaries.items()
        ),
    )


def per_class(record: Record) -> Grid:
    """Accuracy, cosines and optional measures of every class."""
    metrics, layer = record.metrics, record.attention_layer
    columns: dict[str, Mapping[str, Any]] = {
        "CAM-COS": metrics["cam_cos"]["true"],
        "CAM-COS of the predicted class": metrics["cam_cos"]["predicted"],
        f"ATT-COS (layer {layer})": metrics["att_cos"][str(layer)],
        **metrics.get("measures", {}),
    }
    accuracies = metrics["cl"]["per_class"]
    rows = [
        (
            name,
            (
                GridCell(text=str(accuracies[name]["samples"])),
                GridCell(text=_percent(accuracies[name]["accuracy"])),
                *(GridCell(text=_decimal(summary["per_class"].get(name, {}).get("mean"))) for summary in columns.values()),
            ),
        )
        for name in record.data.classes
    ]
    overall = (
        GridCell(text=str(metrics["cl"]["samples"])),
        GridCell(text=_percent(metrics["cl"]["accuracy"])),
        *(GridCell(text=_decimal(summary["macro"])) for summary in columns.values()),
    )
    return Grid(
        caption="Figures per class. The last row is the accuracy over all samples, and the plain mean over the expressions.",
        corner="Class",
        heads=("Samples", "Accuracy in %", *columns),
        rows=(*rows, ("All", overall)),
    )


def invariance(record: Record) -> Grid | None:
    """How much logits and maps change with the batch they are computed in; None for records older than that check."""
    if record.invariance is None:
        return None
    check = record.invariance
    heads = tuple(check["logits"])
    return Grid(
        caption=f"Largest difference of {check['samples']} samples computed in other batches (of maps the largest but one, as rounding may "
        f"decide a tie); {check['tolerance']:g} is tolerated: "
        + ("this holds." if check["holds"] else "this does not hold, the figures depend on how samples were batched."),
        corner="Of",
        heads=tuple(head.replace("_", " ") for head in heads),
        rows=tuple(
            (name, tuple(GridCell(text=f"{check[name][head]:.1e}" if check[name][head] else "0") for head in heads))
            for name in ("logits", "maps")
        ),
    )


def provenance(record: Record) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Everything needed to check and to repeat a cell: heading -> (name, value)."""
    code, data = record.code, record.data
    return (
        (
            "Identity",
            (
                ("cell", record.key),
                ("training", record.training_key),
                ("trained as", record.trains_as),
                ("protocol", record.protocol),
                ("variant", record.variant),
                ("finished", record.finished),
                ("weights sha256", record.weights_sha256),
                ("rows sha256", record.rows_sha256),
                ("maps sha256", record.maps_sha256 or NOTHING),
                *((f"seed of {name}" if name != "seed" else name, str(seed)) for name, seed in record.seeds.items()),
            ),
        ),
        (
            "Data",
            (
                ("entry", data.entry),
                ("fingerprint", data.fingerprint),
                ("evaluated", f"{data.samples} samples of {data.split}"),
                ("keys sha256", data.keys_sha256),
                ("pictures left out", str(data.bad_pictures)),
            ),
        ),
        (
            "Code",
            (
                ("bench", code.version),
                ("commit", code.commit or NOTHING),
                ("uncommitted changes sha256", code.dirty_diff_sha256 or ("none" if code.clean else "not known")),
                ("source sha256", code.source_sha256 or "not recorded"),
                *code.libraries.items(),
            ),
        ),
        ("Hardware", _facts(record.hardware)),
        ("Cost", _facts(record.cost)),
    )


def settings(record: Record) -> tuple[tuple[str, str, str], ...]:
    """The resolved configuration: (dotted key, value, where it comes from)."""
    return tuple((key, _json(_at(record.config, key)), origin) for key, origin in record.origins.items())


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _facts(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", " "), _value(value)) for name, value in facts.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else _json(value)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cosine(value: float | None) -> GridCell:
    return GridCell(text=NOTHING) if value is None else GridCell(text=f"{value:.3f}", shade=_shade(value))


def _shade(share: float) -> int:
    return round(10 * min(1.0, max(0.0, share)))


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}"


def _decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
