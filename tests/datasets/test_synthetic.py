from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from bench.dataset import DATASETS, EXPRESSIONS, Item
from bench.datasets.synthetic import REPERTOIRE, SyntheticFaces, sample_identity, sample_units
from bench.prepare.synthetic_face import FACS, View, draw, project, shape

# Landmarks at which the codebook anchors each action unit, and how far from them its evidence may reach, in face units
# (half the breadth of a face is 1).
ANCHORS = {
    0: ((20, 23, 21, 22), 0.33),
    1: ((18, 25, 19, 24), 0.33),
    2: ((19, 20, 21, 22, 23, 24), 0.28),
    3: (tuple(range(36, 48)), 0.15),
    4: ((36, 39, 40, 41, 42, 45, 46, 47), 0.48),
    5: (tuple(range(36, 48)), 0.2),
    6: ((28, 29, 31, 35), 0.32),
    7: ((31, 35, 48, 50, 52, 54), 0.3),
    8: ((48, 54, 51, 57), 0.42),
    10: ((48, 54), 0.35),
    11: ((57, 58, 56, 8, 7, 9), 0.3),
    12: ((48, 54, 51, 57), 0.35),
    13: ((48, 51, 54, 57), 0.3),
    14: ((48, 51, 54, 57), 0.3),
    15: ((51, 57, 48, 54), 0.25),
    16: (tuple(range(48, 68)), 0.35),
    18: (tuple(range(48, 68)), 0.4),
    19: ((59, 55, 57), 0.3),
}


def dataset(**options) -> SyntheticFaces:
    return SyntheticFaces(SyntheticFaces.Options(**options), raw=None)


def digest(ds: SyntheticFaces, split: str = "train", index: int = 5) -> str:
    face = ds.read(ds.item(split, index))
    return hashlib.sha256(face.image.tobytes() + face.landmarks.tobytes()).hexdigest()


def portrait(units, *, seed=3, size=192, view=None):
    return draw(sample_identity(np.random.default_rng(seed)), units, view or View(), size=size, rng=np.random.default_rng(0))


def test_registered_as_embedded():
    entry = DATASETS.get("synthetic")
    assert entry.target is SyntheticFaces
    assert entry.info.embedded


def test_same_seed_and_index_give_the_same_bytes():
    assert digest(dataset(seed=4)) == digest(dataset(seed=4))


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from bench.datasets.synthetic import SyntheticFaces as S; d = S(S.Options(seed=4), raw=None);"
        "f = d.read(d.item('train', 5)); print(hashlib.sha256(f.image.tobytes() + f.landmarks.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == digest(dataset(seed=4))


def test_seed_split_and_index_each_change_the_picture():
    ds = dataset()
    assert len({digest(ds), digest(dataset(seed=1)), digest(ds, "val"), digest(ds, "test"), digest(ds, index=6)}) == 5


def test_items_do_not_depend_on_how_many_there_are():
    few, many = dataset(train=20, val=3, test=3).splits(), dataset(train=50, val=3, test=3).splits()
    assert list(few["train"]) == list(many["train"])[:20]


def test_splits_have_the_asked_counts_and_distinct_sources():
    splits = dataset(train=30, val=10, test=20).splits()
    assert {split: len(items) for split, items in splits.items()} == {"train": 30, "val": 10, "test": 20}
    sources = [item.source for items in splits.values() for item in items]
    assert len(set(sources)) == 60
    assert splits["train"][12].source == "synthetic/train/000012"


def test_no_person_is_in_two_splits():
    splits = dataset(train=600, val=200, test=300).splits()
    people = {split: {item.identity for item in items} for split, items in splits.items()}
    assert {split: len(names) for split, names in people.items()} == {"train": 256, "val": 64, "test": 128}
    assert len(set.union(*people.values())) == 256 + 64 + 128


def test_people_of_different_splits_look_different():
    ds = dataset(train_identities=1, val_identities=1, test_identities=1)
    looks = {json.dumps(ds.read(ds.item(split, i)).extra["identity"], sort_keys=True) for split in ("train", "val", "test") for i in (0, 1)}
    assert len(looks) == 3


def test_labels_are_balanced_in_every_prefix():
    labels = [item.label for item in dataset(train=703, val=1, test=1).splits()["train"]]
    for count in (7, 70, 703):
        counts = Counter(labels[:count])
        assert max(counts.values()) - min(counts[c] for c in range(7)) <= 1


def test_label_is_independent_of_the_person():
    items = dataset(train=7 * 256, val=1, test=1).splits()["train"]
    table = np.zeros((256, 7))
    for item in items:
        table[int(item.identity[-4:]), item.label] += 1
    chi2 = ((table - 1.0) ** 2).sum()  # every cell expects 1; the statistic has 255 * 6 degrees of freedom
    assert 1300 < chi2 < 1760  # mean 1530, standard deviation 55: four of them


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_landmarks_are_finite_and_near_the_picture(split):
    ds = dataset(size=64)
    for index in range(60):
        landmarks = ds.read(ds.item(split, index)).landmarks
        assert landmarks.shape == (68, 2)
        assert landmarks.dtype == np.float64
        assert np.isfinite(landmarks).all()
        assert landmarks[17:].min() > 0  # brows, eyes, nose and mouth are in the picture, the chin nearly so
        assert landmarks[17:].max() < 64
        assert landmarks.min() > -0.15 * 64
        assert landmarks.max() < 1.15 * 64


def test_landmarks_are_in_ibug_order():
    p = shape(sample_identity(np.random.default_rng(0)), {})
    assert (np.diff(p[:17, 0]) > 0).all()
    assert p[8, 1] == p[:, 1].max()
    assert (np.diff(p[17:27, 0]) > 0).all()
    assert (np.diff(p[27:31, 1]) > 0).all()
    assert (np.diff(p[31:36, 0]) > 0).all()
    assert p[36, 0] < p[39, 0] < p[42, 0] < p[45, 0]
    assert (p[[37, 38], 1] < p[[41, 40], 1]).all()
    assert (p[[43, 44], 1] < p[[47, 46], 1]).all()
    assert p[48, 0] == p[48:68, 0].min()
    assert p[54, 0] == p[48:68, 0].max()
    assert (p[[50, 51, 52], 1] < p[[61, 62, 63], 1]).all()
    assert (p[[61, 62, 63], 1] <= p[[67, 66, 65], 1]).all()
    assert (p[[67, 66, 65], 1] < p[[58, 57, 56], 1]).all()


@pytest.mark.parametrize("unit", sorted(FACS))
def test_an_action_unit_changes_the_picture_where_it_is_anchored(unit):
    landmarks_at, reach = ANCHORS[unit]
    shares, areas = [], []
    for seed in (1, 2, 3, 4):  # one person's fringe or glasses may hide the part
        rest, still = portrait({}, seed=seed)
        moved, landmarks = portrait({unit: 1.0}, seed=seed)
        energy = ((moved.astype(float) - rest) ** 2).sum(axis=2)
        assert energy.sum() > 0
        centres = np.concatenate([still[list(landmarks_at)], landmarks[list(landmarks_at)]])
        grid = np.stack(np.meshgrid(np.arange(192) + 0.5, np.arange(192) + 0.5), axis=-1)
        distance = np.linalg.norm(grid[:, :, None] - centres, axis=-1).min(axis=-1)
        near = distance < reach * View().scale * 192
        shares.append(energy[near].sum() / energy.sum())
        areas.append(near.mean())
    assert np.mean(shares) > 0.75
    assert np.mean(areas) < 0.27


def test_without_action_units_nothing_moves():
    np.testing.assert_array_equal(portrait({})[0], portrait({0: 0.0, 15: 0.0})[0])


@pytest.mark.parametrize(
    ("unit", "landmark", "axis", "sign"),
    [
        *[(0, 21, 1, -1), (1, 17, 1, -1), (2, 22, 1, 1), (2, 21, 0, 1), (3, 37, 1, -1), (4, 41, 1, -1), (5, 40, 1, -1), (6, 31, 1, -1)],
        *[(7, 51, 1, -1), (8, 48, 1, -1), (8, 54, 0, 1), (10, 54, 1, 1), (11, 57, 1, -1), (12, 48, 0, -1), (13, 48, 0, 1), (14, 57, 1, -1)],
        *[(15, 66, 1, 1), (16, 8, 1, 1), (18, 8, 1, 1), (19, 57, 1, 1)],
    ],
)
def test_an_action_unit_moves_its_landmark_the_anatomical_way(unit, landmark, axis, sign):
    _, rest = portrait({})
    _, moved = portrait({unit: 1.0})
    assert sign * (moved - rest)[landmark, axis] > 0.01 * 192


@pytest.mark.parametrize("unit", [15, 16, 18])
def test_parting_lips_opens_the_inner_mouth_landmarks_around_a_changed_inside(unit):
    rest, still = portrait({})
    moved, landmarks = portrait({unit: 1.0})
    gap = landmarks[66, 1] - landmarks[62, 1]
    assert gap > still[66, 1] - still[62, 1] + 0.03 * 192
    x, y = landmarks[[62, 66]].mean(axis=0)
    assert np.abs(moved[int(y), int(x)].astype(int) - rest[int(y), int(x)]).max() > 40


def test_lips_and_lids_never_cross():
    rng = np.random.default_rng(0)
    for _ in range(200):
        units = {unit: float(rng.random()) for unit in FACS if rng.random() < 0.5}
        p = shape(sample_identity(rng), units, View(skew=float(rng.random() - 0.5), droop=0.04))
        assert (p[[61, 62, 63], 1] <= p[[67, 66, 65], 1] + 1e-12).all()
        for eye in (36, 42):
            assert p[[eye + 4, eye + 5], 1].mean() > p[[eye + 1, eye + 2], 1].mean()


def test_the_picture_follows_the_landmarks_under_pose():
    """The dark pupils are drawn at the middle between the eye corners, so the landmarks must point at them in any pose."""
    for view in (View(), View(yaw=18, pitch=-10, roll=12, scale=0.33, shift_x=0.04), View(yaw=-18, pitch=10, roll=-14)):
        face = sample_identity(np.random.default_rng(5))
        image, landmarks = draw(face, {3: 1.0}, view, size=224, rng=np.random.default_rng(0))
        for corners in ((36, 39), (42, 45)):
            x, y = landmarks[list(corners)].mean(axis=0)
            reach = 0.09 * view.scale * 224
            patch = image[int(y - 1.6 * reach) : int(y + reach), int(x - reach) : int(x + reach)].astype(float).sum(axis=2)
            assert patch.min() < 120  # the pupil
            cheek = image[int(y + 5 * reach), int(x)].astype(float).sum()
            assert patch.min() < cheek


def test_projection_is_a_similarity_when_the_head_faces_the_camera():
    p = shape(sample_identity(np.random.default_rng(1)), {})
    plain, turned = project(p, View()), project(p, View(roll=30.0, shift_x=0.1))
    apart = np.linalg.norm(plain[:, None] - plain[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(turned[:, None] - turned[None], axis=-1), apart, atol=1e-12)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_any_size_shows_the_same_scene_with_scaled_landmarks(size):
    options = {"noise": 0.0, "seed": 2}
    small, large = dataset(size=size, **options), dataset(size=192, **options)
    a, b = small.read(small.item("val", 3)), large.read(large.item("val", 3))
    assert a.image.shape == (size, size, 3)
    assert a.image.dtype == np.uint8
    np.testing.assert_allclose(a.landmarks / size, b.landmarks / 192, atol=1e-12)
    bins = 16
    coarse = [f.image.reshape(bins, len(f.image) // bins, bins, len(f.image) // bins, 3).mean(axis=(1, 3)) for f in (a, b)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 4.0


def test_each_expression_draws_varying_subsets_of_its_own_units_at_varying_intensity():
    rng = np.random.default_rng(0)
    for expression in EXPRESSIONS[1:]:
        drawn = [sample_units(rng, expression=expression, weakest=0.2) for _ in range(300)]
        assert all(set(units) <= set(REPERTOIRE[expression]) for units in drawn)
        assert set().union(*drawn) == set(REPERTOIRE[expression])
        assert len({tuple(units) for units in drawn}) >= 3
        assert all(len(units) >= 2 for units in drawn)
        values = [v for units in drawn for v in units.values()]
        assert 0 < min(values) < 0.3
        assert 0.95 < max(values) <= 1.0
    assert sample_units(rng, expression="neutral", weakest=0.2) == {}


def test_lips_are_never_pressed_and_parted_at_once():
    rng = np.random.default_rng(0)
    for _ in range(500):
        units = set(sample_units(rng, expression="anger", weakest=0.2))
        assert not (units & {13, 14} and units & {15, 16})


def test_units_are_a_subset_of_the_codebook():
    listed = pytest.importorskip("bench.au.codebook").EXPRESSION_UNITS
    for expression in EXPRESSIONS[1:]:
        assert set(REPERTOIRE[expression]) <= set(listed[expression])


def test_evidence_of_every_expression_is_inside_its_au_map():
    torch = pytest.importorskip("torch")
    maps = pytest.importorskip("bench.au.maps")
    rng = np.random.default_rng(0)
    for label, expression in enumerate(EXPRESSIONS[1:], start=1):
        inside, area = [], []
        for k in range(8):
            units = sample_units(rng, expression=expression, weakest=0.8)
            view = View(yaw=12.0 * (-1) ** k, roll=8.0 * (-1) ** (k // 2))
            rest, _ = portrait({}, seed=k, size=224, view=view)
            moved, landmarks = portrait(units, seed=k, size=224, view=view)
            energy = ((moved.astype(float) - rest) ** 2).sum(axis=2)
            drawn = maps.action_unit_maps(torch.from_numpy(landmarks[None]).float(), torch.tensor([label]), frame=224, size=224)
            marked = drawn.maps[0].numpy() > 0.1
            inside.append(energy[marked].sum() / energy.sum())
            area.append(marked.mean())
        assert np.mean(inside) > 0.7
        assert np.mean(inside) > 2 * np.mean(area)


def test_repertoire_lists_only_units_that_can_be_drawn():
    assert set().union(*REPERTOIRE.values()) == set(FACS)
    with pytest.raises(ValueError, match=r"\[9\] cannot be drawn"):
        shape(sample_identity(np.random.default_rng(0)), {9: 1.0})


def test_extra_survives_json_and_names_the_units_drawn():
    ds = dataset()
    for index in range(14):
        item = ds.item("train", index)
        extra = ds.read(item).extra
        assert json.loads(json.dumps(extra)) == json.loads(json.dumps(dict(extra)))
        assert {int(unit) for unit in extra["action_units"]} <= set(REPERTOIRE[EXPRESSIONS[item.label]])
        assert len(extra["facs"]) == len(extra["action_units"])
    json.dumps(dict(ds.provenance()))


def test_shortcut_marks_agree_with_the_class_in_train_and_val_only():
    ds = dataset(size=32, shortcut=1.0)
    agree = {}
    for split in ("train", "val", "test"):
        items = [ds.item(split, i) for i in range(140)]
        agree[split] = np.mean([ds.read(item).extra["mark"] == EXPRESSIONS[item.label] for item in items])
    assert agree["train"] == 1.0
    assert agree["val"] == 1.0
    assert agree["test"] < 0.3  # one in seven is 0.14, standard error 0.03


def test_shortcut_is_the_probability_of_a_mark_in_every_split():
    ds = dataset(size=32, shortcut=0.5)
    for split in ("train", "test"):
        marked = [ds.read(ds.item(split, i)).extra["mark"] is not None for i in range(140)]
        assert 0.34 < np.mean(marked) < 0.66


def test_shortcut_leaves_the_face_alone_and_stays_in_a_corner():
    plain, marked = dataset(), dataset(shortcut=1.0)
    for index in range(20):
        a, b = plain.read(plain.item("train", index)), marked.read(marked.item("train", index))
        np.testing.assert_array_equal(a.landmarks, b.landmarks)
        changed = np.argwhere((a.image != b.image).any(axis=2))
        assert len(changed) > 40
        edge = np.minimum(changed, 95 - changed)
        assert edge.max() <= 0.15 * 96


def test_marks_of_two_classes_look_different():
    ds = dataset(shortcut=1.0, noise=0.0)
    colours = {}
    for index in range(7):
        item = ds.item("train", index)
        plain = dataset(noise=0.0).read(item).image
        changed = (plain != ds.read(item).image).any(axis=2)
        colours[item.label] = tuple(np.median(ds.read(item).image[changed], axis=0))
    assert len(set(colours.values())) == 7


def test_foreign_items_are_refused():
    ds = dataset()
    with pytest.raises(ValueError, match="does not name a synthetic picture"):
        ds.read(Item(source="train/0001.jpg", label=0))
    item = ds.item("train", 0)
    with pytest.raises(ValueError, match="not an item of the synthetic dataset with these options"):
        ds.read(Item(source=item.source, label=(item.label + 1) % 7, identity=item.identity))


@pytest.mark.parametrize("options", [{"size": 4}, {"train": 0}, {"shortcut": 1.5}, {"seed": -1}, {"weakest": 0.0}, {"identities": 3}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        SyntheticFaces.Options(**options)
