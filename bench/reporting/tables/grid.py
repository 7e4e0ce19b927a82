"""A table of strings, and its writers: Markdown, LaTeX, and the terminal. The site's templates write it as HTML."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from tabulate import tabulate

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a format writes text and marks."""

    text: Callable[[str], str] = str
    """Escapes plain text."""
    plus_minus: str = "±"
    best: str = "{}"
    tied: str = "{}"
    verified: str = "{} ✓"
    batch_dependent: str = "{} ⚠ batch-dependent"
    below: str = "↳ {}"
    """Name of a line that belongs to the row above it."""


class Heading(NamedTuple):
    """Heading of a column. Neighbouring columns with the same ``top`` share it."""

    top: str
    bottom: str = ""

    @property
    def line(self) -> str:
        """The whole heading on one line."""
        return f"{self.top} {self.bottom}".strip()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table as it is printed, already in a `Style`."""

    title: str
    headings: tuple[Heading, ...]
    words: int
    """Number of leading columns that hold words. The rest hold figures."""
    lines: tuple[tuple[str, ...], ...]
    caption: str


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in _single_line(text))


_TEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "±": "$\\pm$",
    "≈": "$\\approx$",
    MINUS: "$-$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
}


def _markdown(text: str) -> str:
    """Escape for Markdown, which may hold HTML, and for its tables."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&])", r"\\\1", _single_line(text))


def _single_line(text: str) -> str:
    """Replace line breaks and control characters by spaces."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", text)


PLAIN = Style(best="{}*", tied="{}≈")
MARKDOWN = Style(text=_markdown, best="**{}**", tied="{} ≈")
LATEX = Style(
    text=_tex,
    plus_minus="$\\pm$",
    best="\\textbf{{{}}}",
    tied="{} $\\approx$",
    verified="{} $\\surd$",
    batch_dependent="{} $\\dagger$ batch-dependent",
    below="\\quad {}",
)


def markdown(grid: Grid) -> str:
    """Write a grid of style `MARKDOWN`."""
    sides = ["left"] * grid.words + ["right"] * (len(grid.headings) - grid.words)
    headers = [heading.line for heading in grid.headings]
    body = tabulate(grid.lines, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=sides)
    return f"### {grid.title}\n\n{body}\n\n{grid.caption}\n"


LATEX_PREAMBLE = """\
% needs \\usepackage{booktabs} and \\usepackage{graphicx}
\\ifdefined\\benchtable\\else\\newsavebox{\\benchtable}\\fi
"""


def latex(grid: Grid) -> str:
    """Write a grid of style `LATEX` as a booktabs table, shrunk if it is wider than the page."""
    # tabulate has no headings of two lines, nor rules below a part of them.
    tops: list[str] = []
    rules: list[str] = []
    start = 1
    for top, group in itertools.groupby(grid.headings, key=lambda heading: heading.top):
        bottoms = [heading.bottom for heading in group]
        if any(bottoms):
            rules.append(f"\\cmidrule(lr){{{start}-{start + len(bottoms) - 1}}}")
        tops.append(f"\\multicolumn{{{len(bottoms)}}}{{c}}{{{top}}}" if any(bottoms) else top)
        start += len(bottoms)
    heads = [_row(tops), *([" ".join(rules), _row(heading.bottom for heading in grid.headings)] if rules else [])]
    sides = "l" * grid.words + "r" * (len(grid.headings) - grid.words)
    lines = [
        "\\begin{table}",
        "\\centering\\small\\setlength{\\tabcolsep}{3pt}",
        f"\\caption{{{grid.title}}}\\smallskip",
        f"\\sbox{{\\benchtable}}{{\\begin{{tabular}}{{{sides}}}",
        "\\toprule",
        *heads,
        "\\midrule",
        *map(_row, grid.lines),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\ifdim\\wd\\benchtable>\\textwidth\\resizebox{\\textwidth}{!}{\\usebox{\\benchtable}}\\else\\usebox{\\benchtable}\\fi",
        f"\\par\\smallskip\\parbox{{\\textwidth}}{{\\footnotesize {grid.caption}}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + " \\\\"


def rich_grid(grid: Grid) -> RichTable:
    """Write a grid of style `PLAIN` for the terminal. Text that looks like rich's markup is shown as it is."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(grid.title), caption=Text(grid.caption), caption_justify="left")
    for number, heading in enumerate(grid.headings):
        shown.add_column(Text(f"{heading.top}\n{heading.bottom}".strip()), justify="left" if number < grid.words else "right")
    for line in grid.lines:
        shown.add_row(*map(Text, line))
    return shown
