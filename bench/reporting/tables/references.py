"""Published figures to show beside ours: recorded as printed, with the conditions of their making, never mixed with ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bench.registry import did_you_mean
from bench.reporting.tables.evidence import Column, Metric
from bench.reporting.tables.leaderboard import Table

PACKAGE = "bench.references"
SUFFIX = ".json"


class Reference(BaseModel):
    """A published table. CL is in percent, as printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1]
    aliases: tuple[str, ...] = ()
    """Further names, besides that of the file."""
    title: str
    source: str
    arxiv: str = ""
    table: str
    status: Literal["unverified", "verified"]
    """Whether anybody has reproduced the figures."""
    protocol: Literal["val", "test-selected"]
    variant: Literal["paper", "official"]
    au_maps: Literal["official", "symmetric"]
    """Geometry of the AU maps that the cosines use."""
    runs_per_cell: int
    notes: tuple[str, ...] = ()
    backbones: Mapping[str, str]
    """Method -> its backbone."""
    columns: tuple[tuple[Metric, Literal["none", "au"]], ...]
    """(metric, guidance) of each figure of a row."""
    figures: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    """Registered dataset -> method -> figures; None for a figure that the source does not give."""

    @model_validator(mode="after")
    def _whole(self) -> Reference:
        for dataset, rows in self.figures.items():
            for method, row in rows.items():
                if len(row) != len(self.columns):
                    raise ValueError(f"figures.{dataset}.{method} has {len(row)} figures for {len(self.columns)} columns")
                if method not in self.backbones:
                    raise ValueError(f"figures.{dataset}.{method}: its backbone is missing: add {method} to backbones")
        return self

    @property
    def words(self) -> str:
        """Source and conditions of the figures, in a line."""
        runs = "one run per cell" if self.runs_per_cell == 1 else f"{self.runs_per_cell} runs per cell"
        where = f" (arXiv {self.arxiv})" if self.arxiv else ""
        made = f"{self.protocol}, {runs}, variant {self.variant}, {self.au_maps} AU maps"
        return f"{self.title}{where}: {self.status}, {made}; not measured here"

    def figure(self, entry: str, method: str, column: Column) -> float | None:
        """The reported figure, CL as a share like ours; None if there is none."""
        row = self.figures.get(entry, {}).get(method)
        if row is None or column not in self.columns:
            return None
        value = row[self.columns.index(column)]
        return value / 100 if value is not None and column[0] == "cl" else value


def load_reference(name: str) -> Reference:
    """Load a reference of the package by its name or an alias, or a reference of the user by the path of its file.

    Raises:
        ValueError: the name is unknown (a similar one is proposed), or the file is not a reference.
    """
    if name.endswith(SUFFIX):
        return _read(Path(name))
    known: dict[str, Reference] = {}
    for file in files(PACKAGE).iterdir():
        if file.name.endswith(SUFFIX):
            reference = _read(file)
            known |= dict.fromkeys((file.name.removesuffix(SUFFIX), *reference.aliases), reference)
    if name not in known:
        raise ValueError(f"--reference {name}: unknown reference.{did_you_mean(name, known)} Or give the path of a {SUFFIX} file")
    return known[name]


def _read(file: Path | Traversable) -> Reference:
    try:
        return Reference.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ValueError(f"--reference {file}: {error.strerror}. Give the path of a reference, or --reference paper") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise ValueError(f"{file} is not a reference: {problem}") from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A published figure beside one of ours."""

    value: float
    """CL is a share, like ours."""
    difference: float
    """Our mean minus the published figure."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The part of a reference that applies to a table."""

    figures: Mapping[tuple[int, Column], Reported]
    """(row, column) -> figure."""
    words: str
    """Source, conditions, and how they differ from those of the table; or why no figure applies."""


def beside(table: Table, reference: Reference) -> Beside:
    """The published figures for the rows of a table with the same dataset, method and backbone."""
    figures: dict[tuple[int, Column], Reported] = {}
    for number, row in enumerate(table.rows):
        if reference.backbones.get(row.method) != row.backbone:
            continue
        for column, stat in row.stats.items():
            value = reference.figure(table.entry, row.method, column)
            if value is not None:
                figures[number, column] = Reported(value=value, difference=stat.mean - value)
    return Beside(figures=figures, words=_applies(table, reference) if figures else _why_not(table, reference))


def _applies(table: Table, reference: Reference) -> str:
    differing = [
        f"{name} {here} here"
        for name, here, published in (
            ("protocol", table.protocol, reference.protocol),
            ("variant", table.variant, reference.variant),
            ("AU maps", table.au_maps, reference.au_maps),
        )
        if here != published
    ]
    differing += ["partial data here"] if table.partial else []
    against = f". Not made alike: {', '.join(differing)}" if differing else ""
    return f"Reported: {reference.words}{against}"


def _why_not(table: Table, reference: Reference) -> str:
    about = f"No figure of {reference.title} applies to this table"
    rows = reference.figures.get(table.entry)
    if rows is None:
        return f"{about}: it is about {', '.join(reference.figures)}, not {table.entry}"
    shared = [row for row in table.rows if row.method in rows]
    if not shared:
        return f"{about}: it has none of these methods"
    published = dict.fromkeys(reference.backbones[row.method] for row in shared)
    return f"{about}: its figures are of {', '.join(published)}, not {', '.join(dict.fromkeys(row.backbone for row in shared))}"
