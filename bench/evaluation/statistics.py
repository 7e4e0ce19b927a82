"""What is known about a figure, and whether two figures differ by more than chance.

Two kinds of chance are kept apart. *Sampling*: another test split would give other figures; Wilson intervals, the bootstrap and
McNemar's test are about this, for the trained networks at hand. *Training*: another seed would give another network; the standard
deviation and the t interval over seeds are about this. A difference between methods counts as one only if it stands against both,
as far as there are seeds to tell.
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
"""Bootstrap replicates. They estimate standard errors and 95 % percentiles; p values come from the standard error, not from counting."""


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def t_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval | None:
    """Student's interval of the mean over seeds, standard deviation with ddof = 1; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return Interval(mean - reach, mean + reach)


def wilson_interval(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Interval of a proportion (E. B. Wilson, JASA 1927).

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials")
    # Written out: scipy gives this interval only beside an exact test, which takes a hundred times as long.
    z, share = float(stats.norm.ppf(0.5 + level / 2)), successes / n
    centre, reach = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(max(0.0, (centre - reach) / (1 + z**2 / n)), min(1.0, (centre + reach) / (1 + z**2 / n)))


def mcnemar(only_one: npt.ArrayLike, only_other: npt.ArrayLike) -> Doubles:
    """Exact two-sided p values of McNemar's test (Q. McNemar, Psychometrika 1947): are two classifiers right equally often?

    Args:
        only_one: samples on which only the first is right; any shape.
        only_other: samples on which only the second is.

    Returns:
        p of the same shape; 1 where they never differ.
    """
    one, other = np.asarray(only_one), np.asarray(only_other)
    return np.asarray(np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(one, other), one + other, 0.5)), dtype=np.float64)


def clustered_mcnemar(differences: npt.ArrayLike) -> float:
    """Exact two-sided p value of `mcnemar`'s question where only clusters of samples, the pictures of a person, are independent.

    Were the classifiers equally good, they could be exchanged in each cluster, so that its difference might as well have the other sign:
    Fisher's exact test of paired differences (The Design of Experiments, 1935, ch. 3), here with all signs, counted by convolution. Where
    every cluster is one sample it is McNemar's test.

    Args:
        differences: (K,) whole numbers: samples of a cluster on which only the first is right, less those on which only the second is.

    Returns:
        p; 1 where they never differ.
    """
    found = np.rint(differences).astype(np.int64)
    sizes, counts = np.unique(np.abs(found[found != 0]), return_counts=True)
    distribution = np.ones(1)  # of the sum of those with a plus, where every sign is a fair coin's
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        one_size = np.zeros(size * count + 1)
        one_size[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, one_size)
    plus = (np.abs(found).sum() + abs(found.sum())) // 2
    return min(1.0, 2 * float(distribution[plus:].sum()))


def smallest_gap(samples: int, discordant: float, *, alpha: float = 1 - LEVEL) -> float:
    """The smallest difference in accuracy that McNemar's exact test can call one, as a share of ``samples``.

    Args:
        samples: of the test split.
        discordant: share of them on which two classifiers differ in being right.
        alpha: level of the test, uncorrected.

    Returns:
        A share between 0 and 1; 1 where even the largest possible difference would not do.
    """
    pairs = round(samples * discordant)
    gaps = np.arange(pairs % 2, pairs + 1, 2)
    enough = gaps[mcnemar((pairs + gaps) // 2, (pairs - gaps) // 2) < alpha]
    return float(enough[0]) / samples if len(enough) else 1.0


class Bootstrap:
    """Replicates of a test split, drawn once and used for every figure on it, so that differences are paired.

    Whole people are drawn where identities are known (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, ch. 8): pictures of
    one person are not independent.
    """

    def __init__(self, clusters: Sequence[str | None], *, replicates: int = REPLICATES, seed: int = 0) -> None:
        """Draw the replicates.

        Args:
            clusters: for each sample who is shown, None = unknown, a cluster of its own.
            replicates: how many.
            seed: of the draw.
        """
        names: dict[tuple[bool, Any], int] = {}
        self._of = np.array([names.setdefault((who is None, i if who is None else who), len(names)) for i, who in enumerate(clusters)])
        self.clusters = len(names)
        """Independent units that are drawn."""
        rng = np.random.default_rng(seed)
        self._draws = np.empty((replicates, self.clusters), np.float32)
        """How often each cluster is in each replicate."""
        for row in self._draws:
            row[:] = np.bincount(rng.integers(0, self.clusters, self.clusters), minlength=self.clusters)

    def units(self, counted: npt.NDArray[np.bool_]) -> int:
        """Independent units among the samples that count: clusters with at least one of them."""
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
            (M, replicates). A class that a replicate does not have is left out of its mean; NaN where it has none at all.
        """
        values = np.atleast_2d(values)
        classes = np.unique(labels[counted])
        total = np.zeros((len(values), len(self._draws)))
        present = np.zeros(len(self._draws))
        for label in classes:
            mine = np.flatnonzero(counted & (labels == label))
            used, place = np.unique(self._of[mine], return_inverse=True)
            gather = sparse.csr_array((np.ones(len(mine), np.float32), (place, np.arange(len(mine)))))
            sums = gather @ np.column_stack([values[:, mine].T, np.ones(len(mine))]).astype(np.float32)
            drawn = (self._draws[:, used] @ sums).astype(np.float64)
            there = drawn[:, -1] > 0
            present += there
            total += np.where(there, drawn[:, :-1].T / np.where(there, drawn[:, -1], 1), 0)
        return np.where(present > 0, total / np.where(present > 0, present, 1), np.nan)


def percentile_interval(replicates: Doubles, *, level: float = LEVEL) -> Interval:
    """Percentile interval of (R,) bootstrap replicates, NaN left out."""
    low, high = np.nanquantile(replicates, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def bootstrap_p(differences: npt.ArrayLike, errors: npt.ArrayLike, *, clusters: int) -> Doubles:
    """Two-sided p values of differences being zero: Student's t with the bootstrap's standard error.

    Args:
        differences: (P,) observed.
        errors: (P,) standard deviation (ddof = 1) of the bootstrap replicates of each difference, paired.
        clusters: independent units; clusters - 1 are the degrees of freedom.

    Returns:
        (P,).
    """
    return _t_test(np.asarray(differences, np.float64), np.asarray(errors, np.float64), degrees=clusters - 1)


def t_reach(error: float, *, degrees: int, level: float = LEVEL) -> float:
    """Half the width of Student's interval of a figure with this standard error; infinite without a degree of freedom."""
    return float(stats.t.ppf(0.5 + level / 2, degrees)) * error if degrees > 0 else math.inf


def seeds_p(differences: npt.ArrayLike) -> Doubles:
    """Two-sided p values of a mean difference of zero over seeds, each seed paired.

    Args:
        differences: (P, S) of each pair of rows at each seed, S at least 2.

    Returns:
        (P,).
    """
    values = np.asarray(differences, np.float64)
    error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
    return _t_test(values.mean(axis=1), error, degrees=values.shape[1] - 1)


def table_seeds_p(figures: npt.ArrayLike, ones: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> Doubles:
    """Two-sided p values of a mean difference of zero over seeds, for pairs of rows of one table.

    The few seeds of a pair say little about how far training scatters: with three, its t distribution has two degrees of freedom, and
    corrected for a table's comparisons it tells nothing apart. All rows of the table together say more. So two tests are made: the paired
    t test of `seeds_p`, and one with the variance of the two-way layout of rows and seeds, or the pair's own where that is larger. Its
    degrees of freedom are those of Greenhouse and Geisser (Psychometrika 1959): few where some rows scatter more than others, or
    rise and fall together as read-outs of one training do. The smaller p counts, doubled (Bonferroni).

    Args:
        figures: (R, S), R rows at the same S seeds, S at least 2.
        ones: (P,) one row of each pair.
        others: (P,) the other.

    Returns:
        (P,). Of two rows: that of `seeds_p`, as there are no others to learn from.
    """
    values = np.asarray(figures, np.float64)
    differences = values[ones] - values[others]
    alone = seeds_p(differences)
    rows, seeds = values.shape
    residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    products = residuals.T @ residuals  # (S, S): has the traces of the rows' covariance and of its square
    if rows < 3 or not products.any():
        return alone
    scatter = float(products.trace())
    pooled = 2 * scatter / ((rows - 1) * (seeds - 1))
    degrees = (seeds - 1) * scatter**2 / float((products**2).sum())
    error = np.sqrt(np.maximum(differences.var(axis=1, ddof=1), pooled) / seeds)
    together = _t_test(differences.mean(axis=1), error, degrees=degrees)
    return np.asarray(np.minimum(2 * np.minimum(alone, together), 1), np.float64)


def _t_test(differences: Doubles, errors: Doubles, *, degrees: float) -> Doubles:
    # Without spread there is nothing to judge by: equal, or different by the same amount each time.
    flat = errors <= 1e-12 * np.abs(differences)  # covers 0 <= 0
    if degrees < 1:
        return np.ones_like(differences)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = 2 * stats.t.sf(np.abs(differences) / errors, degrees)
    return np.where(flat, np.where(differences == 0, 1.0, 0.0), p_values)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values that hold together (S. Holm, Scandinavian Journal of Statistics 1979), in the order given."""
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
    """1 = best, in the order of the methods; ties share their mean rank."""
    critical_difference: float
    """Average ranks that are closer than this are not told apart (Nemenyi)."""
    friedman_p: float | None
    """Of all methods being equal; None for fewer than three methods or two datasets."""


def rank_methods(figures: Doubles, *, alpha: float = 1 - LEVEL) -> Ranking:
    """Average ranks and their critical difference (J. Demsar, JMLR 2006, eq. for CD in section 3.2.2).

    Args:
        figures: (datasets, methods), higher is better.
        alpha: level.

    Raises:
        ValueError: fewer than two methods or no dataset, or a figure that is missing.
    """
    datasets, methods = figures.shape
    if methods < 2 or datasets < 1 or not np.isfinite(figures).all():
        raise ValueError(f"a ranking needs figures of at least two methods on every dataset, not {datasets} x {methods} with gaps")
    ranks = stats.rankdata(-figures, axis=1).mean(axis=0)
    q = float(stats.studentized_range.ppf(1 - alpha, methods, np.inf)) / math.sqrt(2)
    friedman = None
    if methods > 2 and datasets > 1:
        with np.errstate(invalid="ignore"):
            friedman = float(stats.friedmanchisquare(*figures.T).pvalue)
    return Ranking(
        ranks=tuple(map(float, ranks)),
        critical_difference=q * math.sqrt(methods * (methods + 1) / (6 * datasets)),
        friedman_p=None if friedman is None or math.isnan(friedman) else friedman,
    )
