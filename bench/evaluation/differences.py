"""How far two tables of the same samples are apart, column by column."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

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
    found: str


def compare_rows(recorded: Rows, found: Rows, *, shared_only: bool = False) -> Iterator[Difference]:
    """The columns of two tables of the same samples in the same order, each with its largest difference.

    Args:
        recorded: as written.
        found: as found again.
        shared_only: only what all methods of a training share: logits and layer attention.
    """
    scale = max(1.0, float(np.abs(found.logits).max(initial=0)))
    yield _difference("logits", recorded, recorded.logits, found.logits, scale=scale)
    nothing = np.full(len(recorded.keys), np.nan, dtype=np.float32)
    for layer in sorted(recorded.attention_cosines.keys() | found.attention_cosines.keys()):
        pair = (rows.attention_cosines.get(layer, nothing) for rows in (recorded, found))
        yield _difference(f"attention_cosine_{layer}", recorded, *pair)
    if shared_only:
        return
    yield _difference("label", recorded, recorded.labels, found.labels)
    yield _difference("au_valid", recorded, recorded.au_valid, found.au_valid)
    yield _difference("map_cosine_true", recorded, recorded.map_cosines_true, found.map_cosines_true)
    yield _difference("map_cosine_predicted", recorded, recorded.map_cosines_predicted, found.map_cosines_predicted)
    for name in sorted(recorded.measures.keys() | found.measures.keys()):
        yield _difference(f"measure_{name}", recorded, recorded.measures.get(name, nothing), found.measures.get(name, nothing))


def _difference(column: str, rows: Rows, recorded: npt.NDArray[Any], found: npt.NDArray[Any], *, scale: float = 1.0) -> Difference:
    a, b = recorded.astype(np.float64), found.astype(np.float64)
    if a.shape != b.shape:
        return Difference(column=column, largest=float("inf"), key="", recorded=f"shape {a.shape}", found=f"shape {b.shape}")
    gaps = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b) / scale)
    gaps = np.nan_to_num(gaps, nan=np.inf).reshape(len(a), -1)
    sample, place = divmod(int(gaps.argmax()), gaps.shape[1])
    return Difference(
        column=column,
        largest=float(gaps[sample, place]),
        key=rows.keys[sample],
        recorded=str(recorded.reshape(len(a), -1)[sample, place]),
        found=str(found.reshape(len(a), -1)[sample, place]),
    )
