from __future__ import annotations

import numpy as np
import pytest

from bench.dataset import BadPictureError, Dataset, Face, Item
from bench.prepare.plausibility import check_plausible, find_faults, is_one_place, looks_like_face

SIDE = 96


def face_points(seed=0):
    """68 points of a frontal face in a picture of SIDE pixels, a little moved."""
    points = np.empty((68, 2))
    turn = np.linspace(np.pi, 0, 17)
    points[:17] = np.stack([48 + 36 * np.cos(turn), 44 + 44 * np.sin(turn)], axis=1)
    points[17:27] = np.stack([np.linspace(18, 78, 10), np.full(10, 24)], axis=1)
    points[27:36] = np.stack([np.full(9, 48), np.linspace(34, 56, 9)], axis=1)
    points[36:42] = np.stack([np.linspace(24, 38, 6), np.full(6, 36)], axis=1)
    points[42:48] = np.stack([np.linspace(58, 72, 6), np.full(6, 36)], axis=1)
    points[48:] = np.stack([np.linspace(32, 64, 20), np.full(20, 70)], axis=1)
    return points + np.random.default_rng(seed).uniform(-3, 3, 2)


def rolled(points, degrees):
    a = np.deg2rad(degrees)
    middle = np.full(2, SIDE / 2)
    return (points - middle) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + middle


MISTAKES = {
    "x and y look exchanged": lambda p: p[:, ::-1],
    "x0..x67, then y0..y67": lambda p: p.T.reshape(68, 2),
    "upside down": lambda p: p * (1, -1) + (0, SIDE - 1),
    "left and right look exchanged": lambda p: p * (-1, 1) + (SIDE - 1, 0),
    "another frame: landmarks of pictures of about 20": lambda p: p * (224 / SIDE),
    "in its upper left quarter only": lambda p: p * 0.1,
}


class Drawn(Dataset):
    """Faces whose landmarks are given."""

    classes = ("anger", "fear")

    def __init__(self, points):
        super().__init__(Dataset.Options(), raw=None)
        self.points = points

    def splits(self):
        return {}

    def read(self, item):
        points = self.points[int(item.source)]
        if isinstance(points, str):
            raise BadPictureError(points)
        return Face(image=np.zeros((SIDE, SIDE, 3), np.uint8), landmarks=points)


def check(points):
    items = tuple(Item(source=str(i), label=0) for i in range(len(points)))
    return check_plausible(Drawn(points), split="train", items=items)


def test_right_landmarks_pass_without_a_note():
    assert check([face_points(i) for i in range(20)]) == []


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_mistake_of_all_faces_is_refused_with_its_cause(cause):
    with pytest.raises(ValueError, match=f"train cannot be right in 100% of 20 faces looked at: .*{cause}"):
        check([MISTAKES[cause](face_points(i)) for i in range(20)])


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_mistake_of_a_minority_is_noted(cause):
    (note,) = check([MISTAKES[cause](face_points(i)) if i % 5 == 0 else face_points(i) for i in range(20)])
    assert "in 20% of 20 faces" in note
    assert cause in note


def test_heads_that_are_rolled_by_90_degrees_are_not_refused():
    check([rolled(face_points(i), 90 * (i % 2) + 10) for i in range(20)])


def test_profiles_are_not_taken_for_a_mistake():
    def profile(points):
        return (points - (48, 0)) * (0.05, 1) + (48, 0)

    assert check([profile(face_points(i)) if i % 2 else face_points(i) for i in range(20)]) == []


def test_a_few_faces_are_never_refused():
    assert len(check([MISTAKES["upside down"](face_points(i)) for i in range(4)])) == 1


def test_bad_pictures_and_faces_without_landmarks_are_passed_over():
    assert check(["damaged", None, *(face_points(i) for i in range(9))]) == []


def test_no_face_has_no_fault():
    assert find_faults([]) == {}


@pytest.mark.parametrize("value", [0, -1, 5])
def test_points_in_one_place_are_recognised(value):
    assert is_one_place(np.full((68, 2), float(value)))
    assert not is_one_place(face_points())


def test_a_face_rolled_by_30_degrees_looks_like_one():
    assert looks_like_face(rolled(face_points(), 30))
