"""The contract of a dataset entry: which pictures there are, in which split, and how to read one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.registry import EntryInfo, EntryOptions, Registry

EXPRESSIONS = ("neutral", "happiness", "surprise", "fear", "anger", "disgust", "sadness")
"""The seven expressions, in the order of the published code (METHODS.md 1.6): class id = position."""

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo(EntryInfo):
    """Data of a dataset entry."""

    license: str
    """What the user may do with the pictures, in a sentence."""
    embedded: bool = False
    """True if the pictures are made by the project itself, so that no ``--raw`` folder is needed."""


class DatasetOptions(EntryOptions):
    """Options every dataset has."""

    size: int = 256
    """Side, in pixels, of the square pictures stored in the shards."""
    quality: int = 95
    """JPEG quality of the stored pictures, 1 to 100."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture before it is read."""

    source: str
    """What names the picture in reports: its path relative to the raw folder, with ``/``."""
    label: int
    """Position in `Dataset.classes`."""
    identity: str | None = None
    """The person shown, where known; bootstrap intervals are clustered by it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """One picture as read."""

    image: npt.NDArray[np.uint8]
    """(height, width, 3), RGB."""
    landmarks: npt.NDArray[np.float64] | None
    """(68, 2), x and y in pixels of ``image``, iBUG order; None where not found."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON-able facts to store beside the picture (the action units drawn, for instance)."""


class BadPictureError(ValueError):
    """A picture that cannot be used; the message says why. It is reported and counted, never silently dropped."""


class Dataset(ABC):
    """Where pictures come from. Instances are rebuilt in worker processes from (name, options, raw)."""

    class Options(DatasetOptions):
        """Accepted keys of ``[datasets.NAME]``."""

    def __init__(self, options: Options, *, raw: Path | None) -> None:
        """Keep the options. ``raw`` is the folder of the user's download, None for embedded datasets."""
        self.options = options
        self.raw = raw

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names; class id = position."""

    @abstractmethod
    def splits(self) -> Mapping[str, Sequence[Item]]:
        """All pictures of each split in a deterministic order. Called once, in the main process.

        Raises:
            ValueError: the raw folder does not have the expected layout; the message says what is missing where.
        """

    @abstractmethod
    def read(self, item: Item) -> Face:
        """Read one picture with its landmarks. Called in worker processes.

        Raises:
            BadPictureError: the picture cannot be used.
        """

    def provenance(self) -> Mapping[str, Any]:
        """JSON-able facts for the index (rule and hash of a cut split, mapping of labels). Called after `splits`."""
        return {}


DATASETS: Registry[Dataset, DatasetInfo] = Registry("dataset", group="bench.datasets", base=lambda: Dataset, info=DatasetInfo)
