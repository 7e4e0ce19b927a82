"""From records to the rows of a leaderboard. One set of rows serves every output format."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from bench.data.index import partial_words
from bench.evaluation.statistics import LEVEL, Interval, smallest_gap, t_interval
from bench.matrix import digest
from bench.method import METHODS
from bench.reporting.tables.evidence import METRICS, Column, Judged, Metric, Run, grouped, judge
from bench.sweep.record import ProcessFacts, Record, device_name

TITLES: Mapping[Metric, str] = {"cl": "CL", "cam_cos": "CAM-COS", "att_cos": "ATT-COS"}
GUIDANCE = ("none", "au")
PUBLISHED_ORDER = ("cam", "wildcat", "gradcam", "gradcampp", "acol", "prm", "adl", "cutmix", "layercam", "tscam", "apvit")
"""Order of the rows in Table 1 of Belharbi et al., FG 2024."""
GUIDANCE_TITLES: Mapping[str, str] = {"none": "w/o AU", "au": "w/ AU"}
FIGURES: tuple[Column, ...] = tuple(itertools.product(METRICS, GUIDANCE))
"""The columns of a leaderboard."""
OPTIONAL = ("measures", "measure_samples")
"""Keys of a record's ``evaluation`` that add measures and change no other figure."""


class Unit(NamedTuple):
    """How a further figure is shown."""

    title: str
    unit: str
    scale: float
    digits: int


COSTS: Mapping[str, Unit] = {
    "parameters": Unit("Parameters", "M", 1e-6, 2),
    "macs": Unit("MACs", "G", 1e-9, 3),
    "training_seconds": Unit("Training", "min", 1 / 60, 2),
    "training_images_per_second": Unit("Training", "images/s", 1, 0),
    "training_peak_memory_bytes": Unit("Training", "peak GiB", 2**-30, 2),
    "evaluation_images_per_second": Unit("Shared evaluation", "images/s", 1, 0),
    "map_seconds_per_image": Unit("Map", "ms/image", 1e3, 2),
    "evaluation_peak_memory_bytes": Unit("Evaluation", "peak GiB", 2**-30, 2),
}
"""Keys of `Record.cost` that tables show."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """One figure over seeds."""

    values: tuple[float, ...]
    judged: Judged | None = None
    """How certain it is, and how it compares with the best of its column; None if the samples were not read."""

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
        """Standard deviation over seeds with ddof = 1; None for a single seed."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def interval(self) -> Interval | None:
        """Student's interval of the mean over seeds; None for a single seed."""
        return t_interval(self.values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlankMaps:
    """Maps of the true class that point nowhere, over all records of a row. Each counts as all zeros, with cosine 0."""

    samples: int = 0
    """Maps that were examined. Records of older versions do not count them."""
    constant: int = 0
    """Maps of a single value, such as what a ReLU leaves of negative evidence."""
    not_finite: int = 0
    """Maps with NaN or infinite values. Only the variant ``official`` keeps records of such maps."""

    @property
    def mark(self) -> str:
        """The note beside a row, ``[12 of 770 maps constant]``; empty if there is no such map."""
        kinds = {"constant": self.constant, "not finite": self.not_finite}
        counts = [f"{count} of {self.samples} maps {kind}" for kind, count in kinds.items() if count]
        return f"[{', '.join(counts)}]" if counts else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one backbone: its figures without and with guidance."""

    method: str
    backbone: str
    title: str
    stats: Mapping[tuple[Metric, str], Stat]
    """(metric, guidance) -> figure; a pair without a record is absent."""
    keys: tuple[str, ...] = ()
    """Keys of its records, sorted."""
    measures: Mapping[tuple[str, str], Stat] = dataclasses.field(default_factory=dict)
    """(optional measure, guidance) -> macro mean, if the records have it."""
    costs: Mapping[tuple[str, str], Stat] = dataclasses.field(default_factory=dict)
    """(key of `COSTS`, guidance) -> figure, if the records have it."""
    verified: bool = False
    """Whether the weights of every record were evaluated again; else its figures are self-reported."""
    batch_dependent: bool = False
    """Whether logits or maps of a record changed with the batch. Such a row is neither tested nor ranked."""
    process_counts: tuple[int, ...] = ()
    """Numbers of processes of its trainings if their weights depend on it, ascending."""
    process_causes: tuple[str, ...] = ()
    """Why the weights depend on it, in words."""
    blank_maps: BlankMaps = BlankMaps()

    @property
    def spread(self) -> str:
        """The note about processes, ``[1 and 2 processes]``; empty if the weights do not depend on it, or all trainings had one."""
        if self.process_counts in ((), (1,)):
            return ""
        return f"[{' and '.join(map(str, self.process_counts))} processes]"

    @property
    def seeds(self) -> str:
        """Number of seeds, ``3``, or ``3/2`` if guidance none and au differ."""
        counts = [max((stat.n for (_, g), stat in self.stats.items() if g == guidance), default=0) for guidance in GUIDANCE]
        shown = sorted({count for count in counts if count}, reverse=True)
        return str(shown[0]) if len(shown) == 1 else f"{counts[0]}/{counts[1]}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Comparable rows: one dataset, protocol, variant, evaluation and recipe. Each row names its backbone."""

    dataset: str
    fingerprint: str
    protocol: str
    variant: str
    recipe: str
    """Hash of the training settings of the run, the same for all rows. Methods may override some of them."""
    entry: str
    """Name of the registered dataset."""
    au_maps: str
    """Geometry of the AU maps that the cosines use."""
    hardware: tuple[str, ...]
    """Machines the rows were computed on, each once."""
    test_samples: int
    partial: bool
    """Whether the dataset was prepared from fewer or more pictures than were published."""
    resolution: str
    """Which differences the test split can detect, in a sentence; empty if the samples were not read."""
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    ambiguous: bool = False
    """Whether a second table has the same dataset name and other data."""

    @property
    def title(self) -> str:
        """Heading of the table."""
        name = f"{self.dataset}@{self.fingerprint[:8]}" if self.ambiguous else self.dataset
        data = f"{name} (partial data)" if self.partial else name
        return f"{data}, {', '.join(self.backbones)}, protocol {self.protocol}, variant {self.variant}"

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones of the rows, each once, in order."""
        return tuple(dict.fromkeys(row.backbone for row in self.rows))


def build_tables(runs: Iterable[Run]) -> tuple[Table, ...]:
    """Group runs into tables of comparable rows, average over seeds, and test the rows if all runs of a table have their samples.

    Raises:
        ValueError: two records have the same cell and seed.
    """
    latest, outdated = _latest_code(list(runs))
    groups = grouped(fullest(latest), lambda run: comparable(run.record))
    old = grouped(outdated, lambda run: comparable(run.record))
    tables = [
        _table(key, group, outdated=Counter(run.record.cell.method for run in old.get(key, ()))) for key, group in sorted(groups.items())
    ]
    twins = Counter(name for name, _ in {(table.dataset, table.fingerprint) for table in tables})
    return tuple(dataclasses.replace(table, ambiguous=twins[table.dataset] > 1) for table in tables)


def _latest_code(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Split the records of entries from outside this program into those of the code that ran last, and those of older code."""
    if not any(run.record.keyed_code for run in runs):  # most tables: no key has to be computed
        return runs, []

    def without_code(run: Run) -> str:
        cell = run.record.as_cell
        return dataclasses.replace(cell, code={}, training=dataclasses.replace(cell.training, code={}, seed=0)).key

    kept: list[Run] = []
    outdated: list[Run] = []
    for group in grouped(runs, without_code).values():
        newest = max((run.record for run in group), key=lambda record: record.finished).keyed_code
        for run in group:
            (kept if run.record.keyed_code == newest else outdated).append(run)
    return kept, outdated


def fullest(runs: Iterable[Run]) -> list[Run]:
    """Of records that differ in their optional measures only, keep the record with most measures, and the latest of several."""

    def identity(run: Run) -> str:
        record = run.record
        options = record.method_options
        return digest([record.training_key, record.cell.method, record.cell.guidance, options, essential(record.evaluation)])

    kept = []
    for group in grouped(runs, identity).values():
        records = (run.record for run in group)
        best = max(records, key=lambda record: (len(record.evaluation.get("measures", ())), record.finished)).key
        # Copies of one record are all kept, so that they are reported as an error later.
        kept += [run for run in group if run.record.key == best]
    return kept


def essential(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation on which CL and cosines depend."""
    return {key: value for key, value in evaluation.items() if key not in OPTIONAL}


def comparable(record: Record) -> tuple[str, ...]:
    """Dataset, fingerprint, protocol, variant and recipe. Records in which all are equal share a table."""
    # The settings of the run, not of the training: methods that override some values are still compared.
    sections = {name: record.config[name] for name in ("train", "augment", "images")}
    train = {key: value for key, value in sections["train"].items() if key != "checkpoint_minutes"}
    recipe = digest([sections | {"train": train}, essential(record.evaluation)])[:8]
    return (record.cell.dataset, record.data.fingerprint, record.protocol, record.variant, recipe)


def _table(key: tuple[str, ...], runs: list[Run], *, outdated: Mapping[str, int]) -> Table:
    dataset, fingerprint, protocol, variant, recipe = key

    def row_key(run: Run) -> tuple[str, str, str]:
        record = run.record
        options = digest([record.method_options, record.training_options, record.backbone_options])
        return record.cell.method, record.cell.backbone, options

    drafts = [
        draft
        for (method, backbone, _), group in sorted(grouped(runs, row_key).items(), key=lambda item: (table_order(item[0][0]), item[0]))
        for draft in _drafts(method, backbone, group)
    ]
    judged, resolution = _judge(drafts)
    rows = [
        Row(
            method=draft.method,
            backbone=draft.backbone,
            title=draft.title,
            stats={
                (metric, guidance): Stat(values=_values(group, metric), judged=judged.get((number, (metric, guidance))))
                for (metric, guidance), group in draft.runs.items()
            },
            keys=tuple(sorted({run.record.key for run in draft.all})),
            measures=_further(draft, _measures),
            costs=_further(draft, _costs),
            verified=all(run.verified for run in draft.all),
            batch_dependent=draft.batch_dependent,
            process_counts=tuple(sorted({count for facts in draft.dependent for count in facts.counts})),
            process_causes=tuple(dict.fromkeys(cause for facts in draft.dependent for cause in facts.dependent)),
            blank_maps=_blank_maps(draft),
        )
        for number, draft in enumerate(drafts)
    ]
    records = [run.record for run in runs]
    return Table(
        dataset=dataset,
        fingerprint=fingerprint,
        protocol=protocol,
        variant=variant,
        recipe=recipe,
        entry=records[0].data.entry,
        au_maps=records[0].evaluation.get("au_maps", ""),
        hardware=tuple(sorted({_machine(record) for record in records})),
        test_samples=records[0].data.samples,
        partial=bool(records[0].data.provenance.get("partial")),
        resolution=resolution,
        notes=(
            *_notes(records),
            *(f"{count} records of {method} were left out: they are not of its latest code" for method, count in outdated.items()),
        ),
        rows=tuple(rows),
    )


def _judge(drafts: list[_Draft]) -> tuple[Mapping[tuple[int, Column], Judged], str]:
    """Judgements of (row, column), and a sentence about the differences that the split can detect."""
    columns: dict[Column, dict[int, list[Run]]] = {}
    for number, draft in enumerate(drafts):
        for column, runs in draft.runs.items() if not draft.batch_dependent else ():
            columns.setdefault(column, {})[number] = runs
    judged = [run for rows in columns.values() for runs in rows.values() for run in runs]
    if not judged or any(run.samples is None for run in judged):
        return {}, ""
    judgement = judge(columns)
    samples = judged[0].record.data.samples
    words = f"{LEVEL:.0%} intervals of one run for other samples: CL ± {100 * judgement.wilson_half_width:.1f} points (Wilson)"
    if judgement.discordant is not None:
        gap = smallest_gap(samples, judgement.discordant)
        words += (
            f"; two rows disagree on {100 * judgement.discordant:.0f} % of the samples (median), so no gap in CL below {100 * gap:.1f} "
            f"points can be significant (exact McNemar, uncorrected); {judgement.comparisons} comparisons, corrected by Holm"
        )
    if judgement.clusters < samples:
        words += f"; tests count {judgement.clusters} people as independent, not {samples} pictures"
    return judgement.cells, words


def table_order(method: str) -> tuple[int, str]:
    """Sort key of a method: the published order first, then by name."""
    return (PUBLISHED_ORDER.index(method) if method in PUBLISHED_ORDER else len(PUBLISHED_ORDER), method)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A row before its figures are averaged and tested."""

    method: str
    backbone: str
    title: str
    members: Mapping[str, list[Run]]
    """Guidance -> all runs."""
    runs: Mapping[Column, list[Run]]
    """Column -> the runs that have a figure in it."""

    @property
    def all(self) -> list[Run]:
        """Every run of the row."""
        return [run for runs in self.members.values() for run in runs]

    @property
    def dependent(self) -> list[ProcessFacts]:
        """Facts of the runs whose weights depend on the number of processes."""
        return [run.record.processes for run in self.all if run.record.processes is not None and run.record.processes.dependent]

    @property
    def batch_dependent(self) -> bool:
        """Whether the invariance check of a run has failed."""
        return any(run.record.invariance is not None and not run.record.invariance["holds"] for run in self.all)


def _drafts(method: str, backbone: str, runs: list[Run]) -> list[_Draft]:
    """One row for each guidance setting (weight, layers); every such row includes the runs without guidance."""
    plain = [run for run in runs if run.record.cell.guidance == "none"]
    guided = grouped((run for run in runs if run.record.cell.guidance == "au"), lambda run: digest(run.record.settings["guidance"]))
    title = METHODS.get(method).info.title if method in METHODS else method
    drafts = []
    for group in guided.values() or [[]]:
        suffix = f" ({_guidance_words(group[0].record)})" if len(guided) > 1 else ""
        members = {"none": plain, "au": group}
        columns: dict[Column, list[Run]] = {}
        for guidance, metric in itertools.product(members, METRICS):
            usable = [run for run in members[guidance] if figure(run.record, metric) is not None]
            if usable:
                columns[metric, guidance] = usable
        drafts.append(_Draft(method=method, backbone=backbone, title=title + suffix, members=members, runs=columns))
    return drafts


def _guidance_words(record: Record) -> str:
    setting = record.settings["guidance"]
    return f"weight {setting['weight']:g}, layers {'+'.join(map(str, setting['layers']))}, {setting['au_maps']} AU maps"


def _values(runs: list[Run], metric: Metric) -> tuple[float, ...]:
    twins = same_seed(runs)
    if twins:
        cell = runs[0].record.cell
        where = f": {twins[0].folder} and {twins[1].folder}. Move one of them away" if twins[0].folder else ""
        raise ValueError(f"two records of {cell.dataset}/{cell.method}/{cell.guidance} have the same seed{where}")
    values = (figure(run.record, metric) for run in sorted(runs, key=lambda run: run.record.cell.seed))
    return tuple(value for value in values if value is not None)


def same_seed(runs: Iterable[Run]) -> tuple[Run, Run] | None:
    """The first two runs with the same seed; None if all seeds differ."""
    by_seed: dict[int, Run] = {}
    for run in runs:
        if run.record.cell.seed in by_seed:
            return by_seed[run.record.cell.seed], run
        by_seed[run.record.cell.seed] = run
    return None


def _further(draft: _Draft, read: Callable[[Record], Mapping[str, float]]) -> dict[tuple[str, str], Stat]:
    """(name, guidance) -> figure over seeds, of what ``read`` takes from each record."""
    values: dict[tuple[str, str], list[float]] = {}
    for guidance, runs in draft.members.items():
        for run in sorted(runs, key=lambda run: run.record.cell.seed):
            for name, value in read(run.record).items():
                values.setdefault((name, guidance), []).append(value)
    return {key: Stat(values=tuple(numbers)) for key, numbers in values.items()}


def _blank_maps(draft: _Draft) -> BlankMaps:
    counts = [run.record.metrics["maps"]["true"] for run in draft.all if "maps" in run.record.metrics]
    return BlankMaps(**{name: sum(count[name] for count in counts) for name in ("samples", "constant", "not_finite")})


def _measures(record: Record) -> dict[str, float]:
    means = {name: summary["macro"] for name, summary in record.metrics.get("measures", {}).items()}
    return {name: float(mean) for name, mean in means.items() if mean is not None and math.isfinite(mean)}


def _costs(record: Record) -> dict[str, float]:
    return {name: float(record.cost[name]) for name in COSTS if record.cost.get(name) is not None}


def _machine(record: Record) -> str:
    """The machine a record was computed on."""
    facts = record.hardware
    processes = facts.get("processes", 1)
    return f"{device_name(facts)} ({facts.get('device', '?')}{f', {processes} processes' if processes != 1 else ''})"


def figure(record: Record, metric: Metric) -> float | None:
    """The headline figure of a record: accuracy, CAM-COS of the true class, or ATT-COS of the layer, the cosines macro over expressions.

    None if the record has none, or it is not finite.
    """
    metrics = record.metrics
    if metric == "cl":
        return float(metrics["cl"]["accuracy"])
    value = (metrics["cam_cos"]["true"] if metric == "cam_cos" else metrics["att_cos"][str(record.attention_layer)])["macro"]
    return float(value) if value is not None and math.isfinite(value) else None


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
    summary = records[0].metrics["cam_cos"]["true"]
    if summary["missing_classes"]:
        notes.append(f"no test sample of {', '.join(summary['missing_classes'])} has an AU map: left out of the macro means")
    if summary["without_map"]:
        notes.append(f"{summary['without_map']} test samples of an expression have no AU map: counted in CL only")
    partial = partial_words(records[0].data.provenance)
    if partial:
        notes.append(f"partial data, not the published pictures: {partial}; not comparable with other tables of this dataset")
    bad = max(record.data.bad_pictures for record in records)
    if bad:
        notes.append(f"{bad} pictures were left out when the dataset was prepared (bench data stats lists them)")
    return tuple(notes)
