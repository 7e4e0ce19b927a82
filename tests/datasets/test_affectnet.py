from __future__ import annotations

import io
import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from bench.data.index import load_index
from bench.data.verify import verify
from bench.dataset import DATASETS, EXPRESSIONS, BadPictureError, Item
from bench.datasets.affectnet import CSV_COLUMNS, ORIGINAL, AffectNet, AffectNet8, CsvRelease, NpyRelease, Table
from bench.prepare.pack import prepare

from .affectnet_tree import make_affectnet

LAYOUTS = ("npy", "csv")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A download of each layout, not to be changed, with what is true of its pictures."""
    roots = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    return {layout: (root, make_affectnet(root, layout)) for layout, root in roots.items()}


@pytest.fixture
def npy(pristine, tmp_path):
    shutil.copytree(pristine["npy"][0], tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def csv_root(pristine, tmp_path):
    shutil.copytree(pristine["csv"][0], tmp_path / "raw")
    return tmp_path / "raw"


def dataset(root, cls=AffectNet, **options):
    return cls(cls.Options(**options), raw=root)


def listed(root, cls=AffectNet, **options):
    """(source -> item of all splits, dataset)."""
    made = dataset(root, cls, **options)
    return {item.source: item for items in made.splits().values() for item in items}, made


def reasons(made):
    return {line.source: line.reason for line in made.rejected()}


def edit_rows(root, change, name="training.csv"):
    """Replace the lines of a list by what ``change`` makes of them, header first."""
    path = root / name
    lines = change(path.read_text(encoding="utf-8").splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_cells(root, row, **cells):
    """Change cells of a line, 1 = the first after the header; returns the source of its picture."""
    kept = []

    def change(lines):
        values = lines[row].split(",")
        kept.append(f"Manually_Annotated_Images/{values[0]}")
        for column, value in cells.items():
            values[CSV_COLUMNS.index(column)] = value
        lines[row] = ",".join(values)
        return lines

    edit_rows(root, change)
    return kept[0]


def bad(made, source):
    with pytest.raises(BadPictureError) as error:
        made.read(Item(source=source, label=0))
    return str(error.value)


# --- entries


def test_both_entries_are_registered_and_all_takes_only_the_seven_classes():
    seven, eight = DATASETS.get("affectnet"), DATASETS.get("affectnet8")
    assert (seven.target, eight.target) == (AffectNet, AffectNet8)
    assert (seven.info.in_all, eight.info.in_all) == (True, False)
    assert [(d.key, d.value, d.dataset) for d in eight.info.defaults] == [("guidance.weight", 9.0, "affectnet8")]


def test_published_numbers_are_those_of_the_issue(npy):
    expected = dataset(npy).expected()
    train = {"neutral": 74874, "happiness": 134415, "sadness": 25459, "surprise": 14090, "fear": 6378, "disgust": 3803, "anger": 24882}
    assert expected == {"train": train, "test": dict.fromkeys(train, 500)}
    assert sum(expected["train"].values()) == 283_901


@pytest.mark.parametrize(("layout", "test"), [("npy", 499), ("csv", 500)])
def test_contempt_has_one_test_picture_less_in_the_newer_layout(pristine, layout, test):
    made = dataset(pristine[layout][0], AffectNet8)
    made.splits()
    expected = made.expected()
    assert (expected["train"]["contempt"], expected["test"]["contempt"]) == (3750, test)
    assert sum(expected["train"].values()) == 287_651


# --- both layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [AffectNet, AffectNet8])
def test_every_picture_is_listed_with_the_class_of_its_original_label(pristine, layout, cls):
    root, truths = pristine[layout]
    items, made = listed(root, cls)
    wanted = {source: truth for source, truth in truths.items() if ORIGINAL[truth.original] in made.classes}
    assert items.keys() == wanted.keys()
    assert all(made.classes[items[source].label] == ORIGINAL[truth.original] for source, truth in wanted.items())
    assert made.rejected() == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_test_is_the_published_validation_set_and_val_is_cut_from_train(pristine, layout):
    root, truths = pristine[layout]
    splits = dataset(root, val_fraction=0.25).splits()
    assert {split: len(items) for split, items in splits.items()} == {"train": 21, "val": 7, "test": 14}
    assert all(truths[item.source].split == ("test" if split == "test" else "train") for split, items in splits.items() for item in items)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_val_is_cut_where_the_fraction_is_zero(pristine, layout):
    assert dataset(pristine[layout][0], val_fraction=0).splits().keys() == {"train", "test"}


def test_what_is_no_expression_is_counted_not_reported(pristine):
    _, made = listed(pristine["csv"][0])
    assert made.provenance()["left_out"] == {
        "train": {"contempt": 4, "none": 2, "uncertain": 1, "no-face": 3},
        "test": {"contempt": 2, "none": 1, "uncertain": 1, "no-face": 1},
    }
    assert made.rejected() == ()


def test_contempt_is_a_class_of_the_eight_and_not_left_out(pristine):
    _, made = listed(pristine["npy"][0], AffectNet8)
    assert made.provenance()["left_out"] == {"train": {}, "test": {}}
    assert made.classes == (*EXPRESSIONS, "contempt")


def test_the_index_can_tell_what_the_original_labels_became(pristine):
    _, made = listed(pristine["npy"][0])
    assert made.provenance()["original_labels"] == {
        "0": "neutral",
        "1": "happiness",
        "2": "sadness",
        "3": "surprise",
        "4": "fear",
        "5": "disgust",
        "6": "anger",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_faces_have_landmarks_valence_and_arousal_in_pixels_of_the_crop(pristine, layout):
    root, truths = pristine[layout]
    items, made = listed(root)
    for source in items:
        face, truth = made.read(items[source]), truths[source]
        assert face.image.shape == (64, 64, 3)
        assert face.box == (0, 0, 64, 64)
        np.testing.assert_allclose(face.landmarks, truth.landmarks, atol=1e-4)
        assert face.extra == {"valence": truth.valence, "arousal": truth.arousal}


def test_the_csv_crop_shows_the_pixels_of_the_box(pristine):
    root, truths = pristine["csv"]
    items, made = listed(root)
    source = min(items)
    x, y, width, height = truths[source].box
    whole = np.asarray(Image.open(root / source))
    assert (made.read(items[source]).image == whole[y : y + height, x : x + width]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shipped_landmarks_are_not_read_where_another_source_is_asked_for(pristine, layout):
    items, made = listed(pristine[layout][0], landmarks="none")
    assert made.read(items[min(items)]).landmarks is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_listings_are_equal(pristine, layout):
    assert dataset(pristine[layout][0]).splits() == dataset(pristine[layout][0]).splits()


# --- which layout


def test_a_folder_without_either_layout_is_refused_with_what_is_missing(tmp_path):
    (tmp_path / "train_set" / "images").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"lacks train_set/annotations, val_set/images.* lacks training.csv.*npy layout has.*csv layout has"
    ):
        dataset(tmp_path).splits()


def test_a_layout_one_folder_deeper_is_pointed_out(npy):
    with pytest.raises(ValueError, match=f"give --raw {re.escape(str(npy))}"):
        dataset(npy.parent).splits()


def test_with_both_layouts_one_must_be_named(npy, pristine):
    shutil.copytree(pristine["csv"][0], npy, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="distribution=npy, or --option distribution=csv"):
        dataset(npy).splits()
    assert all(source.startswith("Manually") for source in listed(npy, distribution="csv")[0])
    assert all("/images/" in source for source in listed(npy, distribution="npy")[0])


def test_asking_for_the_layout_that_is_not_there_is_refused(npy):
    with pytest.raises(ValueError, match=r"of the csv layout it lacks training.csv, validation.csv, Manually_Annotated_Images"):
        dataset(npy, distribution="csv").splits()


def test_the_lists_and_pictures_of_the_csv_layout_may_lie_in_their_own_folders(csv_root):
    (csv_root / "Manually_Annotated_file_lists").mkdir()
    for name in ("training.csv", "validation.csv"):
        (csv_root / name).rename(csv_root / "Manually_Annotated_file_lists" / name)
    (csv_root / "Manually_Annotated").mkdir()
    (csv_root / "Manually_Annotated_Images").rename(csv_root / "Manually_Annotated" / "Manually_Annotated_Images")
    items, made = listed(csv_root)
    assert len(items) == 42
    assert made.read(items[min(items)]).landmarks is not None


def test_a_missing_raw_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--raw .*nowhere: no such folder"):
        dataset(tmp_path / "nowhere").splits()


def test_a_split_without_a_usable_picture_is_refused_with_the_first_reason(npy):
    for path in (npy / "val_set" / "annotations").glob("*_exp.npy"):
        path.unlink()
    with pytest.raises(ValueError, match=r"for split 'test'; first of \d+ that cannot be used: val_set/images/0.jpg: no annotation"):
        dataset(npy).splits()


# --- npy: annotations


def an_id(root, split="train_set"):
    """The id of a happy face."""
    return min(
        path.name.removesuffix("_exp.npy")
        for path in (root / split / "annotations").glob("*_exp.npy")
        if np.load(path, allow_pickle=False) == "1"
    )


def annotation(root, ident, kind):
    return root / "train_set" / "annotations" / f"{ident}_{kind}.npy"


@pytest.mark.parametrize("value", ["1", 1, 1.0, np.array(["1"]), np.array([1]), np.array(b"1"), np.array([[1]]), np.uint8(1)])
def test_an_expression_may_be_text_or_number_with_or_without_dimension(npy, value):
    ident = an_id(npy)
    np.save(annotation(npy, ident, "exp"), value)
    items, made = listed(npy)
    assert made.classes[items[f"train_set/images/{ident}.jpg"].label] == "happiness"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("11", "expression '11' is not one of 0 to 10"),
        (-1, "expression '-1' is not one of 0 to 10"),
        (2.5, "expression '2.5' is not one of 0 to 10"),
        ("nan", "expression 'nan' is not one of 0 to 10"),
        ("happy", "expression 'happy' is not one of 0 to 10"),
        (np.array([1, 2]), "holds 2 values, one is needed"),
        (np.array([True]), "holds bool, not numbers or their text"),
        (np.zeros(5000), "damaged: "),
    ],
)
def test_an_expression_out_of_range_is_reported(npy, value, reason):
    ident = an_id(npy)
    np.save(annotation(npy, ident, "exp"), value)
    items, made = listed(npy)
    source = f"train_set/images/{ident}.jpg"
    assert source not in items
    assert reasons(made)[source].startswith(f"{ident}_exp.npy: {reason}")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("kind", ["exp", "lnd", "aro", "val"])
def test_a_pickled_object_is_reported_and_not_read(npy, kind):
    ident = an_id(npy)
    np.save(annotation(npy, ident, kind), np.array([Bomb()], dtype=object), allow_pickle=True)
    items, made = listed(npy)
    source = f"train_set/images/{ident}.jpg"
    reason = reasons(made)[source] if kind == "exp" else bad(made, source)
    assert reason == f"{ident}_{kind}.npy: holds a pickled object; not read"
    assert (source in items) == (kind != "exp")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"3", "not an .npy file"),
        (b"\x80\x04K\x01.", "holds a pickled object; not read"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "damaged: "),
    ],
)
def test_a_damaged_annotation_is_reported(npy, data, reason):
    ident = an_id(npy)
    annotation(npy, ident, "exp").write_bytes(data)
    _, made = listed(npy)
    assert reasons(made)[f"train_set/images/{ident}.jpg"].startswith(f"{ident}_exp.npy: {reason}")


def test_an_annotation_cut_short_is_reported(npy):
    ident = an_id(npy)
    path = annotation(npy, ident, "lnd")
    path.write_bytes(path.read_bytes()[:-8])
    assert f"{ident}_lnd.npy: damaged: " in bad(dataset(npy), f"train_set/images/{ident}.jpg")


@pytest.mark.parametrize(
    "shape",
    [
        lambda points: points,
        lambda points: points.reshape(-1),
        lambda points: points.T,
        lambda points: np.asfortranarray(points),
        lambda points: points.reshape(1, 136),
        lambda points: points.astype(str),
        lambda points: points.astype(">f8"),
    ],
)
def test_landmarks_may_come_in_any_shape_that_says_which_is_x(npy, shape):
    points = np.arange(136, dtype=float).reshape(68, 2) / 3
    np.save(annotation(npy, "0", "lnd"), shape(points))
    np.testing.assert_allclose(dataset(npy).read(Item(source="train_set/images/0.jpg", label=0)).landmarks, points)


@pytest.mark.parametrize("values", [np.zeros(136), np.full(136, np.inf), np.r_[np.ones(135), np.nan]])
def test_zero_and_infinite_landmarks_mean_that_there_are_none(npy, values):
    np.save(annotation(npy, "0", "lnd"), values)
    assert dataset(npy).read(Item(source="train_set/images/0.jpg", label=0)).landmarks is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(134), "134 numbers, 136 are needed"),
        (np.array(["a"] * 136), "could not convert string to float"),
        (9999.0 + np.arange(136) % 9, "all landmarks lie outside of the 64 x 64 face"),
    ],
)
def test_landmarks_that_cannot_be_make_a_bad_picture(npy, values, reason):
    np.save(annotation(npy, "0", "lnd"), values)
    assert reason in bad(dataset(npy), "train_set/images/0.jpg")


def test_missing_landmarks_and_affect_keep_the_picture_and_are_counted(npy):
    ident = an_id(npy)
    for kind in ("lnd", "val", "aro"):
        annotation(npy, ident, kind).unlink()
    items, made = listed(npy)
    face = made.read(items[f"train_set/images/{ident}.jpg"])
    assert (face.landmarks, face.extra) == (None, {})
    assert made.provenance()["notes"] == [
        "train_set: 1 pictures have no _lnd.npy, hence no landmarks",
        "train_set: 1 pictures have no _val.npy, hence no valence",
        "train_set: 1 pictures have no _aro.npy, hence no arousal",
    ]


def test_valence_that_is_not_known_is_left_out(npy):
    np.save(annotation(npy, "0", "val"), np.array("-2"))
    assert dataset(npy).read(Item(source="train_set/images/0.jpg", label=0)).extra.keys() == {"arousal"}


def test_valence_that_is_no_number_makes_a_bad_picture(npy):
    np.save(annotation(npy, "0", "val"), np.array("much"))
    assert bad(dataset(npy), "train_set/images/0.jpg").startswith("0_val.npy: could not convert")


# --- npy: files


def rename(root, ident, name, stem):
    """Give a picture and its annotations another name."""
    folder = root / "train_set"
    (folder / "images" / f"{ident}.jpg").rename(folder / "images" / name)
    for kind in ("exp", "lnd", "val", "aro"):
        annotation(root, ident, kind).rename(folder / "annotations" / f"{stem}_{kind}.npy")
    return f"train_set/images/{name}"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a b.jpg", "a b"),
        ("a,b.jpg", "a,b"),
        ("a.b.c.jpg", "a.b.c"),
        ("größe 笑.jpg", "größe 笑"),
        ("y.JPG", "y"),
        ("x.png", "x"),
        ("bare", "bare"),
        ("bare.v2", "bare.v2"),
        ("_.jpg.jpg", "_.jpg"),
    ],
)
def test_names_with_blanks_commas_dots_other_letters_and_any_suffix_work(npy, pristine, name, stem):
    ident = an_id(npy)
    source = rename(npy, ident, name, stem)
    items, made = listed(npy)
    assert made.rejected() == ()
    truth = pristine["npy"][1][f"train_set/images/{ident}.jpg"]
    np.testing.assert_allclose(made.read(items[source]).landmarks, truth.landmarks)


def test_a_picture_without_annotation_and_an_annotation_without_picture_are_reported(npy):
    ident = an_id(npy)
    annotation(npy, ident, "exp").unlink()
    orphan = next(i for i in map(str, range(32)) if i != ident)
    (npy / "train_set" / "images" / f"{orphan}.jpg").unlink()
    _, made = listed(npy)
    assert reasons(made) == {
        f"train_set/images/{ident}.jpg": f"no annotation: {ident}_exp.npy is not in train_set/annotations",
        f"train_set/annotations/{orphan}_exp.npy": f"no picture: nothing called {orphan} in train_set/images",
    }


def test_of_two_pictures_with_one_id_the_jpg_is_used_and_the_other_reported(npy):
    ident = an_id(npy)
    folder = npy / "train_set" / "images"
    for suffix in (".JPG", ".png"):
        shutil.copy(folder / f"{ident}.jpg", folder / f"{ident}{suffix}")
    items, made = listed(npy)
    assert f"train_set/images/{ident}.jpg" in items
    expected = f"another picture has the id {ident!r} too, and is used"
    assert reasons(made) == {f"train_set/images/{ident}{suffix}": expected for suffix in (".JPG", ".png")}


def test_folders_broken_links_and_hidden_files_among_the_pictures_do_no_harm(npy):
    folder = npy / "train_set" / "images"
    (folder / "sub").mkdir()
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / ".DS_Store").write_bytes(b"x")
    _, made = listed(npy)
    assert reasons(made) == {
        "train_set/images/sub": "a folder, not a picture",
        "train_set/images/gone.jpg": "a link to nothing, not a picture",
    }


def test_a_file_name_that_is_not_utf_8_is_reported(npy):
    path = npy / "train_set" / "images" / b"\xff.jpg".decode("utf-8", "surrogateescape")
    try:
        path.write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    _, made = listed(npy)
    assert [line.reason for line in made.rejected()] == ["the file name is not valid UTF-8; rename the file"]
    assert json.dumps(made.rejected()[0].source, ensure_ascii=False).encode()


def test_other_files_among_the_annotations_are_noted(npy):
    (npy / "train_set" / "annotations" / "0_exp.txt").write_text("1")
    _, made = listed(npy)
    assert made.provenance()["notes"][0].startswith("train_set/annotations: 1 files are called neither ID_exp.npy")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("data", "reason"),
    [(lambda d: b"", "the file is empty"), (lambda d: d[: len(d) // 2], "damaged"), (lambda d: b"<html>", "not a picture")],
)
def test_pictures_that_cannot_be_decoded_are_bad(pristine, tmp_path, layout, data, reason):
    root = tmp_path / "raw"
    shutil.copytree(pristine[layout][0], root)
    source = min(listed(root)[0])
    (root / source).write_bytes(data((root / source).read_bytes()))
    assert reason in bad(dataset(root), source)


def test_an_orientation_turns_box_landmarks_and_picture_alike(csv_root, pristine):
    source = min(listed(csv_root)[0])
    truth = pristine["csv"][1][source]
    upright = dataset(csv_root).read(Item(source=source, label=0)).image
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(csv_root / source) as picture:
        stored = picture.copy()
    stored.save(csv_root / source, "PNG", exif=exif)
    face = dataset(csv_root).read(Item(source=source, label=0))
    assert (face.image == np.rot90(upright, -1)).all()
    x, y = truth.landmarks.T
    np.testing.assert_allclose(face.landmarks, np.stack([63 - y, x], 1), atol=1e-4)


# --- csv: rows


def test_a_list_without_header_has_the_published_columns(csv_root):
    whole = listed(csv_root)[0]
    for name in ("training.csv", "validation.csv"):
        edit_rows(csv_root, lambda lines: lines[1:], name)
    items, made = listed(csv_root)
    assert items == whole
    assert {facts["header"] for facts in made.provenance()["lists"].values()} == {False}
    assert all(made.read(item).landmarks is not None for item in items.values())


def test_columns_are_found_by_name_wherever_they_stand(csv_root):
    whole = listed(csv_root)[0]
    edit_rows(csv_root, lambda lines: [",".join(["extra", *reversed(line.split(","))]) for line in lines])
    items, made = listed(csv_root)
    assert items == whole
    assert all(made.read(item).landmarks is not None for item in items.values())


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(csv_root):
    whole = listed(csv_root)[0]
    for header in (True, False):
        path = csv_root / "training.csv"
        text = path.read_text("utf-8-sig").replace("\r\n", "\n")
        path.write_bytes(b"\xef\xbb\xbf" + (text if header else text.partition("\n")[2]).replace("\n", "\r\n").encode())
        items, made = listed(csv_root)
        assert items == whole
        assert all(made.read(item).landmarks is not None for item in items.values())


def test_a_header_that_lacks_a_column_is_refused_by_name(csv_root):
    edit_rows(csv_root, lambda lines: [lines[0].replace("face_width", "w"), *lines[1:]])
    with pytest.raises(ValueError, match=r"training.csv: line 1 lacks the column 'face_width'"):
        dataset(csv_root).splits()


def test_a_file_that_is_no_such_list_is_refused(csv_root):
    (csv_root / "training.csv").write_text("hello\n")
    with pytest.raises(ValueError, match=r"training.csv: line 1 has 1 cells and is no header"):
        dataset(csv_root).splits()


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"expression": "11"}, "expression '11' is not one of 0 to 10"),
        ({"expression": ""}, "expression '' is not one of 0 to 10"),
        ({"expression": "1,1"}, "10 cells, 9 are needed"),
        ({"subDirectory_filePath": "a,b.jpg"}, "10 cells, 9 are needed"),
        ({"subDirectory_filePath": '"open.jpg'}, "quoted wrongly"),
        ({"subDirectory_filePath": "/etc/passwd"}, "'/etc/passwd': an absolute path"),
        ({"subDirectory_filePath": "C:\\face.jpg"}, "an absolute path"),
        ({"subDirectory_filePath": "1/../../secret.jpg"}, "a path with '..'"),
        ({"subDirectory_filePath": ""}, "no file name"),
        ({"subDirectory_filePath": "1/gone.jpg", "expression": "3"}, "training.csv: line 3: no such file"),
        ({"subDirectory_filePath": "1/" + "x" * 300, "expression": "3"}, "no such file"),
        ({"subDirectory_filePath": "1", "expression": "3"}, "no such file"),
    ],
)
def test_a_row_that_cannot_be_used_is_reported_and_the_others_stay(csv_root, cells, reason):
    whole = listed(csv_root)[0]
    source = edit_cells(csv_root, 2, **cells)
    items, made = listed(csv_root)
    assert items.keys() == whole.keys() - {source}
    (line,) = made.rejected()
    assert reason in line.reason
    assert "line 3" in line.source + line.reason
    assert line.split == "train"


def test_a_line_that_is_not_utf_8_is_reported(csv_root):
    path = csv_root / "training.csv"
    path.write_bytes(path.read_bytes() + b"1/\xff.jpg,1,1,1,1,1,1,1,1\n")
    items, made = listed(csv_root)
    assert len(items) == 42
    assert [line.reason for line in made.rejected()] == ["not UTF-8; save the file as UTF-8"]
    assert made.read(items[min(items)]).landmarks is not None


def test_a_missing_picture_of_a_label_that_is_left_out_is_nobody_s_loss(csv_root):
    edit_cells(csv_root, 2, subDirectory_filePath="1/gone.jpg", expression="10")
    assert listed(csv_root)[1].rejected() == ()


@pytest.mark.parametrize("name", ["a b.jpg", "a, b.jpg", "a.b.jpg", "größe 笑.jpg", "A.JPG", "x.png", "bare", 'the "face".jpg'])
def test_paths_with_blanks_commas_dots_other_letters_and_any_suffix_work(csv_root, pristine, name):
    items, _ = listed(csv_root)
    quoted = '"' + f"1/{name}".replace('"', '""') + '"' if set(name) & set(',"') else f"1/{name}"
    lines = (csv_root / "training.csv").read_text(encoding="utf-8").splitlines()
    row = next(i for i, line in enumerate(lines) if f"Manually_Annotated_Images/{line.split(',')[0]}" in items)
    old = edit_cells(csv_root, row, subDirectory_filePath=quoted)
    (csv_root / "Manually_Annotated_Images" / "1").mkdir(exist_ok=True)
    (csv_root / old).rename(csv_root / "Manually_Annotated_Images" / "1" / name)
    again, made = listed(csv_root)
    face = made.read(again[f"Manually_Annotated_Images/1/{name}"])
    assert made.rejected() == ()
    np.testing.assert_allclose(face.landmarks, pristine["csv"][1][old].landmarks, atol=1e-4)


def duplicate(root, expression):
    """Append a line about the picture of line 2, whose label becomes 3; returns its source."""
    source = edit_cells(root, 1, expression="3")
    edit_rows(root, lambda lines: [*lines, "./" + ",".join([*lines[1].split(",")[:6], expression, "0", "0"])])
    return source, sum(1 for _ in (root / "training.csv").open())


def test_a_picture_listed_again_with_its_label_is_used_once(csv_root):
    source, last = duplicate(csv_root, "3")
    items, made = listed(csv_root)
    assert source in items
    assert [line.reason for line in made.rejected()] == [f"training.csv: line {last}: listed again; line 2 is used"]


def test_a_row_that_is_not_used_lends_nothing_to_the_one_that_is(csv_root):
    source, _ = duplicate(csv_root, "3")
    edit_cells(csv_root, 1, expression="99", face_width="NULL")
    items, made = listed(csv_root)
    assert len(made.rejected()) == 1
    assert made.read(items[source]).extra == {"valence": 0.0, "arousal": 0.0}


@pytest.mark.parametrize("second_label", ["4", "8"])
def test_a_picture_listed_with_different_labels_is_not_used_at_all(csv_root, second_label):
    source, last = duplicate(csv_root, second_label)
    items, made = listed(csv_root)
    assert source not in items
    assert [line.reason for line in made.rejected()] == [
        f"training.csv: line 2 says 3, but the lines about it differ: 3, {second_label}",
        f"training.csv: line {last} says {second_label}, but the lines about it differ: 3, {second_label}",
    ]


def test_a_picture_of_both_lists_stays_in_test_only(csv_root):
    row = (csv_root / "validation.csv").read_text(encoding="utf-8").splitlines()[1].split(",")
    edit_rows(csv_root, lambda lines: [*lines, ",".join([*row[:6], "3", *row[7:]])])
    made = dataset(csv_root)
    splits = made.splits()
    assert [(line.split, line.reason) for line in made.rejected()] == [("train", "listed for test too, and kept there only")]
    assert not {item.source for item in splits["train"]} & {item.source for item in splits["test"]}


def test_rows_are_found_even_if_their_hashes_are_the_same(csv_root, monkeypatch):
    monkeypatch.setattr("bench.datasets.affectnet.hash", lambda text: len(text) % 2, raising=False)
    table = Table(csv_root, "training.csv")
    paths = [cells[0] for _, cells in table.rows()]
    assert [table.find(path)[1][0] for path in paths] == paths
    assert table.find("1/nothing.jpg") is None


# --- csv: face boxes


def boxed(root, x, y, width, height):
    return edit_cells(root, 1, face_x=str(x), face_y=str(y), face_width=str(width), face_height=str(height))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (("NULL", 1, 2, 3), "the face box 'NULL 1 2 3' is not four numbers"),
        ((1, 1, 0, 3), "the face box '1 1 0 3' has no area"),
        ((1, 1, 4, -3), "the face box '1 1 4 -3' has no area"),
        (("nan", 1, 4, 4), "has no area"),
        ((1, 1, "inf", 4), "has no area"),
        ((500, 1, 4, 4), r"the face box '500 1 4 4' is outside of the"),
        ((-50, 1, 50, 4), r"the face box '-50 1 50 4' is outside of the"),
    ],
)
def test_a_face_box_that_cannot_be_makes_a_bad_picture(csv_root, box, reason):
    source = boxed(csv_root, *box)
    message = bad(dataset(csv_root), source)
    assert message.startswith("training.csv: line 2: ")
    assert reason in message


def test_a_face_box_is_clipped_to_the_picture(csv_root, pristine):
    source = boxed(csv_root, -10, -20, 60, 65)
    face = dataset(csv_root).read(Item(source=source, label=0))
    truth = pristine["csv"][1][source]
    assert face.image.shape == (45, 50, 3)
    np.testing.assert_allclose(face.landmarks, truth.landmarks + truth.box[:2], atol=1e-4)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"facial_landmarks": "1;2"}, "training.csv: line 2: facial_landmarks: 2 numbers, 136 are needed"),
        ({"facial_landmarks": ";".join(["a"] * 136)}, "facial_landmarks: could not convert string to float: 'a'"),
        ({"facial_landmarks": ";".join(str(4000 + i % 9) for i in range(136))}, "all landmarks lie outside of the 64 x 64 face"),
        ({"valence": "much"}, "training.csv: line 2: valence 'much' is not a number"),
    ],
)
def test_a_row_whose_facts_are_malformed_makes_a_bad_picture(csv_root, cells, reason):
    assert reason in bad(dataset(csv_root), edit_cells(csv_root, 1, **cells))


@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_zero_and_infinite_landmarks_of_a_row_mean_that_there_are_none(csv_root, value):
    source = edit_cells(csv_root, 1, facial_landmarks=";".join([value] * 136))
    assert dataset(csv_root).read(Item(source=source, label=0)).landmarks is None


def test_affect_of_a_row_that_is_not_known_is_left_out(csv_root):
    source = edit_cells(csv_root, 1, valence="-2", arousal="0.5")
    assert dataset(csv_root).read(Item(source=source, label=0)).extra == {"arousal": 0.5}


# --- folds


def write_folds(folder, truths, *, rename=lambda source: source, landmarks=True, shift=0.5, val="test"):
    """The published folds about the pictures of a release: labels in the project's order, landmarks shifted to be told apart."""
    for split in ("train", "valid", "test"):
        place = folder / split
        place.mkdir(parents=True)
        origin = val if split == "valid" else split
        rows = {rename(s): t for s, t in truths.items() if t.split == origin and ORIGINAL[t.original] in EXPRESSIONS}
        place.joinpath("image_ids.txt").write_text("".join(f"{name}\n" for name in rows))
        labels = {name: EXPRESSIONS.index(ORIGINAL[truth.original]) for name, truth in rows.items()}
        place.joinpath("class_labels.txt").write_text("".join(f"{name},{label}\n" for name, label in labels.items()))
        if landmarks:
            points = {name: (truth.landmarks + shift).T.reshape(-1) for name, truth in rows.items()}
            text = "".join(f"{name},{','.join(map(str, values))}\n" for name, values in points.items())
            place.joinpath("landmarks.txt").write_text(text)
    return folder


def test_folds_give_splits_labels_and_landmarks(npy, pristine, tmp_path):
    truths = pristine["npy"][1]
    items, made = listed(npy, folds=str(write_folds(tmp_path / "folds", truths)), val_fraction=0.25)
    assert len(items) == 42
    for source, item in items.items():
        face = made.read(item)
        assert EXPRESSIONS[item.label] == ORIGINAL[truths[source].original]
        np.testing.assert_allclose(face.landmarks, truths[source].landmarks + 0.5)
        assert face.extra == {"valence": truths[source].valence, "arousal": truths[source].arousal}
    facts = made.provenance()
    assert facts["folds"]["val_is_test"] is True
    assert facts["val"]["cut_from_train"] is True


def test_folds_whose_val_is_test_leave_no_val_where_none_is_cut(npy, pristine, tmp_path):
    made = dataset(npy, folds=str(write_folds(tmp_path / "folds", pristine["npy"][1])), val_fraction=0)
    assert {split: len(items) for split, items in made.splits().items()} == {"train": 28, "test": 14}


def test_a_val_split_of_the_folds_is_used_as_it_is(npy, pristine, tmp_path):
    folds = write_folds(tmp_path / "folds", pristine["npy"][1])
    for name in ("image_ids.txt", "class_labels.txt", "landmarks.txt"):
        lines = (folds / "train" / name).read_text().splitlines(keepends=True)
        (folds / "train" / name).write_text("".join(lines[5:]))
        (folds / "valid" / name).write_text("".join(lines[:5]))
    made = dataset(npy, folds=str(folds))
    assert {split: len(items) for split, items in made.splits().items()} == {"train": 23, "val": 5, "test": 14}
    assert made.provenance()["val"] == {"cut_from_train": False}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folds_without_landmarks_leave_the_shipped_ones(pristine, tmp_path, layout):
    root, truths = pristine[layout]
    items, made = listed(root, folds=str(write_folds(tmp_path / "folds", truths, landmarks=False)))
    assert len(items) == 42
    for source, item in items.items():
        np.testing.assert_allclose(made.read(item).landmarks, truths[source].landmarks, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_that_are_no_files_are_found_by_name_with_the_shipped_landmarks(pristine, tmp_path, layout):
    root, truths = pristine[layout]
    folds = write_folds(tmp_path / "folds", truths, rename=lambda s: f"our_aligned/{s.split('/')[0]}/{s.rpartition('/')[2][:-4]}.png")
    items, made = listed(root, folds=str(folds))
    assert len(items) == 42
    for source, item in items.items():
        assert EXPRESSIONS[item.label] == ORIGINAL[truths[source].original]
        np.testing.assert_allclose(made.read(item).landmarks, truths[source].landmarks, atol=1e-4)
    assert "with their own landmarks" in made.provenance()["notes"][0]
    assert sum(made.provenance()["folds"]["pictures_found_by_name"].values()) == 42


def test_pictures_that_only_the_folds_know_need_no_release(pristine, tmp_path):
    source, truths = pristine["npy"]
    root = tmp_path / "raw"
    shutil.copytree(source / "train_set" / "images", root / "our_aligned" / "train_set" / "images")
    shutil.copytree(source / "val_set" / "images", root / "our_aligned" / "val_set" / "images")
    folds = write_folds(tmp_path / "folds", truths, rename=lambda s: f"our_aligned/{s}", shift=1.0)
    items, made = listed(root, folds=str(folds))
    assert len(items) == 42
    for name, item in items.items():
        face = made.read(item)
        np.testing.assert_allclose(face.landmarks, truths[name.removeprefix("our_aligned/")].landmarks + 1)
        assert face.extra == {}


def test_pictures_of_the_folds_without_any_landmarks_are_refused(pristine, tmp_path):
    source, truths = pristine["npy"]
    root = tmp_path / "raw"
    shutil.copytree(source, root / "our_aligned")
    folds = str(write_folds(tmp_path / "folds", truths, rename=lambda s: f"our_aligned/{s}", landmarks=False))
    with pytest.raises(ValueError, match=r"no landmarks.txt.*--landmarks face-alignment, dlib or none"):
        dataset(root, folds=folds).splits()
    items, made = listed(root, folds=folds, landmarks="none")
    assert made.read(items[min(items)]).landmarks is None


def test_whole_pictures_with_landmarks_of_the_folds_are_not_cropped(csv_root, pristine, tmp_path):
    truths = pristine["csv"][1]
    folds = str(write_folds(tmp_path / "folds", truths))
    edit_rows(csv_root, lambda lines: [line for i, line in enumerate(lines) if i % 2 == 0])  # the folds know more than the list
    items, made = listed(csv_root, folds=folds)
    assert len(items) == 42
    for source, item in items.items():
        face = made.read(item)
        assert face.image.shape == np.asarray(Image.open(csv_root / source)).shape
        np.testing.assert_allclose(face.landmarks, truths[source].landmarks + 0.5)
        assert face.extra in ({}, {"valence": truths[source].valence, "arousal": truths[source].arousal})
    assert len({bool(made.read(item).extra) for item in items.values()}) == 2


def test_a_picture_that_no_line_is_about_is_bad(csv_root):
    message = bad(dataset(csv_root), "Manually_Annotated_Images/1/none.jpg")
    assert message == "no line of training.csv or validation.csv is about it"


def test_an_id_of_the_folds_without_a_picture_is_reported(npy, pristine, tmp_path):
    folds = write_folds(tmp_path / "folds", pristine["npy"][1])
    (npy / "train_set" / "images" / f"{an_id(npy)}.jpg").unlink()
    items, made = listed(npy, folds=str(folds))
    assert len(items) == 41
    assert [line.reason for line in made.rejected()] == ["no such file, and the release has none of that name"]


def test_a_malformed_landmark_row_of_the_folds_makes_a_bad_picture(npy, pristine, tmp_path):
    folds = write_folds(tmp_path / "folds", pristine["npy"][1])
    path = folds / "train" / "landmarks.txt"
    first, _, rest = path.read_text().partition("\n")
    name, _, *cells = first.split(",")
    path.write_text("\n".join([",".join([name, "inf", *cells]), rest]))
    assert "only some coordinates are finite" in bad(dataset(npy, folds=str(folds)), name)


def test_folds_do_not_go_with_eight_classes(npy, pristine, tmp_path):
    folds = write_folds(tmp_path / "folds", pristine["npy"][1])
    with pytest.raises(ValueError, match="use dataset 'affectnet'"):
        dataset(npy, AffectNet8, folds=str(folds)).splits()


# --- from the download to shards


def samples(out):
    """(source, label, picture, landmarks) of every sample, read at the offsets of the index."""
    index = load_index(out)
    for split, group in index.splits.items():
        for shard in group.shards:
            data = (out / shard.name).read_bytes()
            for member in shard.members:
                note = json.loads(data[member.json_offset : member.json_offset + member.json_bytes])
                jpg = data[member.jpg_offset : member.jpg_offset + member.jpg_bytes]
                yield split, note["source"], member.label, np.asarray(Image.open(io.BytesIO(jpg))), note


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_download_becomes_verified_shards_with_landmarks_to_a_pixel(pristine, tmp_path, layout):
    root, truths = pristine[layout]
    out = tmp_path / "out"
    index = prepare("affectnet", name="affectnet", options={"size": 128}, raw=root, out=out, workers=1, allow_partial=True)
    assert verify(out, deep=True) == []
    assert {split: group.samples for split, group in index.splits.items()} == {"train": 21, "val": 7, "test": 14}
    assert index.classes == EXPRESSIONS
    assert index.provenance["original_labels"]["2"] == "sadness"
    assert index.provenance["distribution"] == layout
    assert index.provenance["partial"]["test"]["fear"] == [2, 500]
    assert index.provenance["samples_without_landmarks"] == {"train": 0, "val": 0, "test": 0}
    assert index.bad_pictures == ()
    count = 0
    for split, source, label, picture, note in samples(out):
        truth = truths[source]
        assert (split == "test") == (truth.split == "test")
        assert index.classes[label] == ORIGINAL[truth.original]
        assert picture.shape == (128, 128, 3)
        np.testing.assert_allclose(note["landmarks"], 2 * truth.landmarks + 0.5, atol=2e-3)
        assert note["extra"]["valence"] == truth.valence
        count += 1
    assert count == 42


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_workers_change_no_byte(pristine, tmp_path, layout, monkeypatch):
    monkeypatch.setattr("bench.prepare.pack.SHARD_ITEMS", 8)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare("affectnet", name="a", options={"size": 32}, raw=pristine[layout][0], out=out, workers=workers, allow_partial=True)
    single, double = ({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()} for workers in (1, 2))
    assert len(single) == 3 + 1 + 2 + 2
    assert single == double


def test_the_published_numbers_are_demanded_unless_partial_is_allowed(pristine, tmp_path):
    with pytest.raises(ValueError, match=r"train: neutral 4 of 74874 \(-74870\).*happiness 4 of 134415.*--allow-partial"):
        prepare("affectnet", name="affectnet", options={}, raw=pristine["npy"][0], out=tmp_path / "out", workers=1)


def test_every_bad_line_and_picture_ends_up_in_the_index(csv_root, tmp_path):
    items, _ = listed(csv_root)
    test = {f"Manually_Annotated_Images/{line.split(',')[0]}" for line in (csv_root / "validation.csv").read_text().splitlines()}
    cut = min(items.keys() - test)
    (csv_root / cut).write_bytes((csv_root / cut).read_bytes()[:300])
    edit_rows(csv_root, lambda lines: [*lines, "../x.jpg,1,1,1,1,1,1,0,0", "hello"])
    index = prepare("affectnet8", name="a8", options={"size": 64}, raw=csv_root, out=tmp_path / "out", workers=1, allow_partial=True)
    reasons = {picture.source: picture.reason for picture in index.bad_pictures}
    assert reasons["training.csv: line 40"] == "'../x.jpg': a path with '..'; only paths inside the download are read"
    assert reasons["training.csv: line 41"] == "1 cells, 9 are needed; a path with a comma must be in quotes"
    assert "damaged" in reasons[cut]
    assert len(reasons) == 3
    assert index.classes[7] == "contempt"
    assert verify(tmp_path / "out", deep=True) == []


# --- size


@pytest.mark.parametrize("release", [NpyRelease, CsvRelease])
def test_listing_keeps_little_of_a_picture_beside_its_name(tmp_path, release):
    # A row of the CSV files has 1200 bytes, the four annotations of a picture have more: neither may be kept.
    layout = "npy" if release is NpyRelease else "csv"
    make_affectnet(tmp_path, layout, {"train": {1: 1500}, "test": {1: 1}}, size=16, pool=1)
    list(release(tmp_path).pictures("test", keep=(1,), reject=pytest.fail, notes=[]))  # what is imported at first is not counted
    tracemalloc.start()
    try:
        count = sum(1 for _ in release(tmp_path).pictures("train", keep=(1,), reject=pytest.fail, notes=[]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1500
    assert peak / count < 700


def test_a_worker_keeps_numbers_of_a_row_not_its_text(csv_root):
    table = Table(csv_root, "training.csv")
    table.find("1/nothing.jpg")
    assert table._index is not None
    assert sum(part.nbytes for part in table._index) == 24 * 39
