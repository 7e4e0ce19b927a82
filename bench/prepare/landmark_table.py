"""``landmarks.csv``: the 68 landmarks of pictures, as users provide them."""

from __future__ import annotations

import csv
import hashlib
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.prepare.plausibility import is_one_place

LANDMARKS_HEADER = ("path", *(f"{axis}{i}" for i in range(68) for axis in "xy"))


def same_name(source: str) -> str:
    """A path in Unicode's composed form (NFC): some file systems keep an accent apart from its letter, most programs do not."""
    return unicodedata.normalize("NFC", source)


class LandmarkTable:
    """``landmarks.csv``, parsed row by row on demand: a worker needs a few of what may be hundreds of thousands of rows."""

    def __init__(self, path: Path) -> None:
        """Read the file's text and find the row of every picture.

        Raises:
            ValueError: the header is wrong, a row has no path, or a picture has two rows; the message gives the line.
        """
        self.path = path
        data = path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            # A lone CR ends a line in the files of some spreadsheets.
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8") from error
        header = tuple(cell.strip() for cell in lines[0].split(","))
        if header != LANDMARKS_HEADER:
            raise ValueError(f"{path}: line 1 must be path,x0,y0,x1,y1,...,x67,y67, but is {','.join(header)[:60]!r}")
        self._rows: dict[str, tuple[int, str]] = {}
        for number, line in enumerate(lines[1:], start=2):
            if not line.strip():
                continue
            # Quotes are needed around names with commas only, and the csv module is slow on 137 columns.
            name = next(csv.reader([line]))[0] if line.startswith('"') else line.partition(",")[0]
            source = same_name(name.strip().replace("\\", "/").removeprefix("./"))
            if not source:
                raise ValueError(f"{path}: line {number} has no path")
            if source in self._rows:
                raise ValueError(f"{path}: lines {self._rows[source][0]} and {number} are both about {source}; keep one")
            self._rows[source] = (number, line)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, source: object) -> bool:
        return isinstance(source, str) and same_name(source) in self._rows

    def sources(self) -> Sequence[str]:
        """The pictures that have a row, in Unicode normal form NFC, in the file's order."""
        return tuple(self._rows)

    def points(self, source: str) -> npt.NDArray[np.float64] | None:
        """Return the (68, 2) landmarks of a picture in pixels; None if it has no row, or one that says "not found" in every cell.

        Not found: an empty cell or ``nan``; or all 68 points in one place, such as zeros or -1.

        Raises:
            ValueError: the row has too few or too many cells, one that is no number, one that is infinite, or only some that are empty.
        """
        source = same_name(source)
        if source not in self._rows:
            return None
        number, line = self._rows[source]
        cells = next(csv.reader([line]))[1:]
        where = f"{self.path}: line {number} ({source})"
        if len(cells) != 136:
            raise ValueError(f"{where} has {len(cells)} coordinates, 136 are needed")
        try:
            values = [float(cell) if cell.strip() else math.nan for cell in cells]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        missing = sum(math.isnan(value) for value in values)
        if missing == 136:
            return None
        if missing or not all(map(math.isfinite, values)):
            column = LANDMARKS_HEADER[1:][next(i for i, value in enumerate(values) if not math.isfinite(value))]
            raise ValueError(f"{where}: {column} is not a finite number. Leave all 136 cells empty where no face was found")
        points = np.array(values).reshape(68, 2)
        return None if is_one_place(points) else points
