from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from bench.data.index import load_index
from bench.prepare import landmark_check
from bench.prepare.landmark_check import (
    PARTS,
    Agreement,
    Compared,
    check_landmarks,
    draw_agreement,
    draw_sample,
    normalised_errors,
    worst_first,
)
from bench.prepare.landmarks import Landmarker
from bench.prepare.pack import prepare


def face(eyes=10.0):
    """68 points on a line, outer eye corners ``eyes`` apart."""
    points = np.zeros((68, 2))
    points[36], points[45] = (0, 0), (0.6 * eyes, 0.8 * eyes)
    return points


def compared(name, errors, *, first=True, second=True, split="test"):
    some = np.zeros((68, 2))
    return Compared(
        split=split,
        source=name,
        shard=None,
        member=None,
        first=some if first else None,
        second=some if second else None,
        errors=None if errors is None else np.broadcast_to(np.asarray(errors, float), (68,)),
    )


def test_an_error_is_a_distance_in_units_of_the_outer_eye_corners():
    second = face()
    second[30] += [3, 4]  # 5 pixels, the eyes are 10 apart
    errors = normalised_errors(face(), second)
    assert errors[30] == pytest.approx(0.5)
    assert errors.sum() == pytest.approx(0.5)


def test_the_unit_is_that_of_the_first_source():
    assert normalised_errors(face(eyes=10), face(eyes=20))[45] == pytest.approx(1.0)
    assert normalised_errors(face(eyes=20), face(eyes=10))[45] == pytest.approx(0.5)


def test_an_error_does_not_change_with_the_size_of_the_picture():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 68, 2))
    np.testing.assert_allclose(normalised_errors(first, second), normalised_errors(3 * first + 7, 3 * second + 7))


def test_a_face_without_a_distance_of_the_eyes_has_no_error():
    assert normalised_errors(np.zeros((68, 2)), face()) is None


def test_every_point_belongs_to_one_part():
    assert sorted(point for part in PARTS.values() for point in part) == list(range(68))


def test_the_summary_is_over_faces_then_over_parts():
    jaw = np.where(np.arange(68) < 17, 0.4, 0.0)  # mean over the face: 0.1
    faces = [compared("a", 0.1), compared("b", 0.2), compared("c", 0.6), compared("d", jaw), compared("e", None, second=False)]
    summary = Agreement(sources=("stored", "dlib"), faces=tuple(worst_first(faces))).summary()
    assert summary["mean"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.1) / 4)
    assert summary["median"] == pytest.approx(0.15)
    assert summary["90th percentile"] == pytest.approx(0.2 + 0.7 * 0.4)  # sorted 0.1 0.1 0.2 0.6, place 2.7
    assert summary["jaw"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.4) / 4)
    assert summary["mouth"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.0) / 4)


def test_the_worst_come_first_and_faces_without_an_error_last():
    faces = [
        compared("b", None, first=False),
        compared("z", 0.1),
        compared("a", 0.1),
        compared("w", 0.9),
        compared("a", None, second=False),
    ]
    assert [(face.source, face.error is None) for face in worst_first(faces)] == [
        ("w", False), ("a", False), ("z", False), ("a", True), ("b", True),
    ]  # fmt: skip


def test_faces_that_a_source_did_not_find_are_counted_for_it():
    faces = [
        compared("a", 0.1),
        compared("b", None, first=False),
        compared("c", None, second=False),
        compared("d", None, first=False, second=False),
        compared("e", None),
    ]
    agreement = Agreement(sources=("stored", "dlib"), faces=tuple(faces))
    assert agreement.missing == (2, 2)
    assert agreement.incomparable == 1
    assert agreement.errors.shape == (1, 68)


def test_nothing_to_compare_is_an_empty_summary():
    assert Agreement(sources=("stored", "dlib"), faces=(compared("a", None, first=False),)).summary() == {}


def points_of(number):
    """Landmarks of the drawn pictures: a grid, the outer eye corners 30 pixels apart."""
    points = np.stack([10 + np.arange(68) % 9 * 4, 12 + np.arange(68) // 9 * 5], axis=1).astype(float) + number % 3
    points[36], points[45] = (15, 30), (45, 30)
    return points


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared dataset of grey pictures whose brightness is their number; every fifth has no landmarks."""
    raw = tmp_path_factory.mktemp("raw")
    rows = [",".join(["path", *(f"{axis}{i}" for i in range(68) for axis in "xy")])]
    number = 0
    for split, count in (("train", 4), ("val", 2), ("test", 15)):
        for _ in range(count):
            source = f"{split}/fear/{number:02d}.png"
            (raw / source).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 10 * number, np.uint8)).save(raw / source)
            if number % 5:
                rows.append(",".join([source, *map(str, points_of(number).ravel())]))
            number += 1
    (raw / "landmarks.csv").write_text("\n".join(rows))
    out = tmp_path_factory.mktemp("prepared") / "greys"
    prepare("folder", name="greys", options={"size": 64}, raw=raw, out=out, workers=1, allow_partial=True)
    return out


class Known(Landmarker):
    """Finds the points of each picture, off by its number of tenths of a pixel; no face in picture 7."""

    def find(self, images, boxes):
        assert list(boxes) == [None] * len(images)
        numbers = [round(image.mean() / 10) for image in images]
        return [None if number == 7 else points_of(number) + np.array([0, number / 10]) for number in numbers]


@pytest.fixture
def known(monkeypatch):
    """Stands for dlib."""
    monkeypatch.setattr(landmark_check, "describe_source", lambda name, *, weights: {"name": name})
    monkeypatch.setattr(landmark_check, "open_landmarker", lambda name, *, weights: Known())


def test_a_sample_is_the_same_every_time_and_part_of_a_larger_one(folder):
    index = load_index(folder)
    keys = [member.key for _, _, member in draw_sample(index, split="test", count=6)]
    assert keys == [member.key for _, _, member in draw_sample(index, split="test", count=6)]
    assert keys == [member.key for _, _, member in draw_sample(index, split="test", count=12)][:6]
    assert keys != sorted(keys)
    everything = draw_sample(index, split="all", count=100)
    assert len({(split, member.key) for split, _, member in everything}) == len(everything) == 21
    assert all(member in shard.members for _, shard, member in everything)


def test_a_split_that_is_not_there_gets_the_nearest(folder):
    with pytest.raises(ValueError, match=r"--split tset: choose one of: train, val, test, all\. Did you mean 'test'"):
        check_landmarks(folder, first="stored", second="dlib", split="tset")


def test_stored_landmarks_are_compared_with_what_is_found(folder, known):
    reports = []
    agreement = check_landmarks(folder, first="stored", second="dlib", on_progress=lambda *now: reports.append(now))
    errors = {face.source: face.error for face in agreement.faces if face.error is not None}
    numbers = [n for n in range(6, 21) if n % 5 and n != 7]
    assert errors == pytest.approx({f"test/fear/{n:02d}.png": n / 10 / 30 for n in numbers}, abs=1e-4)
    assert list(errors) == [f"test/fear/{n:02d}.png" for n in reversed(numbers)]
    assert agreement.missing == (3, 1)  # 10, 15 and 20; 7
    assert reports == [(15, 15)]


def test_the_order_of_the_sources_is_the_callers(folder, known):
    agreement = check_landmarks(folder, first="dlib", second="stored", split="all")
    assert len(agreement.faces) == 21
    assert agreement.missing == (1, 5)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("dlib", "dlib", "both sources are 'dlib'"),
        ("stored", "dilb", "'dilb'.*Did you mean 'dlib'"),
        ("shipped", "dlib", "'shipped': choose one of: stored, face-alignment, dlib"),
    ],
)
def test_sources_that_cannot_be_compared_are_refused(folder, first, second, words):
    with pytest.raises(ValueError, match=words):
        check_landmarks(folder, first=first, second=second)


def test_the_sheet_shows_both_sets_of_points_the_worst_face_first(folder, known):
    agreement = check_landmarks(folder, first="stored", second="dlib")
    sheet = np.asarray(draw_agreement(folder, agreement, faces=8, cell=64)).astype(int)
    assert sheet.shape == (24 + 2 * (68 + 34), 6 * 68 + 4, 3)
    cells = [sheet[24 + 102 * (i // 6) :, 4 + 68 * (i % 6) :][:64, :64] for i in range(8)]
    shades = [round(np.median(cell) / 10) for cell in cells]
    assert shades == [19, 18, 17, 16, 14, 13, 7, 10]  # two of eight places are for faces that one source alone found
    green = [((cell[..., 1] > 240) & (cell[..., 0] < 80)).any() for cell in cells]
    red = [((cell[..., 0] > 240) & (cell[..., 1] < 90)).any() for cell in cells]
    assert green == [True] * 7 + [False]
    assert red == [True] * 6 + [False, True]


def test_a_sheet_of_faces_nobody_found_is_still_a_picture(folder):
    assert draw_agreement(folder, Agreement(sources=("stored", "dlib"), faces=(compared("a", None, first=False, second=False),))).width > 0


def test_dlib_itself_is_asked(folder):
    pytest.importorskip("dlib")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("face_recognition_models is not installed")
    agreement = check_landmarks(folder, first="stored", second="dlib", samples=3)
    assert agreement.missing[1] == 3  # grey pictures have no face
    assert agreement.summary() == {}
