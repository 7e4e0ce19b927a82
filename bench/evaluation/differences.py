"""How far two tables of the same samples are apart, column by column."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.evaluation.metrics import macro
from bench.evaluation.rows import Rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of one column of two tables of the same samples: where it is largest."""

    column: str
    largest: float
    """Infinite where one of the two has no number."""
    key: str
    """The sample."""
    recorded: str
    actual: str
    gaps: npt.NDArray[np.float64]
    """(N,) of each sample."""
    shift: float
    """Of the mean over classes of the class means, as `bench.evaluation.metrics` forms it."""
    of_map: bool
    """Whether a read-out's map is behind it."""

    def beyond(self, tolerance: float) -> int:
        """Samples that differ by more."""
        return int((self.gaps > tolerance).sum())


def compare_rows(recorded: Rows, actual: Rows, *, shared_only: bool = False) -> Iterator[Difference]:
    """The columns of two tables of the same samples in the same order, each with its largest difference.

    Args:
        recorded: as written.
        actual: as evaluated again.
        shared_only: only what all methods of a training share: logits and layer attention.
    """
    scale = max(1.0, float(np.abs(actual.logits).max(initial=0)))
    yield _difference("logits", recorded, recorded.logits, actual.logits, scale=scale)
    nothing = np.full(len(recorded.keys), np.nan, dtype=np.float32)
    for layer in sorted(recorded.attention_cosines.keys() | actual.attention_cosines.keys()):
        pair = (rows.attention_cosines.get(layer, nothing) for rows in (recorded, actual))
        yield _difference(f"attention_cosine_{layer}", recorded, *pair)
    if shared_only:
        return
    yield _difference("label", recorded, recorded.labels, actual.labels)
    yield _difference("au_valid", recorded, recorded.au_valid, actual.au_valid)
    yield _difference("map_cosine_true", recorded, recorded.map_cosines_true, actual.map_cosines_true)
    yield _difference("map_cosine_predicted", recorded, recorded.map_cosines_predicted, actual.map_cosines_predicted)
    for name in sorted(recorded.measures.keys() | actual.measures.keys()):
        yield _difference(f"measure_{name}", recorded, recorded.measures.get(name, nothing), actual.measures.get(name, nothing))


def _difference(column: str, rows: Rows, recorded: npt.NDArray[Any], actual: npt.NDArray[Any], *, scale: float = 1.0) -> Difference:
    a, b = recorded.astype(np.float64), actual.astype(np.float64)
    of_map = column.startswith(("map_", "measure_"))
    if a.shape != b.shape:
        shapes = {"recorded": f"shape {a.shape}", "found": f"shape {b.shape}"}
        gaps = np.full(len(rows.keys), np.inf)
        return Difference(column=column, largest=math.inf, key="", **shapes, gaps=gaps, shift=math.inf, of_map=of_map)
    both = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b) / scale)
    both = np.nan_to_num(both, nan=np.inf).reshape(len(a), -1)
    sample, place = divmod(int(both.argmax()), both.shape[1])
    return Difference(
        column=column,
        largest=float(both[sample, place]),
        key=rows.keys[sample],
        recorded=str(recorded.reshape(len(a), -1)[sample, place]),
        actual=str(actual.reshape(len(a), -1)[sample, place]),
        gaps=both.max(axis=1),
        shift=_shift(a - b, rows.labels) if a.ndim == 1 else math.inf,
        of_map=of_map,
    )


def _shift(differences: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """Of the macro mean, over the samples (N,) that are numbers; 0 if none is."""
    counted = ~np.isnan(differences)
    return abs(float(macro(differences[None], labels, counted=counted)[0])) if counted.any() else 0.0
