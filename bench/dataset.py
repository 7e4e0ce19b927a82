"""The contract of a dataset entry: which pictures there are, in which split, and how to read one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from bench.registry import EntryInfo, EntryOptions, Registry

EXPRESSIONS = ("neutral", "happiness", "surprise", "fear", "anger", "disgust", "sadness")
"""The seven expressions, in the order of the published code: class id = position."""

_SYNONYMS = {
    "neutral": ("neutrality", "calm"),
    "happiness": ("happy", "joy"),
    "surprise": ("surprised",),
    "fear": ("fearful", "afraid", "scared"),
    "anger": ("angry",),
    "disgust": ("disgusted",),
    "sadness": ("sad",),
}
EXPRESSION_NAMES: Mapping[str, int] = {name: i for i, expression in enumerate(EXPRESSIONS) for name in (expression, *_SYNONYMS[expression])}
"""Names of classes that are expressions, in lower case -> position in `EXPRESSIONS`."""
SPLITS = ("train", "val", "test")

Frame = Literal["stored", "upright"]
"""Pixels that landmarks count: those stored in the file, or those seen after the EXIF orientation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo(EntryInfo):
    """Data of a dataset entry."""

    license: str
    """What the user may do with the pictures, in a sentence."""
    embedded: bool = False
    """True if the pictures are made by the project itself, so that no ``--raw`` folder is needed."""


class DatasetOptions(EntryOptions):
    """Options every dataset has."""

    size: int = Field(default=256, ge=16, le=4096)
    """Side, in pixels, of the square pictures stored in the shards."""
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of the stored pictures."""
    landmarks: Literal["shipped", "face-alignment", "dlib", "none"] = "shipped"
    """Where the 68 landmarks come from: what the dataset brings along, a network that finds them, or nowhere."""


class Box(NamedTuple):
    """A face in pixels of a picture."""

    left: float
    top: float
    right: float
    bottom: float


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
    box: Box | None = None
    """Where the face is, if the dataset knows: spares the search where landmarks are to be found."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON-able facts to store beside the picture (the action units drawn, for instance)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What `Dataset.read` does with a picture file, for those who have another file and nothing else of the dataset."""

    landmark_frame: Frame = "stored"
    """Pixels that the landmarks of the file count."""
    aligned: bool = False
    """Whether the face is turned, scaled and cut onto the template of `bench.prepare.alignment`."""
    needs: str = ""
    """What reading takes beyond the file and its 68 landmarks, in words (a box of the annotation, for instance); empty: nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A line of a dataset's annotation that cannot be used. It is reported among the bad pictures."""

    split: str
    """``train`` or ``test``, or what the line says in its place."""
    source: str
    reason: str


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

    @classmethod
    def reading(cls, options: DatasetOptions, provenance: Mapping[str, Any]) -> Reading:  # noqa: ARG003 - what others need
        """What `read` does with a file, where ``provenance`` is that of the index. By default it takes the whole picture."""
        return Reading()

    def rejected(self) -> Sequence[Rejected]:
        """Lines of the annotation that name no usable picture. Called after `splits`."""
        return ()

    def expected(self) -> Mapping[str, Mapping[str, int]]:
        """Published number of pictures: split -> class -> count; splits left out are not checked.

        Pictures of ``val`` count as ``train`` where ``train`` alone is expected: val is cut from it.
        """
        return {}

    def provenance(self) -> Mapping[str, Any]:
        """JSON-able facts for the index (rule and hash of a cut split, mapping of labels). Called after `splits`."""
        return {}


DATASETS: Registry[Dataset, DatasetInfo] = Registry("dataset", group="bench.datasets", base=lambda: Dataset, info=DatasetInfo)
