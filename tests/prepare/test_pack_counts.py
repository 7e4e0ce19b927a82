"""What `prepare` does for datasets with published counts, unusable lines, and landmarks that have to be found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.data.index import load_index, partial_words
from bench.data.readers import open_reader
from bench.dataset import DATASETS, BadPictureError, Box, Dataset, Face, Item, Rejected
from bench.prepare import pack
from bench.prepare.pack import prepare

PUBLISHED = {"train": {"happiness": 5, "anger": 4}, "test": {"happiness": 2, "anger": 2}}


class Counted(Dataset):
    """Nine pictures for train, of which one becomes val, four for test; `bad` cannot be read."""

    bad: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def classes(self):
        return ("happiness", "anger")

    def splits(self):
        items = [
            Item(source=f"{split}-{name}-{i}", label=label)
            for split, counts in PUBLISHED.items()
            for label, (name, count) in enumerate(counts.items())
            for i in range(count)
            if f"{split}-{name}-{i}" not in self.lost
        ]
        train = [item for item in items if item.source.startswith("train")]
        return {"train": train[1:], "val": train[:1], "test": [item for item in items if item.source.startswith("test")]}

    def read(self, item):
        if item.source in self.bad:
            raise BadPictureError("torn")
        value = sum(item.source.encode()) % 256
        return Face(image=np.full((20, 20, 3), value, np.uint8), landmarks=np.full((68, 2), 3.0), box=Box(1, 2, 10, 12))

    def expected(self):
        return PUBLISHED

    def rejected(self):
        return [Rejected(split="train", source="../passwd", reason="a path with '..'")]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    DATASETS.register("counted", title="Counted", license="none", embedded=True, in_all=False)(Counted)
    monkeypatch.setattr(pack, "SHARD_ITEMS", 4)
    monkeypatch.setattr(Counted, "bad", ())
    monkeypatch.setattr(Counted, "lost", ())


def make(out: Path, **changes):
    return prepare("counted", **{"name": "counted", "options": {"size": 20}, "raw": None, "out": out, "workers": 1, **changes})


def test_val_counts_as_train_where_train_alone_is_expected(tmp_path):
    index = make(tmp_path / "out")
    assert {split: group.samples for split, group in index.splits.items()} == {"train": 8, "val": 1, "test": 4}
    assert "partial" not in index.provenance


def test_missing_pictures_are_an_error_with_the_numbers_per_class(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "lost", ("train-anger-1", "train-anger-2", "test-happiness-0"))
    with pytest.raises(ValueError, match=r"listed pictures .*train: anger 2 of 4 \(-2\); test: happiness 1 of 2 \(-1\).*--allow-partial"):
        make(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_that_turn_out_bad_are_missed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "bad", ("test-anger-1",))
    with pytest.raises(ValueError, match=r"usable pictures .*test: anger 1 of 2 \(-1\)"):
        make(tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_allow_partial_goes_on_from_the_finished_shards_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "bad", ("test-anger-1",))
    with pytest.raises(ValueError, match="usable"):
        make(tmp_path / "out")
    seen = []
    make(tmp_path / "out", allow_partial=True, on_progress=seen.append)
    assert seen[0].reused == seen[0].total
    index = load_index(tmp_path / "out")
    assert index.provenance["partial"] == {"test": {"anger": [1, 2]}}
    assert partial_words(index.provenance) == "test 1 of 2 (1 class)"


def test_lines_that_cannot_be_used_are_among_the_bad_pictures(tmp_path):
    index = make(tmp_path / "out")
    assert [(bad.split, bad.source, bad.reason) for bad in index.bad_pictures] == [("train", "../passwd", "a path with '..'")]


class Finder:
    """Remembers what it was asked, and finds no face in pictures brighter than 200."""

    def __init__(self):
        self.calls = []

    def find(self, images, boxes):
        self.calls.append((len(images), list(boxes)))
        return [None if image[0, 0, 0] > 200 else np.full((68, 2), float(image[0, 0, 0])) for image in images]


@pytest.fixture
def finder(monkeypatch):
    finder = Finder()
    monkeypatch.setattr(pack, "describe_source", lambda name, weights: {"name": name, "weights": {"a": "1"}})
    monkeypatch.setattr(pack, "open_landmarker", lambda name, weights: finder)
    return finder


def test_found_landmarks_replace_those_of_the_dataset(tmp_path, finder):
    index = make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"})
    brightness = [sum(f"test-{name}-{i}".encode()) % 256 for name, count in PUBLISHED["test"].items() for i in range(count)]
    assert index.provenance["samples_without_landmarks"]["test"] == sum(value > 200 for value in brightness)
    assert index.provenance["landmark_source"] == {"name": "dlib", "weights": {"a": "1"}}


def test_a_shard_is_looked_at_in_groups_that_begin_with_it(tmp_path, finder, monkeypatch):
    monkeypatch.setattr(pack, "LANDMARK_GROUP", 3)
    make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"})
    assert [count for count, _ in finder.calls] == [3, 1, 3, 1, 1, 3, 1]  # train 4 + 4, val 1, test 4
    assert finder.calls[0][1] == [Box(1, 2, 10, 12)] * 3


def test_large_pictures_are_looked_at_fewer_at_a_time(tmp_path, finder, monkeypatch):
    monkeypatch.setattr(pack, "GROUP_PIXELS", 2 * 20 * 20)
    make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"})
    assert [count for count, _ in finder.calls] == [2, 2, 2, 2, 1, 2, 2]


def test_bad_pictures_are_not_looked_at(tmp_path, finder, monkeypatch):
    monkeypatch.setattr(Counted, "bad", ("test-anger-0",))
    make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"}, allow_partial=True)
    assert sum(count for count, _ in finder.calls) == 12


def test_other_weights_of_the_landmark_network_are_other_data(tmp_path, finder, monkeypatch):
    make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"})
    monkeypatch.setattr(pack, "describe_source", lambda name, weights: {"name": name, "weights": {"a": "2"}})
    with pytest.raises(ValueError, match="prepared differently"):
        make(tmp_path / "out", options={"size": 20, "landmarks": "dlib"})


def test_landmarks_none_stores_none(tmp_path):
    index = make(tmp_path / "out", options={"size": 20, "landmarks": "none"})
    assert index.provenance["samples_without_landmarks"] == {"train": 8, "val": 1, "test": 4}


def test_the_index_numbers_people_and_readers_know_them(tmp_path, monkeypatch):
    splits = Counted.splits

    def with_people(self):
        return {
            split: [
                dataclasses.replace(item, identity=None if "anger" in item.source else f"{split} {i // 2}") for i, item in enumerate(items)
            ]
            for split, items in splits(self).items()
        }

    monkeypatch.setattr(Counted, "splits", with_people)
    make(tmp_path / "out")
    assert open_reader(tmp_path / "out", "test").people.tolist() == [0, 0, -1, -1]  # "test 0" sorts before "train 0"
    assert open_reader(tmp_path / "out", "train").people.tolist()[:4] == [1, 1, 2, 2]
