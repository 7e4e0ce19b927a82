from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from bench.dataset import DATASETS, BadPictureError, Item
from bench.datasets.folder import Folder
from bench.prepare.landmark_table import LANDMARKS_HEADER, LandmarkTable
from bench.prepare.splits import hash_sources

HEADER = ",".join(LANDMARKS_HEADER)


def picture(path, size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.arange(size[0], dtype=np.uint8) * 10
    Image.fromarray(np.broadcast_to(x[None, :, None], (size[1], size[0], 3)).copy()).save(path, **options)


def row(source, values=None):
    return ",".join([source, *map(str, values if values is not None else [v % 15 for v in range(136)])])


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 10), ("test", 2)):
        for name in ("sadness", "contempt", "happiness"):
            for i in range(count):
                picture(tmp_path / split / name / f"P{i % 5}_{i}.png")
    write_csv(tmp_path, [row(source) for source in sources(tmp_path)])
    return tmp_path


def sources(root):
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*/*"))


def write_csv(root, rows, header=HEADER):
    (root / "landmarks.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def folder(root, **options):
    return Folder(Folder.Options(**options), raw=root)


def refused(root, words, **options):
    with pytest.raises(ValueError, match=words):
        folder(root, **options).splits()


def test_it_is_registered_and_all_does_not_include_it():
    entry = DATASETS.get("folder")
    assert entry.target is Folder
    assert not entry.info.in_all
    assert not entry.info.embedded


def test_expressions_come_in_project_order_and_other_classes_after_them(root):
    assert folder(root).classes == ("happiness", "sadness", "contempt")


def test_a_missing_val_is_cut_from_train_and_recorded(root):
    dataset = folder(root, val_fraction=0.2)
    splits = dataset.splits()
    assert {split: len(items) for split, items in splits.items()} == {"train": 24, "val": 6, "test": 6}
    record = dataset.provenance()["val"]
    assert record["cut_from_train"] is True
    assert (record["fraction"], record["salt"]) == (0.2, "bench-val-1")
    assert "sha256" in record["rule"]
    assert record["sources_sha256"] == hash_sources(splits["val"])
    assert all(item.source.startswith("train/") for item in splits["val"])


def test_a_val_folder_is_used_as_it_is(root):
    (root / "landmarks.csv").unlink()
    (root / "test").rename(root / "val")
    for name in ("sadness", "contempt", "happiness"):
        picture(root / "test" / name / "a.png")
    dataset = folder(root)
    splits = dataset.splits()
    assert {split: len(items) for split, items in splits.items()} == {"train": 30, "val": 6, "test": 3}
    assert dataset.provenance()["val"] == {"cut_from_train": False, "sources_sha256": hash_sources(splits["val"])}


def test_items_are_in_an_order_that_mixes_classes(root):
    items = folder(root).splits()["train"]
    assert [item.source for item in items] == sorted((i.source for i in items), key=lambda s: hashlib.sha256(s.encode()).digest())


def test_identities_come_from_the_file_name_and_stay_on_one_side(root):
    dataset = folder(root, identity_pattern=r"^(P\d)_", val_fraction=0.2)
    splits = dataset.splits()
    assert {item.identity for item in splits["test"]} == {"P0", "P1"}
    assert not {i.identity for i in splits["train"]} & {i.identity for i in splits["val"]}
    assert len(splits["val"]) == 6


def test_names_that_the_identity_pattern_does_not_match_are_noted(root):
    picture(root / "test/sadness/other.png")
    dataset = folder(root, identity_pattern=r"^(P\d)_")
    dataset.splits()
    assert any("matches 36 of 37" in note for note in dataset.provenance()["notes"])


def test_a_pattern_that_matches_nothing_is_refused(root):
    refused(root, "matches no file name", identity_pattern="(Q+)")


@pytest.mark.parametrize("pattern", ["P+", "(unclosed"])
def test_a_pattern_without_a_group_or_meaning_is_refused(pattern):
    with pytest.raises(ValueError, match=r"no group|not a regular expression"):
        Folder.Options(identity_pattern=pattern)


def test_hidden_files_are_no_pictures(root):
    (root / "train/sadness/.DS_Store").write_bytes(b"x")
    assert len(folder(root).splits()["train"]) + 3 == 30


def test_a_file_that_is_no_picture_is_reported_and_takes_no_pictures_place(root):
    (root / "test/sadness/Thumbs.db").write_bytes(b"x")
    (root / "test/sadness/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    dataset = folder(root)
    assert not [item for item in dataset.splits()["test"] if "P" not in item.source]
    assert {(r.source, r.reason.partition(",")[0]) for r in dataset.rejected()} == {
        ("test/sadness/Thumbs.db", "not a picture in any format Pillow knows"),
        ("test/sadness/IMG_1.HEIC", "a HEIC picture"),
    }


def test_a_picture_with_the_ending_of_none_is_one(root):
    (root / "test/sadness/P0_0.png").rename(root / "test/sadness/P0_0.photo")
    dataset = folder(root)
    assert "test/sadness/P0_0.photo" in {item.source for item in dataset.splits()["test"]}
    assert dataset.rejected() == ()


def test_a_link_that_repeats_a_class_is_refused(root):
    (root / "train/joy").symlink_to("happiness")
    with pytest.raises(ValueError, match=r"joy and .*happiness are one folder, by a link"):
        folder(root).splits()


def test_a_folder_that_is_no_split_is_noted(root):
    (root / "scripts").mkdir()
    dataset = folder(root)
    dataset.splits()
    assert "not a split, left out: scripts" in dataset.provenance()["notes"]


@pytest.mark.parametrize(("name", "meant"), [("validation", "val"), ("Train", "train"), ("testing", "test"), ("dev", "val")])
def test_a_split_by_another_name_is_refused_with_the_command_that_mends_it(root, name, meant):
    (root / name).mkdir()
    refused(root, rf"is called '{meant}' here. Rename: mv .*{name} .*{meant}")


def test_a_missing_split_is_refused_with_the_layout(root):
    (root / "test").rename(root / "holdout")
    refused(root, r"no 'test' folder \(it has holdout, train\). Expected: train/CLASS/PICTURE")


def test_an_empty_split_is_refused(root):
    for path in (root / "test").glob("*/*"):
        path.unlink()
    refused(root, "split 'test' is empty")


def test_a_class_that_train_lacks_is_refused_with_the_likely_twin(root):
    picture(root / "test/Sadnes/a.png")
    refused(root, r"'Sadnes' has no picture in .*train.*Is it the same as 'sadness'")


def test_a_class_that_test_lacks_is_noted(root):
    picture(root / "train/awe/a.png")
    dataset = folder(root)
    dataset.splits()
    assert {"class 'awe' has no picture in test"} <= set(dataset.provenance()["notes"])


def test_a_folder_below_a_class_is_refused(root):
    picture(root / "train/sadness/person/a.png")
    refused(root, "person is a folder, but pictures must lie directly in")


def test_without_a_raw_folder_there_is_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="--raw DIR"):
        folder(None)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder(tmp_path / "nowhere").splits()


def test_read_gives_the_picture_and_its_landmarks(root):
    face = folder(root).read(Item(source="train/sadness/P0_0.png", label=0))
    assert face.image.shape == (16, 20, 3)
    assert face.image[0, :, 0].tolist() == [x * 10 for x in range(20)]
    assert face.landmarks is not None
    assert face.landmarks[:2].tolist() == [[0, 1], [2, 3]]


def test_landmarks_turn_with_the_exif_orientation_unless_told_otherwise(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(root / "train/sadness/P0_0.png", exif=exif)
    item = Item(source="train/sadness/P0_0.png", label=0)
    stored, upright = folder(root).read(item), folder(root, landmark_frame="upright").read(item)
    assert stored.image[0, 0, 0] == 190
    assert stored.landmarks is not None
    assert stored.landmarks[0].tolist() == [19 - 0, 15 - 1]
    assert upright.landmarks is not None
    assert upright.landmarks[0].tolist() == [0, 1]


def test_landmarks_beside_the_picture_make_it_a_bad_one(root):
    write_csv(root, [row("test/sadness/P0_0.png", [500 + i % 9 for i in range(136)])])
    with pytest.raises(BadPictureError, match="all landmarks lie outside the 20 x 16 picture"):
        folder(root).read(Item(source="test/sadness/P0_0.png", label=0))


def test_no_csv_means_no_landmarks_and_a_note(root):
    (root / "landmarks.csv").unlink()
    dataset = folder(root)
    items = dataset.splits()["test"]
    assert any(note.startswith("no landmarks.csv") for note in dataset.provenance()["notes"])
    assert dataset.read(items[0]).landmarks is None


def test_a_picture_without_a_row_and_a_row_without_a_picture_are_noted(root):
    rows = [row(source) for source in sources(root) if source != "test/sadness/P0_0.png"]
    write_csv(root, [*rows, row("train/sadness/gone.png")])
    dataset = folder(root)
    dataset.splits()
    notes = dataset.provenance()["notes"]
    assert "landmarks.csv: 1 of 36 rows name no picture here, first: train/sadness/gone.png" in notes
    assert "landmarks.csv: 1 of 36 pictures have no row, first: test/sadness/P0_0.png" in notes
    assert dataset.provenance()["landmarks"]["pictures_without_row"] == 1
    assert dataset.read(Item(source="test/sadness/P0_0.png", label=0)).landmarks is None


def test_a_csv_that_names_none_of_the_pictures_is_refused_with_an_example(root):
    write_csv(root, [row("/home/me/train/sadness/P0_0.png")])
    refused(root, r"no row names a picture.*'/home/me/train/sadness/P0_0.png'.*such as 'test/contempt/P0_0.png'")


@pytest.mark.parametrize("cell", ["", "nan", "NaN"])
def test_a_row_of_empty_cells_means_that_no_face_was_found(root, cell):
    write_csv(root, [row("test/sadness/P0_0.png", [cell] * 136), row("test/sadness/P1_1.png")])
    dataset = folder(root)
    dataset.splits()
    assert dataset.read(Item(source="test/sadness/P0_0.png", label=0)).landmarks is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1] * 135, "has 135 coordinates, 136 are needed"),
        ([1] * 137, "has 137 coordinates"),
        (["nan", *[1] * 135], "x0 is not a finite number"),
        ([1, 1, 1, "inf", *[1] * 132], "y1 is not a finite number"),
        (["1.5px", *[1] * 135], "could not convert string to float: '1.5px'"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(root, values, words):
    write_csv(root, [row("test/sadness/P1_1.png"), row("test/sadness/P0_0.png", values)])
    refused(root, re.escape("landmarks.csv: line 3 (test/sadness/P0_0.png)") + ".*" + words)


def test_the_number_of_malformed_rows_is_told(root):
    write_csv(root, [row(source, [1]) for source in sources(root)[:4]])
    refused(root, r"line 2 .*\(4 such rows in all\)")


def test_fractions_instead_of_pixels_are_refused(root):
    write_csv(root, [row(source, [0.5 + i % 9 / 50 for i in range(136)]) for source in sources(root)])
    refused(root, "no coordinate exceeds 1")


@pytest.mark.parametrize("header", ["file," + HEADER[5:], "path,x0,y0", ""])
def test_a_wrong_header_is_refused(root, header):
    write_csv(root, [row(sources(root)[0])], header=header)
    refused(root, "line 1 must be path,x0,y0")


def test_two_rows_for_one_picture_are_refused(root):
    write_csv(root, [row("test/sadness/P0_0.png"), row("./test/sadness/P0_0.png")])
    refused(root, "lines 2 and 3 are both about test/sadness/P0_0.png")


def test_tables_from_a_spreadsheet_on_windows_are_read(tmp_path):
    path = tmp_path / "landmarks.csv"
    path.write_bytes(("\ufeff" + HEADER + "\r\n" + row('"train\\joy\\a, b.png"') + "\r\n").encode())
    table = LandmarkTable(path)
    assert table.sources() == ("train/joy/a, b.png",)
    points = table.points("train/joy/a, b.png")
    assert points is not None
    assert points[-1].tolist() == [134 % 15, 135 % 15]


def test_bytes_that_are_no_utf8_are_refused(root):
    (root / "landmarks.csv").write_bytes(HEADER.encode() + b"\ntrain/\xff.png")
    refused(root, "not UTF-8 at byte")


@pytest.mark.parametrize("value", [0, -1, 7])
def test_a_row_with_all_points_in_one_place_means_no_landmarks_and_is_counted(root, value):
    names = sources(root)
    write_csv(root, [row(names[0], [value] * 136), *map(row, names[1:])])
    dataset = folder(root)
    dataset.splits()
    assert dataset.read(Item(source=names[0], label=0)).landmarks is None
    assert any(note.startswith("landmarks.csv: 1 of 36 rows have no landmarks") for note in dataset.provenance()["notes"])


def test_a_csv_with_lone_carriage_returns_is_read(root):
    path = root / "landmarks.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert len(LandmarkTable(path)) == 36


def test_a_decomposed_file_name_finds_its_composed_row(root):
    composed, decomposed = (unicodedata.normalize(form, "test/sadness/Zo\u00eb.png") for form in ("NFC", "NFD"))
    before = sources(root)
    picture(root / decomposed)
    write_csv(root, [row(composed), *map(row, before)])
    dataset = folder(root)
    dataset.splits()
    assert dataset.read(Item(source=decomposed, label=0)).landmarks is not None
    assert not any("rows name no picture" in note for note in dataset.provenance()["notes"])
