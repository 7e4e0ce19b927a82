"""Metrics of a cell, all computed from its rows: CL, CAM-COS, ATT-COS, each with the number of samples behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.evaluation.rows import Floats, Ints, Rows


def compute_metrics(rows: Rows, *, classes: Sequence[str], expressive: Sequence[bool]) -> dict[str, Any]:
    """All metrics, JSON-able.

    Args:
        rows: the samples.
        classes: class names.
        expressive: per class, whether it is an expression with an AU map (all but neutral and unknown names).

    Returns:
        ``cl``: ``accuracy``, ``class_mean``, ``samples``, ``per_class``, ``confusion`` (row = true class);
        ``cam_cos``: ``true`` and ``predicted``, see `_cosine_summary`; ``att_cos``: layer -> the same;
        ``maps``, where the rows have the ranges of the maps: ``true`` and ``predicted``, see `_map_counts`;
        ``measures``, where the rows have optional measures: column -> see `_class_means`.
    """
    metrics = {
        "cl": _accuracy(rows.labels, rows.predicted, classes),
        "cam_cos": {
            "true": _cosine_summary(rows.map_cosines_true, rows, classes, expressive),
            "predicted": _cosine_summary(rows.map_cosines_predicted, rows, classes, expressive),
        },
        "att_cos": {
            str(layer): _cosine_summary(values, rows, classes, expressive) for layer, values in sorted(rows.attention_cosines.items())
        },
    }
    ranges = {"true": rows.map_ranges_true, "predicted": rows.map_ranges_predicted}
    if counts := {name: _map_counts(values) for name, values in ranges.items() if values is not None}:
        metrics["maps"] = counts
    if rows.measures:
        every_class = dict(enumerate(classes))
        metrics["measures"] = {
            name: _class_means(values, rows.labels, every_class, counted=~np.isnan(values)) for name, values in rows.measures.items()
        }
    return metrics


def _accuracy(labels: Ints, predicted: Ints, classes: Sequence[str]) -> dict[str, Any]:
    count = len(classes)
    confusion = np.bincount(labels * count + predicted, minlength=count * count).reshape(count, count)
    totals, hits = confusion.sum(axis=1), confusion.diagonal()
    per_class = {
        name: {"samples": int(n), "accuracy": float(h / n) if n else None} for name, n, h in zip(classes, totals, hits, strict=True)
    }
    present = totals > 0
    return {
        "accuracy": float(hits.sum() / totals.sum()),
        "class_mean": float((hits[present] / totals[present]).mean()),
        "samples": int(totals.sum()),
        "per_class": per_class,
        "missing_classes": [name for name, n in zip(classes, totals, strict=True) if n == 0],
        "confusion": confusion.tolist(),
    }


def _cosine_summary(values: Floats, rows: Rows, classes: Sequence[str], expressive: Sequence[bool]) -> dict[str, Any]:
    """Mean per expression over samples with an AU map, then the plain mean over the expressions.

    An expression without such a sample is left out of ``macro`` and listed in ``missing_classes``; the published code averages
    a -1 in. ``without_map`` counts samples of expressions whose face gave no AU map.
    """
    expressions = {label: name for label, name in enumerate(classes) if expressive[label]}
    summary = _class_means(values, rows.labels, expressions, counted=rows.au_valid)
    return {
        "macro": summary["macro"],
        "samples": summary["samples"],
        "without_map": int((np.isin(rows.labels, list(expressions)) & ~rows.au_valid).sum()),
        "missing_classes": [name for name, entry in summary["per_class"].items() if entry["mean"] is None],
        "per_class": summary["per_class"],
    }


def _class_means(values: Floats, labels: Ints, classes: Mapping[int, str], *, counted: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Mean of each class (label -> name) over the samples counted, then the plain mean over the classes that have any."""
    per_class: dict[str, Any] = {}
    for label, name in classes.items():
        chosen = values[counted & (labels == label)].astype(np.float64)
        per_class[name] = {"samples": len(chosen), "mean": float(chosen.mean()) if len(chosen) else None}
    means = [entry["mean"] for entry in per_class.values() if entry["mean"] is not None]
    return {
        "macro": float(np.mean(means)) if means else None,
        "samples": sum(entry["samples"] for entry in per_class.values()),
        "per_class": per_class,
    }


def _map_counts(ranges: Floats) -> dict[str, int]:
    """Maps that show no place: constant ones, and those with NaN or infinite values. All of them count as zeros."""
    return {"samples": len(ranges), "constant": int((ranges == 0).sum()), "not_finite": int(np.isnan(ranges).sum())}


def macro(values: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], *, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Mean over classes of the class means of M figures of N samples: (M, N) -> (M,); NaN if no sample counts."""
    means = [values[:, counted & (labels == label)].mean(axis=1, dtype=np.float64) for label in np.unique(labels[counted])]
    return np.asarray(np.mean(means, axis=0) if means else np.full(len(values), np.nan), dtype=np.float64)
