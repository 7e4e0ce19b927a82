"""Comparisons in words a reader can quote, and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.evaluation.statistics import LEVEL, Interval
from bench.method import METHODS
from bench.reporting.tables.compare import Comparison, Difference
from bench.reporting.tables.evidence import Metric
from bench.reporting.tables.leaderboard import TITLES
from bench.reporting.tables.render import Grid, Heading, Style


class Names(NamedTuple):
    """What the two sides of a comparison are called in a sentence."""

    one: str
    other: str
    both: str
    """What they have in common."""


def names(comparison: Comparison) -> Names:
    """``CAM with AU guidance``, ``without``, and ``synthetic, on mini, in variant paper, by protocol val``."""
    one, other = comparison.one[0], comparison.other[0]
    titles = [METHODS.get(r.cell.method).info.title if r.cell.method in METHODS else r.cell.method for r in (one, other)]
    parts = [
        ["with AU guidance" if record.cell.guidance == "au" else "without AU guidance" for record in (one, other)],
        [f"on {record.cell.backbone}" for record in (one, other)],
        [f"in variant {record.variant}" for record in (one, other)],
        [f"by protocol {record.protocol}" for record in (one, other)],
    ]
    apart = [words for words in parts if words[0] != words[1]]
    alike = [words[0] for words in parts if words[0] == words[1]]
    if not comparison.seeds:
        apart.append([f"of seed {', '.join(str(record.cell.seed) for record in side)}" for side in (comparison.one, comparison.other)])
    here, there = (" ".join([titles[side], *(words[side] for words in apart)]) for side in (0, 1))
    if here == there:
        here, there = f"{here} in A", f"{there} in B"
    elif titles[0] == titles[1] and apart == [parts[0]]:
        there = parts[0][1].removesuffix(" AU guidance")
    return Names(one=here, other=there, both=", ".join([one.cell.dataset, *alike]))


class _Phrase(NamedTuple):
    """How a difference in a metric is said, of its size and the other side's name."""

    more: str
    less: str
    noun: str


_PHRASES: Mapping[Metric, _Phrase] = {
    "cl": _Phrase("is {} points more accurate than {}", "is {} points less accurate than {}", "accuracy"),
    "cam_cos": _Phrase("has a CAM-COS {} higher than {}", "has a CAM-COS {} lower than {}", "CAM-COS"),
    "att_cos": _Phrase("has an ATT-COS {} higher than {}", "has an ATT-COS {} lower than {}", "ATT-COS"),
}


def sentence(comparison: Comparison, metric: Metric) -> str:
    """One difference, to be quoted."""
    found, called, phrase = comparison.differences[metric], names(comparison), _PHRASES[metric]
    pictures = f"{found.samples} pictures" + (f" of {found.units} people" if comparison.people_known else "")
    basis = f"{pictures}, {_seeds(comparison)}"
    if found.interval == Interval(0, 0):
        return f"{called.one} and {called.other} are equal in {phrase.noun}, sample by sample ({basis})."
    within = "no interval" if found.interval is None else f"{LEVEL:.0%} interval {_interval(metric, found.interval)}"
    facts = f"({within}, p {_p(found.p_holm, relation=True)}, {basis})"
    if found.told_apart:
        words = phrase.more if found.difference > 0 else phrase.less
        return f"{called.one} {words.format(_number(metric, abs(found.difference)), called.other)} {facts}."
    unit = " points" if metric == "cl" else ""
    smallest = "no difference" if found.smallest is None else f"only a difference of {_number(metric, found.smallest)}{unit} or more"
    return (
        f"{called.one} and {called.other} cannot be told apart in {phrase.noun}: they differ by "
        f"{_number(metric, abs(found.difference))}{unit} {facts}, where {smallest} could have been told from none."
    )


def _seeds(comparison: Comparison) -> str:
    if comparison.seeds:
        return "1 seed" if len(comparison.seeds) == 1 else f"{len(comparison.seeds)} seeds"
    return f"{len(comparison.one)} against {len(comparison.other)} runs with no seed in common"


def _number(metric: Metric, value: float, *, signed: bool = False) -> str:
    """CL in percent, cosines as they are; what would be rounded to zero and is none, with its first digit."""
    scale, digits = (100, 1) if metric == "cl" else (1, 3)
    form = f".{digits}f" if value == 0 or round(abs(scale * value), digits) else ".0e"
    return f"{scale * value:{'+' if signed else ''}{form}}"


def _interval(metric: Metric, interval: Interval) -> str:
    return f"{_number(metric, interval.low)} to {_number(metric, interval.high)}"


def _p(p: float, *, relation: bool = False) -> str:
    equal = "= " if relation else ""
    return "< 0.001" if p < 0.001 else f"{equal}{p:.2g}"


def sentences(comparison: Comparison) -> list[str]:
    """All differences of a comparison in words, and what a reader should know with them."""
    said = [sentence(comparison, metric) for metric in comparison.differences]
    said += [f"{TITLES[metric]} is not compared: a side has none." for metric in TITLES if metric not in comparison.differences]
    if comparison.differing:
        said.append(f"They also differ in: {'; '.join(comparison.differing)}.")
    for side, name in zip((comparison.one, comparison.other), names(comparison)[:2], strict=True):
        if any(record.invariance is not None and not record.invariance["holds"] for record in side):
            said.append(f"Of {name}, logits or maps change with the batch they are computed in: its figures are not to be relied on.")
    if len(comparison.seeds) < 2:
        said.append("Nothing here is about other trainings: that needs two seeds or more in common.")
    return said


def grid(comparison: Comparison, *, classes: bool, style: Style) -> Grid:
    """A comparison as a table: a line a metric and, below it, one a class."""
    called = names(comparison)
    lines = []
    for metric, found in comparison.differences.items():
        lines.append(_line(TITLES[metric], metric, found, style))
        for name, there in comparison.per_class[metric].items() if classes else ():
            lines.append(_line(style.below.format(style.text(name)), metric, there, style))
    headings = (called.one, called.other, "Difference", f"{LEVEL:.0%} interval", "p", "p (Holm)", "Pictures")
    return Grid(
        title=style.text(f"{called.one} against {called.other}: {called.both}"),
        headings=tuple(Heading(style.text(heading)) for heading in ("", *headings)),
        words=1,
        lines=tuple(lines),
        caption="",
    )


def _line(name: str, metric: Metric, found: Difference, style: Style) -> tuple[str, ...]:
    within = "-" if found.interval is None else _interval(metric, found.interval)
    difference = _number(metric, found.difference, signed=True)
    return (
        name,
        *(_number(metric, value) for value in (found.one, found.other)),
        style.best.format(difference) if found.told_apart else difference,
        within,
        *(style.text(_p(p)) for p in (found.p, found.p_holm)),
        str(found.samples),
    )


def closing(comparisons: Sequence[Comparison], *, alone: int, style: Style) -> str:
    """What holds for all comparisons."""
    headline = sum(len(comparison.differences) for comparison in comparisons)
    classes = sum(len(there) for comparison in comparisons for there in comparison.per_class.values())
    tests = sorted({found.test for comparison in comparisons for found in comparison.differences.values()})
    units = "people" if any(comparison.people_known for comparison in comparisons) else "pictures"
    words = (
        f"CL in %, its differences in points. Tests: {', '.join(tests)}; the bootstrap draws {units}. p (Holm) and the words hold for all "
        f"{headline} differences together, those of the {classes} classes for these together; intervals are for one difference. "
        f"Marked: a difference that is more than chance."
    )
    left = f" {alone} cells have no counterpart on the other side and were left out." if alone else ""
    return style.text(words + left)


def plain(comparisons: Sequence[Comparison], *, alone: int) -> dict[str, Any]:
    """Everything, JSON-able."""
    return {
        "comparisons": [
            {
                "title": f"{called.one} against {called.other}: {called.both}",
                "one": [record.key for record in comparison.one],
                "other": [record.key for record in comparison.other],
                "seeds": list(comparison.seeds),
                "people_known": comparison.people_known,
                "differing": list(comparison.differing),
                "words": sentences(comparison),
                "differences": {metric: _facts(found) for metric, found in comparison.differences.items()},
                "per_class": {
                    metric: {name: _facts(found) for name, found in there.items()} for metric, there in comparison.per_class.items()
                },
            }
            for comparison in comparisons
            for called in (names(comparison),)
        ],
        "without_counterpart": alone,
    }


def _facts(found: Difference) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "told_apart": found.told_apart}
