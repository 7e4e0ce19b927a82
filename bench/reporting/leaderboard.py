"""Records -> rows of a leaderboard. One set of rows serves every output format."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from bench.matrix import digest
from bench.method import METHODS
from bench.sweep.record import Record

Metric = Literal["cl", "cam_cos", "att_cos"]
METRICS: tuple[Metric, ...] = ("cl", "cam_cos", "att_cos")
TITLES: Mapping[Metric, str] = {"cl": "CL", "cam_cos": "CAM-COS", "att_cos": "ATT-COS"}
GUIDANCE = ("none", "au")
PUBLISHED_ORDER = ("cam", "wildcat", "gradcam", "gradcampp", "acol", "prm", "adl", "cutmix", "layercam", "tscam", "apvit")
"""Order of the rows in Table 1 of Belharbi et al., FG 2024."""
GUIDANCE_TITLES: Mapping[str, str] = {"none": "w/o AU", "au": "w/ AU"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """One figure over seeds."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds with ddof = 1; None for a single one."""
        return statistics.stdev(self.values) if self.n > 1 else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one backbone: its figures without and with guidance."""

    method: str
    backbone: str
    title: str
    stats: Mapping[tuple[Metric, str], Stat]
    """(metric, guidance) -> figure; absent where there is no record."""

    @property
    def seeds(self) -> str:
        """Number of seeds, ``3``, or ``3/2`` where guidance none and au differ."""
        counts = [max((stat.n for (_, g), stat in self.stats.items() if g == guidance), default=0) for guidance in GUIDANCE]
        shown = sorted({count for count in counts if count}, reverse=True)
        return str(shown[0]) if len(shown) == 1 else f"{counts[0]}/{counts[1]}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows that may be compared: one dataset, protocol, variant, evaluation and recipe; rows say on which backbone."""

    dataset: str
    fingerprint: str
    protocol: str
    variant: str
    recipe: str
    """Hash of the run's training settings, the same for all rows (methods may bring values of their own along)."""
    test_samples: int
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Heading of the table."""
        return f"{self.dataset}, {', '.join(self.backbones)}, protocol {self.protocol}, variant {self.variant}"

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones of the rows, each once, in order."""
        return tuple(dict.fromkeys(row.backbone for row in self.rows))


def build_tables(records: Iterable[Record]) -> tuple[Table, ...]:
    """Group records into tables of comparable rows and average over seeds.

    Raises:
        ValueError: two records claim the same cell and seed.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(_comparable(record), []).append(record)
    return tuple(_table(key, group) for key, group in sorted(groups.items()))


def _comparable(record: Record) -> tuple[str, ...]:
    # The run's settings, not the training's: methods bring some values of their own along and are compared all the same.
    sections = {name: record.config[name] for name in ("train", "augment", "images")}
    recipe = digest([sections | {"train": {k: v for k, v in sections["train"].items() if k != "checkpoint_minutes"}}, record.evaluation])[
        :8
    ]
    return (record.cell.dataset, record.data.fingerprint, record.protocol, record.variant, recipe)


def _table(key: tuple[str, ...], records: list[Record]) -> Table:
    dataset, fingerprint, protocol, variant, recipe = key
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        options = digest([record.method_options, record.training_options, record.backbone_options])
        groups.setdefault((record.cell.method, record.cell.backbone, options), []).append(record)
    rows = [
        row
        for (method, backbone, _), group in sorted(groups.items(), key=lambda item: (table_order(item[0][0]), item[0]))
        for row in _rows(method, backbone, group)
    ]
    return Table(
        dataset=dataset,
        fingerprint=fingerprint,
        protocol=protocol,
        variant=variant,
        recipe=recipe,
        test_samples=records[0].data.samples,
        notes=_notes(records),
        rows=tuple(rows),
    )


def table_order(method: str) -> tuple[int, str]:
    """Where a method stands in a table: the published order first, then by name."""
    return (PUBLISHED_ORDER.index(method) if method in PUBLISHED_ORDER else len(PUBLISHED_ORDER), method)


def _rows(method: str, backbone: str, records: list[Record]) -> list[Row]:
    """One row a guidance setting (weight, layers); runs without guidance stand beside each of them."""
    plain = [r for r in records if r.cell.guidance == "none"]
    guided: dict[str, list[Record]] = {}
    for record in records:
        if record.cell.guidance == "au":
            guided.setdefault(digest(record.settings["guidance"]), []).append(record)
    title = METHODS.get(method).info.title if method in METHODS else method
    rows = []
    for group in guided.values() or [[]]:
        suffix = f" ({_guidance_words(group[0])})" if len(guided) > 1 else ""
        stats: dict[tuple[Metric, str], Stat] = {}
        for guidance, runs in (("none", plain), ("au", group)):
            for metric in METRICS:
                values = _values(runs, metric)
                if values:
                    stats[metric, guidance] = Stat(values=values)
        rows.append(Row(method=method, backbone=backbone, title=title + suffix, stats=stats))
    return rows


def _guidance_words(record: Record) -> str:
    setting = record.settings["guidance"]
    return f"weight {setting['weight']:g}, layers {'+'.join(map(str, setting['layers']))}, {setting['au_maps']} AU maps"


def _values(records: list[Record], metric: Metric) -> tuple[float, ...]:
    seeds = [record.cell.seed for record in records]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two records of {records[0].cell.dataset}/{records[0].cell.method}/{records[0].cell.guidance} have the same seed")
    values = (figure(record.metrics, metric, layer=record.attention_layer) for record in sorted(records, key=lambda r: r.cell.seed))
    return tuple(value for value in values if value is not None and math.isfinite(value))


def figure(metrics: Mapping[str, Any], metric: Metric, *, layer: int) -> float | None:
    """The headline figure of a record: accuracy, CAM-COS of the true class, ATT-COS of the layer; macro over expressions."""
    if metric == "cl":
        return float(metrics["cl"]["accuracy"])
    summary = metrics["cam_cos"]["true"] if metric == "cam_cos" else metrics["att_cos"][str(layer)]
    return None if summary["macro"] is None else float(summary["macro"])


def _notes(records: list[Record]) -> tuple[str, ...]:
    notes = []
    guided: dict[str, set[str]] = {}
    for record in records:
        if "guidance" in record.settings:
            guided.setdefault(_guidance_words(record), set()).add(record.cell.backbone)
    if guided:
        notes.append("guidance: " + "; ".join(f"{words} ({', '.join(sorted(names))})" for words, names in sorted(guided.items())))
    if records[0].protocol == "test-selected":
        notes.append("checkpoints were selected on the test split: figures are optimistic")
    for summary in (records[0].metrics["cam_cos"]["true"],):
        if summary["missing_classes"]:
            notes.append(f"no AU map for any test sample of {', '.join(summary['missing_classes'])}: left out of the macro means")
        if summary["without_map"]:
            notes.append(f"{summary['without_map']} test samples of an expression have no AU map: counted in CL only")
    bad = max(record.data.bad_pictures for record in records)
    if bad:
        notes.append(f"{bad} pictures were left out when the dataset was prepared (bench data stats lists them)")
    return tuple(notes)
