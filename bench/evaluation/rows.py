"""Per-sample rows of an evaluation. Every metric is computed from them. They are stored as Parquet beside each record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bench.io import atomic_file

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_ATTENTION, _MEASURE = "attention_cosine_", "measure_"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One cell's samples, N of them, in the order of the split. Cosines are NaN where ``au_valid`` is False."""

    keys: Sequence[str]
    labels: Ints
    people: Ints
    """Number of the person shown, -1 = unknown."""
    logits: Floats
    """(N, K)."""
    au_valid: npt.NDArray[np.bool_]
    attention_cosines: Mapping[int, Floats]
    """Layer -> (N,)."""
    map_cosines_true: Floats
    """Cosine of the map of the true class."""
    map_cosines_predicted: Floats
    """Cosine of the map of the predicted class with the AU map of the true one."""
    map_ranges_true: Floats | None = None
    """Largest minus smallest value of the raw map of the true class: 0 for a constant map, NaN for a map with NaN or infinite values.
    None in rows of older versions."""
    map_ranges_predicted: Floats | None = None
    measures: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    """Column of an optional measure -> (N,), NaN where a sample does not count; see `bench.evaluation.measures`."""

    @property
    def predicted(self) -> Ints:
        """(N,) class of the largest logit."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)


def write_rows(path: Path, rows: Rows) -> None:
    """Write one Parquet file, atomically."""
    columns: dict[str, Any] = {
        "key": list(rows.keys),
        "label": rows.labels,
        "person": rows.people,
        "predicted": rows.predicted,
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(rows.logits.reshape(-1)), rows.logits.shape[1]),
        "au_valid": rows.au_valid,
        "map_cosine_true": rows.map_cosines_true,
        "map_cosine_predicted": rows.map_cosines_predicted,
        **({} if rows.map_ranges_true is None else {"map_range_true": rows.map_ranges_true}),
        **({} if rows.map_ranges_predicted is None else {"map_range_predicted": rows.map_ranges_predicted}),
        **{f"{_ATTENTION}{layer}": values for layer, values in sorted(rows.attention_cosines.items())},
        **{f"{_MEASURE}{name}": values for name, values in rows.measures.items()},
    }
    with atomic_file(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote.

    Raises:
        ValueError: the file is damaged or has other columns.
    """
    try:
        with path.open("rb") as file:  # given a path, pyarrow takes a name with a colon for an address
            table = pq.read_table(file)
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("key", "logits")}
        logits = table["logits"].combine_chunks()
        return Rows(
            keys=table["key"].to_pylist(),
            labels=columns["label"],
            people=columns.get("person", np.full(len(table), -1)),  # older rows have no such column
            logits=logits.flatten().to_numpy().reshape(len(logits), -1),
            au_valid=columns["au_valid"],
            attention_cosines={int(layer): values for layer, values in _with_prefix(columns, _ATTENTION).items()},
            map_cosines_true=columns["map_cosine_true"],
            map_cosines_predicted=columns["map_cosine_predicted"],
            map_ranges_true=columns.get("map_range_true"),
            map_ranges_predicted=columns.get("map_range_predicted"),
            measures=_with_prefix(columns, _MEASURE),
        )
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path} is not a file of rows: {error}") from error


def _with_prefix(columns: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): values for name, values in columns.items() if name.startswith(prefix)}


def read_columns(path: Path, columns: Sequence[str]) -> Mapping[str, npt.NDArray[Any]]:
    """Read some columns of a file of rows: tables need little of many files.

    Raises:
        ValueError: the file is damaged, or a column is missing (in older rows without the column ``person``, all values are -1).
    """
    try:
        with path.open("rb") as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            table = parquet.read(columns=[name for name in columns if name in names], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a file of rows: {error}") from error
    missing = [name for name in columns if name not in names and name != "person"]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(names)}")
    return {name: table[name].to_numpy() if name in names else np.full(len(table), -1) for name in columns}
