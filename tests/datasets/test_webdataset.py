"""Shards as anybody makes them, written with webdataset's own writer."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from bench.data.index import load_index
from bench.data.readers import open_reader
from bench.data.verify import verify
from bench.dataset import DATASETS, BadPictureError
from bench.datasets.webdataset import WebDatasetShards
from bench.prepare.pack import prepare
from bench.sweep.store import read_records

from .drawn import draw_face

NAMES = ("happiness", "anger", "awe")


def picture(seed=0, *, kind="JPEG", size=(20, 16), **options):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, kind, **options)
    return buffer.getvalue()


def points(shift=0.0):
    return [[i % 10 + shift, i / 8] for i in range(68)]


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})


def named(count, *, first=0):
    """Samples with class names in cls, all classes equally often."""
    return [(f"{n:06d}", {"jpg": picture(n), "cls": NAMES[n % 3].encode()}) for n in range(first, first + count)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "raw"
    write(folder / "train-0.tar", named(9))
    write(folder / "train-1.tar", named(9, first=9))
    write(folder / "test-0.tar", named(3, first=30))
    return folder


def shards(root, **options):
    return WebDatasetShards(WebDatasetShards.Options(**options), raw=root)


def refused(root, words, **options):
    with pytest.raises(ValueError, match=words):
        shards(root, **options).splits()


def rejected(root, sample, **options):
    """Why a sample beside good ones is left out."""
    write(root / "test-1.tar", [sample])
    dataset = shards(root, **options)
    assert len(dataset.splits()["test"]) == 3
    (line,) = dataset.rejected()
    assert line.split == "test"
    assert line.source.startswith("test-1.tar/")
    return line.reason


def sizes(splits):
    return {split: len(items) for split, items in splits.items()}


# What is read


def test_it_is_registered_and_all_does_not_include_it():
    entry = DATASETS.get("webdataset")
    assert entry.target is WebDatasetShards
    assert not entry.info.in_all


def test_class_names_are_those_that_occur_expressions_first(root):
    assert shards(root).classes == NAMES


def test_val_is_cut_from_train_by_the_common_rule(root):
    dataset = shards(root, val_fraction=0.34)
    splits = dataset.splits()
    assert sizes(splits) == {"train": 12, "val": 6, "test": 3}
    assert dataset.provenance()["val"]["cut_from_train"] is True


def test_shards_in_folders_and_a_val_of_its_own_are_taken(tmp_path):
    write(tmp_path / "train/a.tar", named(6))
    write(tmp_path / "val/a.tar", named(3, first=6))
    write(tmp_path / "test/a.tar", named(3, first=9))
    dataset = shards(tmp_path)
    assert sizes(dataset.splits()) == {"train": 6, "val": 3, "test": 3}
    assert dataset.provenance()["val"]["cut_from_train"] is False


def test_keys_are_split_as_webdataset_splits_them(tmp_path):
    sample = {"left.JPG": picture(1), "jpg": picture(2), "cls": b"awe"}
    write(tmp_path / "train.tar", [("a.b/c", sample), ("d.e/c", sample)])
    write(tmp_path / "test.tar", [("f/g", sample)])
    items = shards(tmp_path).splits()["test"]
    assert [item.source for item in items] == ["test.tar/f/g.jpg"]
    assert np.array_equal(shards(tmp_path).read(items[0]).image, np.asarray(Image.open(io.BytesIO(picture(2)))))


@pytest.mark.parametrize("kind", ["jpg", "jpeg", "png", "webp", "PNG"])
def test_pictures_of_these_kinds_are_read(root, kind):
    data = picture(5, kind={"jpg": "JPEG"}.get(kind, kind.upper()))
    write(root / "test-0.tar", [("k", {kind: data, "cls": b"awe"})])
    dataset = shards(root)
    (item,) = dataset.splits()["test"]
    assert np.array_equal(dataset.read(item).image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("members", "options"),
    [
        ({"cls": b"2"}, {"classes": NAMES}),
        ({"cls": b"2\n"}, {"classes": NAMES}),
        ({"cls": b"awe"}, {"classes": NAMES}),
        ({"json": b'{"label": 2}'}, {"classes": NAMES}),
        ({"json": b'{"label": "2"}'}, {"classes": NAMES}),
        ({"json": b'{"label": "awe"}'}, {}),
        ({"json": b'{"mood": "awe", "label": "anger"}'}, {"label_field": "mood"}),
        ({"cls": b"awe", "json": b'{"label": "anger"}'}, {}),
    ],
)
def test_the_class_is_a_number_or_a_name_in_cls_or_json(root, members, options):
    write(root / "test-0.tar", [("k", {"jpg": picture(), **members})])
    dataset = shards(root, **options)
    assert dataset.classes[dataset.splits()["test"][0].label] == "awe"


def test_classes_txt_names_the_numbers(root):
    write(root / "test-0.tar", [("k", {"jpg": picture(), "cls": b"1"})])
    (root / "classes.txt").write_text("awe\nanger\nhappiness\n")
    dataset = shards(root)
    assert dataset.splits()["test"][0].label == 1
    assert dataset.classes == ("awe", "anger", "happiness")


def test_landmarks_and_identity_come_from_the_json_member(root):
    note = {"label": "awe", "landmarks": points(), "identity": "Ann"}
    write(root / "test-0.tar", [("k", {"png": picture(kind="PNG"), "json": json.dumps(note).encode()})])
    dataset = shards(root)
    (item,) = dataset.splits()["test"]
    assert item.identity == "Ann"
    assert dataset.read(item).landmarks.tolist() == points()
    assert "18 of 19 samples have no landmarks" in " ".join(dataset.provenance()["notes"])


def test_landmarks_turn_with_the_exif_orientation(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    note = {"label": "awe", "landmarks": points()}
    write(root / "test-0.tar", [("k", {"jpg": picture(exif=exif), "json": json.dumps(note).encode()})])
    dataset = shards(root)
    assert dataset.read(dataset.splits()["test"][0]).landmarks[1].tolist() == [19 - 1, 15 - 0.125]


def test_the_same_key_in_two_shards_is_two_samples(root):
    write(root / "train-1.tar", named(9))
    assert sum(sizes(shards(root).splits()).values()) == 21


# Prepared, trained, read back


def test_prepared_shards_verify_and_bad_samples_are_listed(root, tmp_path):
    write(root / "test-1.tar", [("broken", {"jpg": picture()[:200], "cls": b"awe"}), ("blind", {"cls": b"awe"})])
    index = prepare("webdataset", name="mine", options={"size": 24}, raw=root, out=tmp_path / "out", workers=1)
    assert {bad.source: bad.split for bad in index.bad_pictures} == {"test-1.tar/blind": "test", "test-1.tar/broken.jpg": "test"}
    assert index.classes == NAMES
    assert verify(tmp_path / "out") == []


def test_changed_shards_are_not_taken_for_those_prepared_before(root, tmp_path):
    prepare("webdataset", name="mine", options={"size": 24}, raw=root, out=tmp_path / "out", workers=1)
    write(root / "train-1.tar", [(key, {**members, "cls": b"awe"}) for key, members in named(9, first=9)])
    with pytest.raises(ValueError, match="raw folder have changed"):
        prepare("webdataset", name="mine", options={"size": 24}, raw=root, out=tmp_path / "out", workers=1)


def test_our_own_shards_are_read_back_with_landmarks_and_people(tmp_path):
    small = {"size": 32, "train": 21, "val": 7, "test": 7, "train_identities": 7, "val_identities": 7, "test_identities": 7}
    first = prepare("synthetic", name="first", options=small, raw=None, out=tmp_path / "first", workers=1)
    second = prepare(
        "webdataset",
        name="second",
        options={"size": 32, "classes": list(first.classes)},
        raw=tmp_path / "first",
        out=tmp_path / "second",
        workers=1,
    )
    assert second.bad_pictures == ()
    for split in ("train", "val", "test"):
        ours, again = (open_reader(tmp_path / name, split) for name in ("first", "second"))
        assert len(ours.keys) == len(again.keys)
        notes = [described(tmp_path / name, split) for name in ("first", "second")]
        for source, (label, note, _) in notes[1].items():
            key = source.partition("/")[2].removesuffix(".jpg")
            before = next(value for value in notes[0].values() if value[2] == key)
            assert label == before[0]
            assert note["identity"] == before[1]["identity"]
            assert np.allclose(note["landmarks"], before[1]["landmarks"], atol=1e-3)


def described(folder, split):
    """Source -> label, note, key of every sample of a prepared split."""
    samples = {}
    for shard in load_index(folder).splits[split].shards:
        data = (folder / shard.name).read_bytes()
        for member in shard.members:
            note = json.loads(data[member.json_offset : member.json_offset + member.json_bytes])
            samples[note["source"]] = (member.label, note, member.key)
    return samples


def test_a_guided_training_runs_on_them(go, project):
    names = ("happiness", "anger")
    number = 0
    for split, count in (("train", 24), ("val", 4), ("test", 4)):
        samples = []
        for _ in range(count):
            face = draw_face(names[number % 2], number, size=32)
            buffer = io.BytesIO()
            Image.fromarray(face.image).save(buffer, "PNG")
            note = {"label": names[number % 2], "landmarks": face.landmarks.tolist()}
            samples.append((f"{number:04d}", {"png": buffer.getvalue(), "json": json.dumps(note).encode()}))
            number += 1
        write(project / "raw" / f"{split}.tar", samples)
    prepare("webdataset", name="own", options={"size": 36}, raw=project / "raw", out=project / "own", workers=1)
    outcome = go(run__datasets=[str(project / "own")], run__guidance=["au"], run__seeds=[0], run__results="r")
    assert not outcome.failed
    ((_, record),) = read_records(project / "r")
    assert record.data.samples == 4


# What is left out, and what is refused


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"cls": b"awe"}, r"has no picture \(jpg, jpeg, png, webp\), only cls"),
        ({"cls": b"awe", "jpg": b"x", "png": b"x"}, "has jpg and png"),
        ({"jpg": b"x"}, "neither a cls member nor a field 'label'"),
        ({"jpg": b"x", "json": b'{"mood": "awe"}'}, "neither a cls member nor a field 'label'"),
        ({"jpg": b"x", "json": b'{"label": '}, "json member cannot be read"),
        ({"jpg": b"x", "json": b"[1]"}, r"is no object but \[1\]"),
        ({"jpg": b"x", "json": b'{"label": 1.5}'}, "1.5 is neither a number nor a name"),
        ({"jpg": b"x", "json": b'{"label": true}'}, "True is neither a number nor a name"),
        ({"jpg": b"x", "cls": b""}, "'' is neither a number nor a name"),
        ({"jpg": b"x", "cls": b"\xff"}, "is no text"),
        ({"jpg": b"x", "cls": b"angr"}, "there is no class 'angr'.*Did you mean 'anger'"),
        ({"jpg": b"x", "cls": b"3"}, "there is no class '3'. Numbers are 0 to 2"),
        ({"jpg": b"x", "cls": b"-1"}, "there is no class '-1'. Numbers are 0 to 2"),
        ({"jpg": b"x", "json": b'{"label": "awe", "landmarks": [[1, 2]]}'}, "neither null nor 68 pairs"),
        (
            {"jpg": b"x", "json": json.dumps({"label": "awe", "landmarks": [[0.5, i / 99] for i in range(68)]}).encode()},
            "pixels are needed",
        ),
        ({"jpg": b"x", "json": b'{"label": "awe", "identity": [1]}'}, r"identity \[1\] is neither"),
    ],
)
def test_a_sample_that_cannot_be_used_is_left_out_with_the_reason(root, members, words):
    assert re.search(words, rejected(root, ("k", members), classes=NAMES))


def test_landmarks_of_another_kind_do_no_harm_where_none_are_wanted(root):
    write(root / "test-0.tar", [("k", {"jpg": picture(), "json": b'{"label": "awe", "landmarks": [[1, 2]]}'})])
    dataset = shards(root, landmarks="none")
    assert dataset.read(dataset.splits()["test"][0]).landmarks is None


@pytest.mark.parametrize(("data", "words"), [(picture()[:200], "damaged"), (b"", "empty"), (b"x", "not a picture")])
def test_a_damaged_picture_is_a_bad_one(root, data, words):
    write(root / "test-0.tar", [("k", {"jpg": data, "cls": b"awe"})])
    dataset = shards(root)
    with pytest.raises(BadPictureError, match=words):
        dataset.read(dataset.splits()["test"][0])


def test_landmarks_beside_the_picture_make_it_a_bad_one(root):
    note = {"label": "awe", "landmarks": points(500)}
    write(root / "test-0.tar", [("k", {"jpg": picture(), "json": json.dumps(note).encode()})])
    dataset = shards(root)
    with pytest.raises(BadPictureError, match="all landmarks lie outside the 20 x 16 picture"):
        dataset.read(dataset.splits()["test"][0])


def test_numbers_that_nothing_names_are_refused_with_what_to_set(root):
    write(root / "test-0.tar", [("k", {"jpg": picture(), "cls": b"1"})])
    refused(root, r"test-0\.tar/k\.jpg has class 1: a number.*--option 'classes=.*classes\.txt")


def test_a_class_that_train_lacks_is_refused(root):
    refused(root, "class 'joy' has no usable sample in the train shards", classes=(*NAMES, "joy"))


@pytest.mark.parametrize("samples", [[0, 1, 0], [0, 0]], ids=["apart", "side by side"])
def test_a_key_that_repeats_in_a_shard_is_refused(root, samples):
    write(root / "test-0.tar", [named(2)[number] for number in samples])
    refused(root, r"test-0\.tar.*'000000'.*a key of its own")


def blocks(path):
    """(offset of the header, offset of the data) of every member."""
    with tarfile.open(path) as tar:
        return [(info.offset, info.offset_data) for info in tar]


CUTS = {
    "inside a picture": lambda places: places[3][1] + 100,
    "inside a header": lambda places: places[3][0] + 100,
    "between two samples": lambda places: places[2][0],
    "empty": lambda places: 0,
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_shard_that_is_cut_short_is_refused_by_name(root, cut):
    path = root / "train-1.tar"
    os.truncate(path, CUTS[cut](blocks(path)))
    refused(root, r"train-1\.tar: (cut short|not a whole tar|damaged)")


def test_a_damaged_header_is_not_taken_for_the_end(root):
    path = root / "train-1.tar"
    data = bytearray(path.read_bytes())
    data[blocks(path)[4][0] + 150] ^= 1
    path.write_bytes(data)
    refused(root, r"train-1\.tar: damaged, after sample '000010'")


def test_a_file_that_is_no_tar_is_refused(root):
    (root / "train-1.tar").write_bytes(b"hello" * 1000)
    refused(root, r"train-1\.tar: not a whole tar archive")


@pytest.mark.parametrize("name", ["train-2.tar.gz", "test/a.tgz"])
def test_compressed_shards_are_refused_with_what_to_do(root, name):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"x")
    refused(root, "is compressed.*gunzip")


def test_a_missing_split_is_refused_with_the_layout(root):
    (root / "test-0.tar").rename(root / "holdout.tar")
    refused(root, r"no shards of 'test' \(it has holdout\.tar, train-0\.tar.*Expected: test\*\.tar or test/\*\.tar")


def test_a_split_without_a_usable_sample_is_refused_with_the_first_reason(root):
    write(root / "test-0.tar", [("k", {"cls": b"awe"})])
    refused(root, r"split 'test'.*no usable sample; first: test-0\.tar/k: has no picture")


def test_a_tar_of_no_split_is_noted(root):
    write(root / "holdout.tar", named(1))
    dataset = shards(root)
    dataset.splits()
    assert "not a split, left out: holdout.tar" in dataset.provenance()["notes"]


def test_a_pickle_in_a_sample_is_never_run(root, tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    write(root / "test-0.tar", [("k", {"jpg": picture(), "cls": b"awe", "pkl": pickle.dumps(Harm()), "pyd": pickle.dumps(Harm())})])
    dataset = shards(root)
    dataset.read(dataset.splits()["test"][0])
    assert not (tmp_path / "harm").exists()
