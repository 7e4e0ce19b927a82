"""Intervals of figures, and tests whether two figures differ by more than chance.

There are two kinds of chance. *Sampling*: another test split would give other figures. Wilson intervals, the bootstrap and McNemar's test
cover it, for the trained networks at hand. *Training*: another seed would give another network. The standard deviation and the t interval
over seeds cover it. Two methods count as different only if the tests of both kinds find a difference; with one seed, training is not
tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

Doubles = npt.NDArray[np.float64]
LEVEL = 0.95
"""Confidence of all intervals; tests are at 1 - LEVEL."""
REPLICATES = 1000
"""Bootstrap replicates. They give standard errors and 95 % percentiles. p values come from the standard error, not from counting."""


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean over seeds: mean -+ t * s / sqrt(n), s with ddof = 1. None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = float(np.mean(values))
    reach = t_reach(float(np.std(values, ddof=1)) / math.sqrt(n), degrees=n - 1)
    return Interval(mean - reach, mean + reach)


def wilson_interval(successes: int, n: int) -> Interval:
    """Score interval of a proportion (E. B. Wilson, JASA 1927).

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials; a proportion needs 0 <= successes <= trials, and a trial")
    # scipy gives this interval only with an exact test, which takes a hundred times as long.
    z, share = float(stats.norm.ppf(0.5 + LEVEL / 2)), successes / n
    centre, reach = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(max(0.0, (centre - reach) / (1 + z**2 / n)), min(1.0, (centre + reach) / (1 + z**2 / n)))


def mcnemar(only_first: npt.ArrayLike, only_second: npt.ArrayLike) -> Doubles:
    """Exact two-sided p values of McNemar's test (Q. McNemar, Psychometrika 1947): are two classifiers right equally often?

    Args:
        only_first: number of samples on which only the first classifier is right; any shape.
        only_second: number of samples on which only the second is right.

    Returns:
        p of the same shape; 1 where the classifiers never differ.
    """
    first, second = np.asarray(only_first), np.asarray(only_second)
    return np.asarray(np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(first, second), first + second, 0.5)), dtype=np.float64)


def clustered_mcnemar(differences: npt.ArrayLike) -> float:
    """Exact two-sided p value of `mcnemar`'s question where samples come in independent clusters, such as the pictures of a person.

    If the classifiers are equally good, each cluster's difference has either sign with equal probability. This is Fisher's exact test
    of paired differences (The Design of Experiments, 1935, ch. 3) over all signs, counted by convolution. With clusters of one sample it
    is McNemar's test.

    Args:
        differences: (K,) whole numbers. For each cluster: samples on which only the first classifier is right, minus samples on which
            only the second is right.

    Returns:
        p; 1 where the classifiers never differ.
    """
    whole = np.rint(differences).astype(np.int64)
    sizes, counts = np.unique(np.abs(whole[whole != 0]), return_counts=True)
    distribution = np.ones(1)  # of the sum of the differences with a positive sign
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, of_size)
    positive = (np.abs(whole).sum() + abs(whole.sum())) // 2
    return min(1.0, 2 * float(distribution[positive:].sum()))


def smallest_gap(samples: int, discordant: float) -> float:
    """The smallest difference in accuracy that is significant in McNemar's exact test, uncorrected.

    Args:
        samples: number of samples in the test split.
        discordant: share of the samples on which exactly one of two classifiers is right.

    Returns:
        A share of ``samples``; 1 if even the largest possible difference is not significant.
    """
    pairs = round(samples * discordant)
    gaps = np.arange(pairs % 2, pairs + 1, 2)
    enough = gaps[mcnemar((pairs + gaps) // 2, (pairs - gaps) // 2) < 1 - LEVEL]
    return float(enough[0]) / samples if len(enough) else 1.0


class Bootstrap:
    """Replicates of a test split. All figures on the split use the same draws, so that differences are paired.

    Where identities are known, whole people are drawn, because pictures of a person are not independent (B. Efron, R. Tibshirani, An
    Introduction to the Bootstrap, 1993, ch. 8).
    """

    def __init__(self, clusters: Sequence[str | None], *, replicates: int = REPLICATES) -> None:
        """Draw the replicates.

        Args:
            clusters: person shown in each sample; None: unknown, so that the sample is a cluster of its own.
            replicates: number of replicates.
        """
        numbers: dict[tuple[bool, Any], int] = {}
        people = enumerate(clusters)
        self._of = np.array([numbers.setdefault((name is None, i if name is None else name), len(numbers)) for i, name in people])
        self.clusters = len(numbers)
        """Number of independent units."""
        rng = np.random.default_rng(0)
        self._draws = np.empty((replicates, self.clusters), np.float32)
        """(replicates, clusters): how often each cluster is in each replicate."""
        for row in self._draws:
            row[:] = np.bincount(rng.integers(0, self.clusters, self.clusters), minlength=self.clusters)

    def units(self, counted: npt.NDArray[np.bool_]) -> int:
        """Number of clusters with at least one sample that counts."""
        return len(np.unique(self._of[counted]))

    def sums(self, values: npt.NDArray[Any]) -> Doubles:
        """Sum over the samples of each cluster: (M, N) -> (M, clusters)."""
        return np.stack([np.bincount(self._of, weights=row, minlength=self.clusters) for row in values])

    def macro_means(self, values: npt.NDArray[Any], labels: npt.NDArray[np.int64], *, counted: npt.NDArray[np.bool_]) -> Doubles:
        """Replicates of the mean over classes of the class means, as `bench.evaluation.metrics` forms it.

        Args:
            values: (M, N), M figures of each sample.
            labels: (N,) class of each sample. One label for all gives the plain mean.
            counted: (N,) samples that count.

        Returns:
            (M, replicates). A class without samples in a replicate is left out of its mean; NaN if no class has samples.
        """
        values = np.atleast_2d(values)
        classes = np.unique(labels[counted])
        total = np.zeros((len(values), len(self._draws)))
        present = np.zeros(len(self._draws))
        for label in classes:
            members = np.flatnonzero(counted & (labels == label))
            used, place = np.unique(self._of[members], return_inverse=True)
            gather = sparse.csr_array((np.ones(len(members), np.float32), (place, np.arange(len(members)))))
            sums = gather @ np.column_stack([values[:, members].T, np.ones(len(members))]).astype(np.float32)
            drawn = (self._draws[:, used] @ sums).astype(np.float64)
            nonempty = drawn[:, -1] > 0
            present += nonempty
            total += np.where(nonempty, drawn[:, :-1].T / np.where(nonempty, drawn[:, -1], 1), 0)
        return np.where(present > 0, total / np.where(present > 0, present, 1), np.nan)


def percentile_interval(replicates: Doubles) -> Interval:
    """Percentile interval of (R,) bootstrap replicates without NaN (Efron, Tibshirani, 1993, ch. 13)."""
    low, high = np.nanquantile(replicates, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(float(low), float(high))


def bootstrap_p(differences: npt.ArrayLike, errors: npt.ArrayLike, *, clusters: int) -> Doubles:
    """Two-sided p values of differences of zero: Student's t, difference / error, with the bootstrap's standard error.

    Args:
        differences: (P,) observed.
        errors: (P,) standard deviation (ddof = 1) of the bootstrap replicates of each difference, paired.
        clusters: number of independent units; the degrees of freedom are clusters - 1.

    Returns:
        (P,).
    """
    return _t_test(np.asarray(differences, np.float64), np.asarray(errors, np.float64), degrees=clusters - 1)


def t_reach(error: float, *, degrees: int) -> float:
    """Half the width of Student's interval, t * error, of a figure with this standard error; infinite with no degree of freedom."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * error if degrees > 0 else math.inf


def seeds_p(differences: npt.ArrayLike) -> Doubles:
    """Two-sided p values of a mean difference of zero over seeds: the paired t test, mean / (s / sqrt(S)).

    Args:
        differences: (P, S) of P pairs of rows at S seeds, S at least 2.

    Returns:
        (P,).
    """
    values = np.asarray(differences, np.float64)
    error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
    return _t_test(values.mean(axis=1), error, degrees=values.shape[1] - 1)


def table_seeds_p(figures: npt.ArrayLike, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> Doubles:
    """Two-sided p values of a mean difference of zero over seeds, for pairs of rows of a table.

    The few seeds of a pair tell little about the variance between trainings. With three seeds, the t distribution has two degrees of
    freedom, and after correction for a table's comparisons no difference is significant. All rows of the table together tell more.
    So there are two tests: the paired t test of `seeds_p`, and a t test with the variance of the two-way layout of rows and seeds, or the
    pair's own variance where that is larger. The degrees of freedom of the second are those of Greenhouse and Geisser (Psychometrika
    1959). They are few where some rows vary more than the rest, or where rows rise and fall together, as read-outs of a training do.
    The result is the smaller p, doubled (Bonferroni).

    Args:
        figures: (R, S), R rows at the same S seeds, S at least 2.
        first: (P,) row number of the first row of each pair.
        second: (P,) row number of the second.

    Returns:
        (P,). For a table of two rows: `seeds_p`, because there are no further rows to estimate the variance from.
    """
    values = np.asarray(figures, np.float64)
    differences = values[first] - values[second]
    alone = seeds_p(differences)
    rows, seeds = values.shape
    residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    products = residuals.T @ residuals  # (S, S); it and its square have the traces of the rows' (R, R) matrix and its square
    if rows < 3 or not products.any():
        return alone
    scatter = float(products.trace())
    pooled = 2 * scatter / ((rows - 1) * (seeds - 1))
    degrees = (seeds - 1) * scatter**2 / float((products**2).sum())
    error = np.sqrt(np.maximum(differences.var(axis=1, ddof=1), pooled) / seeds)
    together = _t_test(differences.mean(axis=1), error, degrees=degrees)
    return np.asarray(np.minimum(2 * np.minimum(alone, together), 1), np.float64)


def _t_test(differences: Doubles, errors: Doubles, *, degrees: float) -> Doubles:
    """Two-sided p values (P,) of Student's t, |difference| / error; 1 with less than one degree of freedom.

    An error of zero gives no t: p is 1 where the difference is zero too, and else 0.
    """
    flat = errors <= 1e-12 * np.abs(differences)  # covers 0 <= 0
    if degrees < 1:
        return np.ones_like(differences)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = 2 * stats.t.sf(np.abs(differences) / errors, degrees)
    return np.where(flat, np.where(differences == 0, 1.0, 0.0), p_values)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for all comparisons (S. Holm, Scandinavian Journal of Statistics 1979), in the order given.

    The k-th smallest of m values is multiplied by m - k + 1, and is at least as large as the one before it.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Average ranks over datasets."""

    ranks: tuple[float, ...]
    """In the order of the methods, 1 = best; ties share their mean rank."""
    critical_difference: float
    """Average ranks that are closer than this do not differ significantly (Nemenyi)."""
    friedman_p: float | None
    """p value of all methods being equal (Friedman); None for fewer than three methods or two datasets."""


def rank_methods(figures: Doubles) -> Ranking:
    """Average ranks, and their critical difference q * sqrt(k * (k + 1) / (6 * N)) for k methods, N datasets (J. Demsar, JMLR 2006, 3.2.2).

    Args:
        figures: (datasets, methods), higher is better.

    Raises:
        ValueError: fewer than two methods, no dataset, or a missing figure.
    """
    datasets, methods = figures.shape
    if methods < 2 or datasets < 1 or not np.isfinite(figures).all():
        raise ValueError(f"a ranking needs figures of at least two methods on every dataset, not {datasets} x {methods} with gaps")
    ranks = stats.rankdata(-figures, axis=1).mean(axis=0)
    q = float(stats.studentized_range.ppf(LEVEL, methods, np.inf)) / math.sqrt(2)
    friedman = None
    if methods > 2 and datasets > 1:
        with np.errstate(invalid="ignore"):
            friedman = float(stats.friedmanchisquare(*figures.T).pvalue)
    return Ranking(
        ranks=tuple(map(float, ranks)),
        critical_difference=q * math.sqrt(methods * (methods + 1) / (6 * datasets)),
        friedman_p=None if friedman is None or math.isnan(friedman) else friedman,
    )
