"""Faces for the site's gallery, out of prepared data, where they may be shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.au.maps import expression_ids
from bench.data.index import INDEX_NAME, Index, load_index
from bench.data.stored import read_sample
from bench.dataset import DATASETS
from bench.evaluation.class_maps import SIDE, Bytes
from bench.evaluation.maps import stored_au_maps
from bench.sweep.record import Record


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faces:
    """E faces of a test split."""

    pictures: tuple[npt.NDArray[np.uint8], ...]
    """Each (S, S, 3), as stored."""
    au_maps: Bytes
    """(E, 32, 32)."""
    has_au_map: tuple[bool, ...]


class Prepared:
    """The prepared datasets below a folder, by fingerprint."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, tuple[Path, Index]] | None = None

    def find(self, fingerprint: str) -> tuple[Path, Index] | None:
        """Folder and index of the dataset with this fingerprint."""
        if self._found is None:
            self._found = {}
            for path in sorted(self.root.glob(f"*/{INDEX_NAME}")):
                index = load_index(path.parent)
                self._found[index.fingerprint] = (path.parent, index)
        return self._found.get(fingerprint)


def load_faces(prepared: Prepared, record: Record, positions: Sequence[int], *, allow: bool) -> Faces | str:
    """The test faces at these positions, or a sentence that says why they are not shown.

    Args:
        prepared: where to look.
        record: of a cell that was tested on them.
        positions: in its test split.
        allow: also show pictures that the project did not draw itself. Most licences forbid their publication.

    Raises:
        ValueError: a prepared dataset is damaged.
    """
    if not (allow or _is_embedded(record.data.entry)):
        return f"The faces are not shown: pictures of {record.cell.dataset} are not ours to publish."
    dataset = prepared.find(record.data.fingerprint)
    if dataset is None:
        return f"The faces are not shown: the prepared data ({record.data.fingerprint[:8]}) were not available when this page was made."
    folder, index = dataset
    # The entry in the index of the folder decides: a record can claim any entry.
    if not (allow or _is_embedded(index.entry)):
        return f"The faces are not shown: pictures of {index.name} are not ours to publish."
    split = index.splits[record.data.split]
    located = [(shard, member) for shard in split.shards for member in shard.members]
    samples = [(read_sample(folder, *located[position]), located[position][1].label) for position in positions]
    points = np.stack([np.full((68, 2), np.nan) if sample.landmarks is None else sample.landmarks for sample, _ in samples])
    maps, valid = stored_au_maps(
        torch.from_numpy(points).float(),
        expression_ids(index.classes)[[label for _, label in samples]],
        stored=index.image_size,
        size=SIDE,
        variant=record.evaluation["au_maps"],
    )
    return Faces(
        pictures=tuple(np.asarray(sample.image) for sample, _ in samples),
        au_maps=(maps * 255).round().byte().numpy(),
        has_au_map=tuple(valid.tolist()),
    )


def _is_embedded(entry: str) -> bool:
    return entry in DATASETS and DATASETS.get(entry).info.embedded
