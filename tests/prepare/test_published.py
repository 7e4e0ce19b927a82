from __future__ import annotations

import re

import numpy as np
import pytest

from bench.dataset import EXPRESSIONS, BadPictureError, Item
from bench.prepare.published import Folds, LandmarkRows, PublishedDataset, repeated, unsafe_path
from bench.prepare.splits import hash_sources, stratified_cut

ROW = [f"{value:.2f}" for value in np.linspace(1, 90, 136)]


def row(name, cells=ROW):
    return ",".join([name, *cells])


@pytest.mark.parametrize("path", ["a.jpg", "a/b.jpg", "a..b/c...jpg", "..a/b", "x y/ä,b.jpg", "aa:b.jpg"])
def test_a_path_inside_the_download_is_safe(path):
    assert unsafe_path(path) is None


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/etc/passwd", "absolute"),
        ("//host/x.jpg", "absolute"),
        ("C:/x.jpg", "absolute"),
        ("C:\\x.jpg", "absolute"),
        ("\\\\host\\x.jpg", "absolute"),
        ("../x.jpg", r"'\.\.'"),
        ("a/../../x.jpg", r"'\.\.'"),
        ("a\\..\\x.jpg", r"'\.\.'"),
        ("..", r"'\.\.'"),
        ("", "no file name"),
        ("a\0.jpg", "no file name"),
    ],
)
def test_a_path_that_leaves_the_download_is_not(path, words):
    assert re.search(words, unsafe_path(path))


def test_names_with_different_labels_are_reported_and_others_not():
    keys = [("a", 1), ("b", 2), ("a", 3), ("b", 2), ("c", 1)]
    assert dict(repeated(keys)) == {"a": "listed with different labels: 1, 3"}


# landmarks.txt


def rows_of(tmp_path, *lines, encoding="utf-8", newline="\n"):
    path = tmp_path / "landmarks.txt"
    path.write_bytes((newline.join(lines) + newline).encode(encoding))
    return LandmarkRows(path)


def test_landmarks_are_all_x_then_all_y(tmp_path):
    cells = [*(f"{x}" for x in range(68)), *(f"{100 + y}" for y in range(68))]
    points = rows_of(tmp_path, row("first.jpg"), row("a.jpg", cells)).points("a.jpg")
    np.testing.assert_array_equal(points, np.stack([np.arange(68), 100 + np.arange(68)], axis=1))


@pytest.mark.parametrize("word", ["inf", "-inf", "nan"])
def test_a_row_without_a_finite_number_is_not_found(tmp_path, word):
    assert rows_of(tmp_path, row("a.jpg", [word] * 136)).points("a.jpg") is None


def test_a_picture_without_a_row_is_not_found(tmp_path):
    rows = rows_of(tmp_path, row("a.jpg"))
    assert rows.points("b.jpg") is None
    assert "b.jpg" not in rows
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (ROW[:-1], "line 2 .*135 coordinates"),
        (["inf", *ROW[1:]], "line 2 .*only some"),
        (["x", *ROW[1:]], "line 2 .*could not convert"),
    ],
)
def test_a_row_that_cannot_be_used_names_its_line(tmp_path, cells, words):
    rows = rows_of(tmp_path, row("a.jpg"), row("b.jpg", cells))
    assert rows.points("a.jpg") is not None
    with pytest.raises(ValueError, match=words):
        rows.points("b.jpg")


def test_two_rows_about_one_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lines 1 and 3 are both about a\.jpg"):
        rows_of(tmp_path, row("a.jpg"), row("b.jpg"), row("a.jpg"))


def test_a_row_without_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2 has no id"):
        rows_of(tmp_path, row("a.jpg"), row(""))


def test_a_row_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        rows_of(tmp_path, row("ä.jpg"), encoding="latin-1")


@pytest.mark.parametrize("name", ["a b.jpg", "a,b,c.jpg", "ä.ö.jpg", "1.jpg", "x/y,1.5.jpg"])
def test_names_with_blanks_commas_dots_and_other_letters_work(tmp_path, name):
    rows = rows_of(tmp_path, row("first.jpg"), row(name))
    np.testing.assert_array_equal(rows.points(name).T.ravel(), [float(cell) for cell in ROW])


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\n\n")])
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path, encoding, newline):
    rows = rows_of(tmp_path, row("a.jpg"), row("b.jpg"), encoding=encoding, newline=newline)
    assert list(rows.names()) == ["a.jpg", "b.jpg"]
    np.testing.assert_array_equal(rows.points("a.jpg"), rows.points("b.jpg"))


# folds


def write_split(folder, split, labels, *, landmarks=True):
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / split / "image_ids.txt").write_text("".join(f"{name}\n" for name in labels), encoding="utf-8")
    (folder / split / "class_labels.txt").write_text("".join(f"{name},{label}\n" for name, label in labels.items()), encoding="utf-8")
    if landmarks:
        (folder / split / "landmarks.txt").write_text("".join(row(name) + "\n" for name in labels), encoding="utf-8")


TRAIN = {"i/a.jpg": 0, "i/b.jpg": 3, "i/c.jpg": 6}
TEST = {"i/x.jpg": 1, "i/y.jpg": 2}


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path, "train", TRAIN)
    write_split(tmp_path, "valid", TEST)
    write_split(tmp_path, "test", TEST)
    return tmp_path


def refused(folder, words, kind=ValueError):
    with pytest.raises(kind, match=words):
        Folds(folder)


def test_the_released_shape_is_read(folder):
    folds = Folds(folder)
    assert folds.labels == {"train": TRAIN, "val": TEST, "test": TEST}
    assert folds.val_is_test
    assert folds.has_landmarks
    assert folds.points("i/b.jpg").shape == (68, 2)
    assert folds.points("i/y.jpg").shape == (68, 2)
    assert folds.facts()["pictures"] == {"train": 3, "val": 2, "test": 2}


def test_the_order_is_that_of_the_ids_not_of_the_labels(folder):
    (folder / "train/class_labels.txt").write_text("i/c.jpg,6\ni/a.jpg,0\ni/b.jpg,3\n")
    assert list(Folds(folder).labels["train"]) == list(TRAIN)


def test_a_val_of_its_own_is_told_from_the_test_split(folder):
    write_split(folder, "valid", {"i/v.jpg": 4})
    folds = Folds(folder)
    assert not folds.val_is_test
    assert folds.labels["val"] == {"i/v.jpg": 4}


def test_without_val_there_is_none(folder):
    for path in (folder / "valid").iterdir():
        path.unlink()
    (folder / "valid").rmdir()
    folds = Folds(folder)
    assert list(folds.labels) == ["train", "test"]
    assert not folds.val_is_test


def test_class_id_yaml_says_what_the_numbers_are(folder):
    names = [name.capitalize() for name in reversed(EXPRESSIONS)]
    (folder / "class_id.yaml").write_text("# classes\n" + "".join(f"{name}: {number}\n" for number, name in enumerate(names)))
    assert Folds(folder).labels["train"] == {"i/a.jpg": 6, "i/b.jpg": 3, "i/c.jpg": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Happines: 1\n", "'Happines' is no expression.*'happiness'"),
        ("Fear 3\n", "line 1 is not NAME: NUMBER"),
        ("Fear: 3\nAnger: 3\n", "line 2: 'Anger: 3' repeats"),
        ("Fear: 3\nFear: 4\n", "line 2: 'Fear: 4' repeats"),
    ],
)
def test_a_class_id_yaml_that_cannot_be_meant_is_refused(folder, text, words):
    (folder / "class_id.yaml").write_text(text)
    refused(folder, words)


def test_missing_folders_and_files_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder", FileNotFoundError)
    (folder / "test/image_ids.txt").unlink()
    refused(folder, r"test.image_ids\.txt is missing", FileNotFoundError)
    (folder / "test").rename(folder / "exam")
    refused(folder, "no 'test' folder", FileNotFoundError)


@pytest.mark.parametrize("line", ["i/c.jpg 6", "i/c.jpg,7", "i/c.jpg,-1", "i/c.jpg,six", "i/c.jpg,²", "i/c.jpg,", "i/c.jpg,6.0"])
def test_a_label_that_is_none_is_refused_with_its_line(folder, line):
    (folder / "train/class_labels.txt").write_text(f"i/a.jpg,0\ni/b.jpg,3\n{line}\n", encoding="utf-8")
    refused(folder, r"class_labels\.txt: line 3 must be ID,LABEL")


@pytest.mark.parametrize("name", ["/a.jpg", "../a.jpg", ""])
def test_an_id_that_leaves_the_download_is_refused(folder, name):
    write_split(folder, "train", {**TRAIN, name: 1}, landmarks=False)
    refused(folder, "line 4: .* is (an absolute|a path with|no file)")


def test_repeated_ids_are_refused(folder):
    (folder / "train/image_ids.txt").write_text("i/a.jpg\ni/b.jpg\ni/c.jpg\ni/a.jpg\n")
    refused(folder, r"image_ids\.txt: i/a\.jpg is listed twice")
    (folder / "train/class_labels.txt").write_text("i/a.jpg,0\ni/a.jpg,0\n")
    refused(folder, r"class_labels\.txt: line 2: i/a\.jpg is listed twice")


def test_lists_that_differ_are_refused(folder):
    (folder / "train/image_ids.txt").write_text("i/a.jpg\ni/b.jpg\n")
    refused(folder, r"differ in 1 ids, first: i/c\.jpg")


@pytest.mark.parametrize(("split", "with_"), [("valid", "train"), ("test", "train"), ("valid", "test")])
def test_a_picture_in_two_splits_is_refused(folder, split, with_):
    write_split(folder, "valid", {"i/v.jpg": 4})
    write_split(folder, split, {"i/new.jpg": 1, **dict([next(iter({"train": TRAIN, "test": TEST}[with_].items()))])})
    refused(folder, "1 ids are in both")


def test_rows_and_pictures_that_do_not_meet_are_counted(folder):
    lines = [row("i/a.jpg"), row("i/b.jpg"), row("i/stray.jpg"), row("i/other.jpg")]
    (folder / "train/landmarks.txt").write_text("\n".join(lines))
    facts = Folds(folder).facts()
    assert (facts["rows_without_picture"], facts["pictures_without_row"]) == (2, 1)


def test_one_landmark_file_for_all_splits_serves_too(folder):
    for split in ("train", "valid", "test"):
        (folder / split / "landmarks.txt").unlink()
    assert not Folds(folder).has_landmarks
    (folder / "landmarks.txt").write_text("".join(row(name) + "\n" for name in {**TRAIN, **TEST}))
    assert Folds(folder).points("i/x.jpg") is not None


@pytest.mark.parametrize("path", ["train/class_labels.txt", "train/landmarks.txt", "class_id.yaml"])
def test_the_hash_follows_every_file(folder, path):
    (folder / "class_id.yaml").write_text("".join(f"{name}: {number}\n" for number, name in enumerate(EXPRESSIONS)))
    before = Folds(folder).sha256
    assert Folds(folder).sha256 == before
    text = (folder / path).read_text()
    swapped = {
        "train/class_labels.txt": text.replace("a.jpg,0", "a.jpg,1"),
        "train/landmarks.txt": text.replace("1.00", "1.01", 1),
        "class_id.yaml": text.replace("neutral: 0", "neutral: 1").replace("happiness: 1", "happiness: 0"),
    }
    (folder / path).write_text(swapped[path])
    assert Folds(folder).sha256 != before


# the cut of val


class Listed(PublishedDataset):
    classes = EXPRESSIONS

    def splits(self):
        raise NotImplementedError

    def read(self, item):
        raise BadPictureError("none")


def listed(tmp_path, **options):
    return Listed(Listed.Options(**options), raw=tmp_path)


def items(prefix, n=60):
    return [Item(source=f"{prefix}{i}.jpg", label=i % 7) for i in range(n)]


def test_val_is_cut_by_the_published_rule_and_nothing_is_lost(tmp_path):
    dataset = listed(tmp_path, val_fraction=0.2, val_salt="s")
    splits = dataset._with_val(items("a"), items("t", 9))
    _, val = stratified_cut(items("a"), fraction=0.2, salt="s")
    assert sorted(i.source for i in splits["val"]) == sorted(i.source for i in val)
    assert sorted(i.source for i in [*splits["train"], *splits["val"]]) == sorted(i.source for i in items("a"))
    assert sorted(i.source for i in splits["test"]) == sorted(i.source for i in items("t", 9))
    facts = dataset.provenance()["val"]
    assert facts["sources_sha256"] == hash_sources(val)
    assert "hashed" not in facts


def test_with_names_val_does_not_depend_on_where_the_pictures_lie(tmp_path):
    numbers = []
    hashes = set()
    for prefix in ("here/", "there/x_"):
        dataset = listed(tmp_path)
        items_of = dataset._with_val(items(prefix), items("t", 9), names={f"{prefix}{i}.jpg": f"{i}.jpg" for i in range(60)})
        numbers.append(sorted(item.source.removeprefix(prefix) for item in items_of["val"]))
        assert all(item.source.startswith(prefix) for item in [*items_of["train"], *items_of["val"]])
        assert len(items_of["train"]) + len(items_of["val"]) == 60
        hashes.add(dataset.provenance()["val"]["sources_sha256"])
    assert numbers[0] == numbers[1]
    assert len(hashes) == 1


def test_without_a_fraction_there_is_no_val(tmp_path):
    dataset = listed(tmp_path, val_fraction=0)
    assert list(dataset._with_val(items("a"), items("t"))) == ["train", "test"]
    assert dataset.provenance()["val"] == {"cut_from_train": False}


def test_without_a_raw_folder_it_says_what_to_type():
    with pytest.raises(ValueError, match="--raw DIR"):
        Listed(Listed.Options(), raw=None)
