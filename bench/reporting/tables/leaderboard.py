"""Records -> rows of a leaderboard. One set of rows serves every output format."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from bench.data.index import partial_words
from bench.evaluation.statistics import LEVEL, Interval, smallest_gap, t_interval
from bench.matrix import digest
from bench.method import METHODS
from bench.reporting.tables.evidence import METRICS, Column, Judged, Metric, Run, judge
from bench.sweep.record import ProcessFacts, Record, device_name

TITLES: Mapping[Metric, str] = {"cl": "CL", "cam_cos": "CAM-COS", "att_cos": "ATT-COS"}
GUIDANCE = ("none", "au")
PUBLISHED_ORDER = ("cam", "wildcat", "gradcam", "gradcampp", "acol", "prm", "adl", "cutmix", "layercam", "tscam", "apvit")
"""Order of the rows in Table 1 of Belharbi et al., FG 2024."""
GUIDANCE_TITLES: Mapping[str, str] = {"none": "w/o AU", "au": "w/ AU"}
OPTIONAL = ("measures", "measure_samples")
"""Keys of ``evaluation`` that add to a record and change none of its other figures."""
COSTS = (
    "parameters",
    "macs",
    "training_seconds",
    "training_images_per_second",
    "training_peak_memory_bytes",
    "evaluation_images_per_second",
    "map_seconds_per_image",
    "evaluation_peak_memory_bytes",
)
"""What of `Record.cost` tables show."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """One figure over seeds."""

    values: tuple[float, ...]
    judged: Judged | None = None
    """How certain it is and how it stands to the best of its column; None if the samples were not looked at."""

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

    @property
    def interval(self) -> Interval | None:
        """For other seeds: t interval of the mean; None for a single one."""
        return t_interval(self.values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlankMaps:
    """Maps of the true class, over all records of a row, that show no place: each counts as zeros, with the cosine 0."""

    samples: int = 0
    """Maps that were looked at; records of older versions do not say."""
    constant: int = 0
    """Of one value throughout, such as what a ReLU leaves of negative evidence."""
    not_finite: int = 0
    """With NaN or infinite values; in the variant ``official`` alone, elsewhere there is no record of such maps."""

    @property
    def mark(self) -> str:
        """Beside a row, ``[12 of 770 maps constant]``; empty where there is none."""
        kinds = {"constant": self.constant, "not finite": self.not_finite}
        counts = [f"{count} of {self.samples} maps {what}" for what, count in kinds.items() if count]
        return f"[{', '.join(counts)}]" if counts else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one backbone: its figures without and with guidance."""

    method: str
    backbone: str
    title: str
    stats: Mapping[tuple[Metric, str], Stat]
    """(metric, guidance) -> figure; absent where there is no record."""
    keys: tuple[str, ...] = ()
    """Keys of the records behind it, sorted."""
    measures: Mapping[tuple[str, str], Stat] = dataclasses.field(default_factory=dict)
    """(optional measure, guidance) -> its macro mean, where the records have it."""
    costs: Mapping[tuple[str, str], Stat] = dataclasses.field(default_factory=dict)
    """(one of `COSTS`, guidance) -> figure, where the records have it."""
    verified: bool = False
    """Whether every record behind it was evaluated again from its weights; else its figures are self-reported."""
    batch_dependent: bool = False
    """Whether a record behind it gave other logits or maps in other batches: such a row is not judged or ranked."""
    process_counts: tuple[int, ...] = ()
    """Numbers of processes of its trainings, where their weights depend on it; ascending."""
    process_causes: tuple[str, ...] = ()
    """Why they do, in words."""

    blank_maps: BlankMaps = BlankMaps()
    """Maps of its records that show no place."""

    @property
    def spread(self) -> str:
        """The numbers of processes as a mark, ``[2 processes]``, ``[1 and 2 processes]``; empty where they are all one, or no matter."""
        if self.process_counts in ((), (1,)):
            return ""
        return f"[{' and '.join(map(str, self.process_counts))} processes]"

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
    entry: str
    """Registered dataset behind it."""
    au_maps: str
    """Geometry of the AU maps of the cosines."""
    hardware: tuple[str, ...]
    """What the rows were computed on, each once."""
    test_samples: int
    partial: bool
    """Whether the dataset was prepared from fewer, or more, pictures than were published."""
    resolution: str
    """What the test split can and cannot tell apart, in a sentence; empty if the samples were not looked at."""
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    ambiguous: bool = False
    """Whether there is another table of other data with this name."""

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
    """Group runs into tables of comparable rows, average over seeds, and judge the rows where all runs of a table have their samples.

    Raises:
        ValueError: two records claim the same cell and seed.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    latest, outdated = latest_code(runs, lambda run: run.record)
    for run in fullest(latest, lambda run: run.record):
        groups.setdefault(comparable(run.record), []).append(run)
    old: dict[tuple[str, ...], Counter[str]] = {}
    for run in outdated:
        old.setdefault(comparable(run.record), Counter())[run.record.cell.method] += 1
    tables = [_table(key, group, outdated=old.get(key, Counter())) for key, group in sorted(groups.items())]
    twins = Counter(name for name, _ in {(table.dataset, table.fingerprint) for table in tables})
    return tuple(dataclasses.replace(table, ambiguous=twins[table.dataset] > 1) for table in tables)


_T = TypeVar("_T")


def latest_code(found: Iterable[_T], record_of: Callable[[_T], Record]) -> tuple[list[_T], list[_T]]:
    """Records of entries that do not come with this program, and were changed: those of the code that ran last, and the others."""
    holders = list(found)
    if not any(record_of(holder).keyed_code for holder in holders):  # most tables: no key need be computed
        return holders, []
    kept: list[_T] = []
    outdated: list[_T] = []
    same: dict[str, list[_T]] = {}
    for holder in holders:
        cell = record_of(holder).as_cell
        bare = dataclasses.replace(cell, code={}, training=dataclasses.replace(cell.training, code={}, seed=0))
        same.setdefault(bare.key, []).append(holder)
    for group in same.values():
        newest = max(map(record_of, group), key=lambda record: record.finished).keyed_code
        for holder in group:
            (kept if record_of(holder).keyed_code == newest else outdated).append(holder)
    return kept, outdated


def fullest(found: Iterable[_T], record_of: Callable[[_T], Record]) -> list[_T]:
    """Of records that differ in their optional measures only: the one with most of them, the latest if there are several."""
    same: dict[str, list[_T]] = {}
    for one in found:
        record = record_of(one)
        identity = [record.training_key, record.cell.method, record.cell.guidance, record.method_options, essential(record.evaluation)]
        same.setdefault(digest(identity), []).append(one)
    kept = []
    for group in same.values():
        records = [record_of(one) for one in group]
        best = max(records, key=lambda record: (len(record.evaluation.get("measures", ())), record.finished)).key
        # A record that is there twice is not passed over in silence.
        kept += [one for one, record in zip(group, records, strict=True) if record.key == best]
    return kept


def essential(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that its CL and cosines depend on."""
    return {key: value for key, value in evaluation.items() if key not in OPTIONAL}


def comparable(record: Record) -> tuple[str, ...]:
    """Dataset, fingerprint, protocol, variant and recipe: records of equal ones are rows of one table."""
    # The run's settings, not the training's: methods bring some values of their own along and are compared all the same.
    sections = {name: record.config[name] for name in ("train", "augment", "images")}
    train = {key: value for key, value in sections["train"].items() if key != "checkpoint_minutes"}
    recipe = digest([sections | {"train": train}, essential(record.evaluation)])[:8]
    return (record.cell.dataset, record.data.fingerprint, record.protocol, record.variant, recipe)


def _table(key: tuple[str, ...], runs: list[Run], *, outdated: Mapping[str, int]) -> Table:
    dataset, fingerprint, protocol, variant, recipe = key
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        record = run.record
        options = digest([record.method_options, record.training_options, record.backbone_options])
        groups.setdefault((record.cell.method, record.cell.backbone, options), []).append(run)
    drafts = [
        draft
        for (method, backbone, _), group in sorted(groups.items(), key=lambda item: (table_order(item[0][0]), item[0]))
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
            *(f"{count} records of {method} are of other code than its latest, and left out" for method, count in outdated.items()),
        ),
        rows=tuple(rows),
    )


def _judge(drafts: list[_Draft]) -> tuple[Mapping[tuple[int, Column], Judged], str]:
    """Judgements of (row, column), and the sentence about what the split can resolve."""
    columns: dict[Column, dict[int, list[Run]]] = {}
    for number, draft in enumerate(drafts):
        for column, runs in draft.runs.items() if not draft.batch_dependent else ():
            columns.setdefault(column, {})[number] = runs
    judged = [run for rows in columns.values() for runs in rows.values() for run in runs]
    if not judged or any(run.samples is None for run in judged):
        return {}, ""
    found = judge(columns)
    samples = judged[0].record.data.samples
    words = f"{LEVEL:.0%} intervals of one run for other samples: CL ± {100 * found.wilson_half_width:.1f} points (Wilson)"
    if found.discordant is not None:
        gap = smallest_gap(samples, found.discordant)
        words += (
            f"; rows differ in {100 * found.discordant:.0f} % of the samples, so that no gap in CL below {100 * gap:.1f} points can be one "
            f"(exact McNemar, uncorrected); {found.comparisons} comparisons, corrected by Holm"
        )
    if found.clusters < samples:
        words += f"; tests count {found.clusters} people as independent, not {samples} pictures"
    return found.cells, words


def table_order(method: str) -> tuple[int, str]:
    """Where a method stands in a table: the published order first, then by name."""
    return (PUBLISHED_ORDER.index(method) if method in PUBLISHED_ORDER else len(PUBLISHED_ORDER), method)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A row before its figures are averaged and judged."""

    method: str
    backbone: str
    title: str
    members: Mapping[str, list[Run]]
    """Guidance -> all runs."""
    runs: Mapping[Column, list[Run]]
    """Column -> the runs that have a figure there."""

    @property
    def all(self) -> list[Run]:
        """Every run of the row."""
        return [run for runs in self.members.values() for run in runs]

    @property
    def dependent(self) -> list[ProcessFacts]:
        """Of the runs whose weights depend on the number of processes."""
        return [run.record.processes for run in self.all if run.record.processes is not None and run.record.processes.dependent]

    @property
    def batch_dependent(self) -> bool:
        """Whether the invariance check of a run has failed."""
        return any(run.record.invariance is not None and not run.record.invariance["holds"] for run in self.all)


def _drafts(method: str, backbone: str, runs: list[Run]) -> list[_Draft]:
    """One row a guidance setting (weight, layers); runs without guidance stand beside each of them."""
    plain = [run for run in runs if run.record.cell.guidance == "none"]
    guided: dict[str, list[Run]] = {}
    for run in runs:
        if run.record.cell.guidance == "au":
            guided.setdefault(digest(run.record.settings["guidance"]), []).append(run)
    title = METHODS.get(method).info.title if method in METHODS else method
    drafts = []
    for group in guided.values() or [[]]:
        suffix = f" ({_guidance_words(group[0].record)})" if len(guided) > 1 else ""
        members = {"none": plain, "au": group}
        columns: dict[Column, list[Run]] = {}
        for guidance, runs_there in members.items():
            for metric in METRICS:
                usable = [run for run in runs_there if is_finite(run.record, metric)]
                if usable:
                    columns[metric, guidance] = usable
        drafts.append(_Draft(method=method, backbone=backbone, title=title + suffix, members=members, runs=columns))
    return drafts


def _guidance_words(record: Record) -> str:
    setting = record.settings["guidance"]
    return f"weight {setting['weight']:g}, layers {'+'.join(map(str, setting['layers']))}, {setting['au_maps']} AU maps"


def _values(runs: list[Run], metric: Metric) -> tuple[float, ...]:
    twins = same_seed((run.folder, run.record) for run in runs)
    if twins:
        cell = runs[0].record.cell
        where = f": {twins[0]} and {twins[1]}. Move one of them away" if twins[0] else ""
        raise ValueError(f"two records of {cell.dataset}/{cell.method}/{cell.guidance} have the same seed{where}")
    records = sorted((run.record for run in runs), key=lambda record: record.cell.seed)
    values = (figure(record.metrics, metric, layer=record.attention_layer) for record in records)
    return tuple(value for value in values if value is not None)


def same_seed(stored: Iterable[tuple[_T, Record]]) -> tuple[_T, _T] | None:
    """Of records with where they lie: where the first two lie that have a seed in common; None if no two have."""
    there: dict[int, _T] = {}
    for place, record in stored:
        if record.cell.seed in there:
            return there[record.cell.seed], place
        there[record.cell.seed] = place
    return None


def _further(draft: _Draft, read: Callable[[Record], Mapping[str, float]]) -> dict[tuple[str, str], Stat]:
    """(name, guidance) -> figure over seeds, of what the runs have beside the metrics."""
    found: dict[tuple[str, str], list[float]] = {}
    for guidance, runs in draft.members.items():
        for run in sorted(runs, key=lambda run: run.record.cell.seed):
            for name, value in read(run.record).items():
                found.setdefault((name, guidance), []).append(value)
    return {key: Stat(values=tuple(values)) for key, values in found.items()}


def _blank_maps(draft: _Draft) -> BlankMaps:
    counts = [run.record.metrics["maps"]["true"] for run in draft.all if "maps" in run.record.metrics]
    return BlankMaps(**{name: sum(count[name] for count in counts) for name in ("samples", "constant", "not_finite")})


def _measures(record: Record) -> dict[str, float]:
    summaries = record.metrics.get("measures", {})
    return {
        name: float(summary["macro"])
        for name, summary in summaries.items()
        if summary["macro"] is not None and math.isfinite(summary["macro"])
    }


def _costs(record: Record) -> dict[str, float]:
    return {name: float(record.cost[name]) for name in COSTS if record.cost.get(name) is not None}


def _machine(record: Record) -> str:
    """What a record was computed on."""
    facts = record.hardware
    processes = facts.get("processes", 1)
    return f"{device_name(facts)} ({facts.get('device', '?')}{f', {processes} processes' if processes != 1 else ''})"


def is_finite(record: Record, metric: Metric) -> bool:
    value = figure(record.metrics, metric, layer=record.attention_layer)
    return value is not None and math.isfinite(value)


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
    partial = partial_words(records[0].data.provenance)
    if partial:
        notes.append(f"partial data, not the published pictures: {partial}; not comparable with other tables of this dataset")
    bad = max(record.data.bad_pictures for record in records)
    if bad:
        notes.append(f"{bad} pictures were left out when the dataset was prepared (bench data stats lists them)")
    return tuple(notes)
