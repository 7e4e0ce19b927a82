"""Whether a dataset's landmarks can be those of its faces: judged over many pictures, so that a turned head never matters.

A photograph of a face may be rolled or turned, but never reflected: points whose left and right, or top and bottom, or x and y are
exchanged are those of no picture at all. Each such mistake is undone in turn, and the one that makes the bulk of the faces fit is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from bench.dataset import BadPictureError, Dataset, Item

Points = npt.NDArray[np.float64]

BULK = 0.6
"""Share of the faces at which a mistake is that of the dataset, not of some pictures."""
MINORITY = 0.1
"""Share of the faces at which a mistake is worth a note."""
FEWEST = 8
"""Faces below which nothing is refused: a few may all be turned."""
SAMPLE = 128
"""Pictures of a split that are looked at, spread evenly over its list."""

_LEFT_EYE, _RIGHT_EYE, _MOUTH = slice(36, 42), slice(42, 48), slice(48, 68)  # as seen in the picture
_REPAIRS: Mapping[str, Callable[[Points], Points]] = {
    "x and y look exchanged": lambda points: points[:, ::-1],
    "the columns look like x0..x67, then y0..y67, in place of x0,y0,x1,y1": lambda points: points.reshape(2, 68).T,
    "they look upside down: y must grow downwards from the top edge": lambda points: points * (1, -1),
    "left and right look exchanged: x must grow rightwards, and point 36 is the eye corner at the left of the picture": lambda points: (
        points * (-1, 1)
    ),
}


def is_one_place(points: Points) -> bool:
    """Whether all points are the same: zeros, or -1, as many programs write "no face found"."""
    return bool((points == points[0]).all())


def looks_like_face(points: Points) -> bool:
    """Whether (68, 2) points have two eyes side by side above a mouth, rolled by less than 45 degrees."""
    extent = float(np.ptp(points, axis=0).max())
    left, right, mouth = (points[part].mean(axis=0) for part in (_LEFT_EYE, _RIGHT_EYE, _MOUTH))
    across, down = right - left, mouth - (left + right) / 2
    return bool(across[0] > max(0.1 * extent, abs(across[1])) and down[1] > max(0.15 * extent, abs(down[0])))


def find_faults(faces: Iterable[tuple[Points, int, int]]) -> dict[str, float]:
    """The mistakes that landmarks seem to have, with the share of the faces that have them.

    Args:
        faces: (68, 2) landmarks in pixels, and width and height of the picture.
    """
    listed = list(faces)
    if not listed:
        return {}
    counts = dict.fromkeys(_REPAIRS, 0)
    beyond, corner = [], []
    for points, width, height in listed:
        if not looks_like_face(points):
            for cause, repair in _REPAIRS.items():
                counts[cause] += looks_like_face(repair(points))
        reach = points.max(axis=0) + 0.5
        # A head that the edge cuts off leaves some points outside; a quarter of them, and so far, is another frame.
        outside = (points > np.array([width, height]) * 1.05).any(axis=1).mean() > 0.25
        if outside:
            beyond.append(reach.max())
        elif (reach < np.array([width, height]) / 2).all():
            corner.append(reach.max())
    faults = {cause: count / len(listed) for cause, count in counts.items() if count}
    sides = f"the pictures are about {np.median([width for _, width, _ in listed]):.0f} x {np.median([h for _, _, h in listed]):.0f}"
    for reaches, where in ((beyond, "beyond the picture's edge"), (corner, "in its upper left quarter only")):
        if reaches:
            frame = f"landmarks of pictures of about {np.median(reaches):.0f} pixels or more, but {sides}"
            faults[f"they lie {where}, as if of another frame: {frame}"] = len(reaches) / len(listed)
    return faults


def check_plausible(dataset: Dataset, *, split: str, items: tuple[Item, ...]) -> list[str]:
    """Look at the landmarks that a dataset brings, as read, in a sample of a split.

    Returns:
        Sentences about mistakes of a minority of the faces.

    Raises:
        ValueError: the bulk of the faces has landmarks that cannot be right; the message names the likely cause.
    """
    step = max(1, len(items) // SAMPLE)
    faces = []
    for item in items[::step][:SAMPLE]:
        try:
            face = dataset.read(item)
        except BadPictureError:  # reported when the shards are made
            continue
        if face.landmarks is not None and face.landmarks.shape == (68, 2):
            faces.append((face.landmarks, face.image.shape[1], face.image.shape[0]))
    notes = []
    for cause, share in sorted(find_faults(faces).items(), key=lambda fault: -fault[1]):
        words = f"the landmarks of {split} cannot be right in {share:.0%} of {len(faces)} faces looked at: {cause}"
        if share >= BULK and len(faces) >= FEWEST:
            raise ValueError(f"{words}. Correct them, or find them anew with --landmarks face-alignment or dlib, or go on with none")
        if share >= MINORITY:
            notes.append(words)
    return notes
