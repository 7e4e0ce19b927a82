"""Comparisons as sentences to quote, as tables, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.evaluation.statistics import LEVEL, Interval
from bench.method import METHODS
from bench.reporting.tables.compare import Comparison, Difference
from bench.reporting.tables.evidence import Metric
from bench.reporting.tables.grid import Grid, Heading, Style
from bench.reporting.tables.leaderboard import TITLES


class Names(NamedTuple):
    """How a sentence names the two sides of a comparison."""

    a: str
    b: str
    both: str
    """What the sides have in common."""

    @property
    def title(self) -> str:
        """Heading of the comparison."""
        return f"{self.a} against {self.b}: {self.both}"


def names(comparison: Comparison) -> Names:
    """``CAM with AU guidance``, ``without``, and ``synthetic, on mini, in variant paper, by protocol val``."""
    a, b = comparison.a[0], comparison.b[0]
    titles = [METHODS.get(r.cell.method).info.title if r.cell.method in METHODS else r.cell.method for r in (a, b)]
    parts = [
        ["with AU guidance" if record.cell.guidance == "au" else "without AU guidance" for record in (a, b)],
        [f"on {record.cell.backbone}" for record in (a, b)],
        [f"in variant {record.variant}" for record in (a, b)],
        [f"by protocol {record.protocol}" for record in (a, b)],
    ]
    apart = [words for words in parts if words[0] != words[1]]
    alike = [words[0] for words in parts if words[0] == words[1]]
    if not comparison.seeds:
        apart.append([f"of seed {', '.join(str(record.cell.seed) for record in side)}" for side in (comparison.a, comparison.b)])
    name_a, name_b = (" ".join([titles[side], *(words[side] for words in apart)]) for side in (0, 1))
    if name_a == name_b:
        name_a, name_b = f"{name_a} in A", f"{name_b} in B"
    elif titles[0] == titles[1] and apart == [parts[0]]:
        name_b = parts[0][1].removesuffix(" AU guidance")
    return Names(a=name_a, b=name_b, both=", ".join([a.cell.dataset, *alike]))


class _Phrase(NamedTuple):
    """Templates for a difference in a metric; they take its size and the name of B."""

    more: str
    less: str
    noun: str


_PHRASES: Mapping[Metric, _Phrase] = {
    "cl": _Phrase("is {} points more accurate than {}", "is {} points less accurate than {}", "accuracy"),
    "cam_cos": _Phrase("has a CAM-COS {} higher than {}", "has a CAM-COS {} lower than {}", "CAM-COS"),
    "att_cos": _Phrase("has an ATT-COS {} higher than {}", "has an ATT-COS {} lower than {}", "ATT-COS"),
}


def sentence(comparison: Comparison, metric: Metric) -> str:
    """One difference as a sentence to quote."""
    difference, sides, phrase = comparison.differences[metric], names(comparison), _PHRASES[metric]
    pictures = f"{difference.samples} pictures" + (f" of {difference.units} people" if comparison.people_known else "")
    basis = f"{pictures}, {_seeds(comparison)}"
    if difference.interval == Interval(0, 0):
        return f"{sides.a} and {sides.b} are equal in {phrase.noun} on every sample ({basis})."
    interval = "no interval" if difference.interval is None else f"{LEVEL:.0%} interval {_interval(metric, difference.interval)}"
    p = _p(difference.p_holm)
    facts = f"({interval}, p {p if p.startswith('<') else f'= {p}'}, {basis})"
    size = _number(metric, abs(difference.difference))
    if difference.significant:
        words = phrase.more if difference.difference > 0 else phrase.less
        return f"{sides.a} {words.format(size, sides.b)} {facts}."
    unit = " points" if metric == "cl" else ""
    smallest = (
        "No difference could be significant with so few samples or seeds"
        if difference.smallest is None
        else f"A difference must be at least {_number(metric, difference.smallest)}{unit} to be significant here, before correction"
    )
    return f"{sides.a} and {sides.b} do not differ significantly in {phrase.noun}: they differ by {size}{unit} {facts}. {smallest}."


def _seeds(comparison: Comparison) -> str:
    if comparison.seeds:
        return "1 seed" if len(comparison.seeds) == 1 else f"{len(comparison.seeds)} seeds"
    return f"{len(comparison.a)} against {len(comparison.b)} runs with no seed in common"


def _number(metric: Metric, value: float, *, signed: bool = False) -> str:
    """CL in percent, cosines as they are. A small value that would be rounded to zero is given with its first digit."""
    scale, digits = (100, 1) if metric == "cl" else (1, 3)
    form = f".{digits}f" if value == 0 or round(abs(scale * value), digits) else ".0e"
    return f"{scale * value:{'+' if signed else ''}{form}}"


def _interval(metric: Metric, interval: Interval) -> str:
    return f"{_number(metric, interval.low)} to {_number(metric, interval.high)}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def sentences(comparison: Comparison) -> list[str]:
    """All differences of a comparison as sentences, and the reservations that go with them."""
    lines = [sentence(comparison, metric) for metric in comparison.differences]
    lines += [f"{TITLES[metric]} is not compared: a side has none." for metric in TITLES if metric not in comparison.differences]
    if comparison.differing:
        lines.append(f"They also differ in: {'; '.join(comparison.differing)}.")
    for side, name in zip((comparison.a, comparison.b), names(comparison)[:2], strict=True):
        if any(record.invariance is not None and not record.invariance["holds"] for record in side):
            lines.append(f"Logits or maps of {name} change with the batch they are computed in: do not rely on its figures.")
    if len(comparison.seeds) < 2:
        lines.append("This does not show whether other trainings would differ too: that needs two or more common seeds.")
    return lines


def grid(comparison: Comparison, *, classes: bool, style: Style) -> Grid:
    """A comparison as a table: a line for each metric and, below it, one for each class."""
    sides = names(comparison)
    lines = []
    for metric, difference in comparison.differences.items():
        lines.append(_line(TITLES[metric], metric, difference, style))
        for name, of_class in comparison.per_class[metric].items() if classes else ():
            lines.append(_line(style.below.format(style.text(name)), metric, of_class, style))
    headings = (sides.a, sides.b, "Difference", f"{LEVEL:.0%} interval", "p", "p (Holm)", "Pictures")
    return Grid(
        title=style.text(sides.title),
        headings=tuple(Heading(style.text(heading)) for heading in ("", *headings)),
        words=1,
        lines=tuple(lines),
        caption="",
    )


def _line(name: str, metric: Metric, difference: Difference, style: Style) -> tuple[str, ...]:
    size = _number(metric, difference.difference, signed=True)
    return (
        name,
        *(_number(metric, value) for value in (difference.a, difference.b)),
        style.best.format(size) if difference.significant else size,
        "-" if difference.interval is None else _interval(metric, difference.interval),
        *(style.text(_p(p)) for p in (difference.p, difference.p_holm)),
        str(difference.samples),
    )


def closing(comparisons: Sequence[Comparison], *, alone: int, style: Style) -> str:
    """The footer for all comparisons: units, tests and corrections."""
    headline = sum(len(comparison.differences) for comparison in comparisons)
    classes = sum(len(by_class) for comparison in comparisons for by_class in comparison.per_class.values())
    tests = sorted({difference.test for comparison in comparisons for difference in comparison.differences.values()})
    units = "people" if any(comparison.people_known for comparison in comparisons) else "pictures"
    words = (
        f"CL is in %, its differences in points. Tests: {', '.join(tests)}; the bootstrap draws {units}. p (Holm) and the sentences are "
        f"corrected for all {headline} differences together, and the {classes} differences of classes for each other; an interval is for "
        "one difference alone. Marked: significant differences."
    )
    left_out = f" {alone} cells were left out: they have no counterpart on the other side." if alone else ""
    return style.text(words + left_out)


def plain(comparisons: Sequence[Comparison], *, alone: int) -> dict[str, Any]:
    """All comparisons as JSON."""
    return {
        "comparisons": [
            {
                "title": names(comparison).title,
                "one": [record.key for record in comparison.a],
                "other": [record.key for record in comparison.b],
                "seeds": list(comparison.seeds),
                "people_known": comparison.people_known,
                "differing": list(comparison.differing),
                "words": sentences(comparison),
                "differences": {metric: _facts(difference) for metric, difference in comparison.differences.items()},
                "per_class": {
                    metric: {name: _facts(difference) for name, difference in by_class.items()}
                    for metric, by_class in comparison.per_class.items()
                },
            }
            for comparison in comparisons
        ],
        "without_counterpart": alone,
    }


def _facts(difference: Difference) -> dict[str, Any]:
    facts = dataclasses.asdict(difference)
    return {"one": facts.pop("a"), "other": facts.pop("b"), **facts, "told_apart": difference.significant}
