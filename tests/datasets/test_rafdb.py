from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.config import load_settings
from bench.data.index import load_index
from bench.data.verify import verify
from bench.dataset import DATASETS, EXPRESSIONS, BadPictureError, Item
from bench.datasets.rafdb import RAFDB
from bench.matrix import DatasetRef, build_matrix
from bench.prepare.alignment import TEMPLATE, carry_over, similarity_from_points, template_points
from bench.prepare.pack import prepare
from bench.prepare.splits import hash_sources
from bench.registry import OptionError, check_options

from .rafdb_tree import EXPRESSIONS as ORIGINAL
from .rafdb_tree import FULL, SMALL, fold_id, make_rafdb, write_folds

LIST = "basic/EmoLabel/list_patition_label.txt"
PICTURES = "basic/Image/original"
MANUAL = "basic/Annotation/manual"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A tree that no test changes: (raw, what was drawn, folds, their landmarks)."""
    place = tmp_path_factory.mktemp("rafdb")
    tree = make_rafdb(place / "raw")
    landmarks = write_folds(place / "folds", place / "raw", tree, not_found={"train_00002.jpg"})
    return place / "raw", tree, place / "folds", landmarks


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """21 pictures: (raw, what was drawn)."""
    raw = tmp_path_factory.mktemp("small") / "raw"
    return raw, make_rafdb(raw, counts={"train": (2,) * 7, "test": (1,) * 7})


@pytest.fixture
def raw(small, tmp_path):
    """A tree of its own for every test."""
    return shutil.copytree(small[0], tmp_path / "raw")


def rafdb(raw, **options):
    checked = check_options(DATASETS, "rafdb", options)
    assert isinstance(checked, RAFDB.Options)
    return RAFDB(checked, raw=raw)


def listed(dataset):
    return {item.source: item for items in dataset.splits().values() for item in items}


def rejected(dataset):
    dataset.splits()
    return {line.source: line.reason for line in dataset.rejected()}


def append(raw, *lines):
    path = raw / LIST
    path.write_bytes(path.read_bytes() + b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines))


def copy_picture(raw, name, *, like="train_00001"):
    """The files of a further picture."""
    stem = name.rpartition(".")[0]
    (raw / PICTURES / name).write_bytes((raw / PICTURES / f"{like}.jpg").read_bytes())
    (raw / MANUAL / f"{stem}_manu_attri.txt").write_bytes((raw / MANUAL / f"{like}_manu_attri.txt").read_bytes())


def annotate(raw, points, *, name="train_00001", rest=("0", "0", "0")):
    lines = [f"{x}\t{y}" for x, y in points]
    (raw / MANUAL / f"{name}_manu_attri.txt").write_text("\n".join([*lines, *rest]) + "\n")


FIRST = Item(source=f"{PICTURES}/train_00001.jpg", label=0)


# what it is


def test_it_is_registered_with_source_licence_and_the_published_weight_of_guidance():
    info = DATASETS.get("rafdb").info
    assert DATASETS.get("rafdb").target is RAFDB
    assert info.title == "RAF-DB"
    assert "CVPR 2017" in info.paper
    assert "research only" in info.license
    assert [(d.key, d.value, d.dataset) for d in info.defaults] == [("guidance.weight", 4.0, "rafdb")]


def test_a_run_on_rafdb_takes_that_weight_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = {"train": 4096, "val": 10, "test": 10}
    refs = {name: DatasetRef(name=name, entry=name, fingerprint="f", samples=samples) for name in ("rafdb", "folder")}

    def weights(**flags):
        flags = {"run.methods": ["cam"], "run.guidance": ["au"], "run.datasets": ["rafdb", "folder"], **flags}
        cells = build_matrix(load_settings(environ={}, flags=flags), refs).cells
        return {cell.training.dataset.name: cell.training.settings["guidance"]["weight"] for cell in cells}

    assert weights()["rafdb"] == 4.0
    assert weights()["folder"] != 4.0
    assert weights(**{"guidance.weight": 2.5}) == {"rafdb": 2.5, "folder": 2.5}


def test_the_published_numbers_add_up():
    expected = rafdb(Path()).expected()
    assert {split: sum(counts.values()) for split, counts in expected.items()} == {"train": 12271, "test": 3068}
    assert expected["train"]["happiness"] == 4772
    assert expected["test"]["neutral"] == 680


# the list


def test_original_labels_become_the_projects_classes(shared):
    raw, tree, _, _ = shared
    dataset = rafdb(raw)
    items = listed(dataset)
    assert len(items) == len(tree)
    for name, original in tree.items():
        assert dataset.classes[items[f"{PICTURES}/{name}"].label] == ORIGINAL[original.label - 1]
    assert dataset.provenance()["original_labels"] == {str(i): name for i, name in enumerate(ORIGINAL, start=1)}
    assert not dataset.rejected()


def test_train_and_test_follow_the_names_and_val_is_cut_from_train(shared):
    splits = rafdb(shared[0]).splits()
    assert list(splits) == ["train", "val", "test"]
    assert len(splits["train"]) + len(splits["val"]) == sum(SMALL["train"])
    assert all("/test_" in item.source for item in splits["test"])
    assert len(splits["test"]) == sum(SMALL["test"])


def test_no_val_is_cut_with_fraction_0(shared):
    assert list(rafdb(shared[0], val_fraction=0).splits()) == ["train", "test"]


def val_of(raw, **options):
    dataset = rafdb(raw, landmarks="none", **options)
    names = {item.source.rpartition("/")[2].replace("_aligned", "") for item in dataset.splits()["val"]}
    return names, dataset.provenance()["val"]["sources_sha256"]


def test_val_is_the_same_whatever_is_read(shared):
    raw, _, folds, _ = shared
    wanted, digest = val_of(raw)
    assert digest == hash_sources([Item(source=name, label=0) for name in wanted])
    assert val_of(raw, source="aligned") == (wanted, digest)
    assert val_of(raw / "basic") == (wanted, digest)
    assert val_of(raw, folds=str(folds)) == (wanted, digest)


def test_the_full_list_is_accepted_without_opening_a_picture(tmp_path, monkeypatch):
    labels = {
        f"{split}_{number:05d}": label
        for split, counts in FULL.items()
        for number, label in enumerate(np.repeat(np.arange(1, 8), counts).tolist(), start=1)
    }
    (tmp_path / LIST).parent.mkdir(parents=True)
    (tmp_path / LIST).write_text("".join(f"{stem}.jpg {label}\n" for stem, label in labels.items()))
    # Folders that list the files, none of which is there to be opened: making 30,678 takes its time.
    files = {PICTURES: frozenset(f"{stem}.jpg" for stem in labels), MANUAL: frozenset(f"{stem}_manu_attri.txt" for stem in labels)}
    monkeypatch.setattr("bench.datasets.rafdb._files", lambda folder: files[folder.relative_to(tmp_path).as_posix()])
    dataset = rafdb(tmp_path)
    splits = dataset.splits()
    counts = {"train": Counter(), "test": Counter()}
    for split, items in splits.items():
        counts["test" if split == "test" else "train"].update(dataset.classes[item.label] for item in items)
    assert counts == dataset.expected()


@pytest.mark.parametrize(
    ("line", "source", "reason"),
    [
        ("train_00001.jpg", "EmoLabel/list_patition_label.txt: line 22", "is not NAME LABEL"),
        ("train_00001.jpg five", "EmoLabel/list_patition_label.txt: line 22", "is not NAME LABEL"),
        ("train_00001.jpg 5.5", "EmoLabel/list_patition_label.txt: line 22", "is not NAME LABEL"),
        ("train_00001.jpg 5 0", "EmoLabel/list_patition_label.txt: line 22", "has more than two columns"),
        ("train_00001.jpg -1", "EmoLabel/list_patition_label.txt: line 22", "is not NAME LABEL"),
        ("5", "EmoLabel/list_patition_label.txt: line 22", "is not NAME LABEL"),
        (b"train_\xff.jpg 5\n", "EmoLabel/list_patition_label.txt: line 22", "not UTF-8"),
        ("train_99999.jpg 0", "train_99999.jpg", "label 0 in line 22; labels are 1 to 7"),
        ("train_99999.jpg 8", "train_99999.jpg", "label 8"),
        ("valid_00001.jpg 5", "valid_00001.jpg", "neither train_"),
        ("train.jpg 5", "train.jpg", "neither train_"),
        ("/etc/train_1.jpg 5", "/etc/train_1.jpg", "absolute path"),
        ("C:\\train_1.jpg 5", "C:\\train_1.jpg", "absolute path"),
        ("../train_1.jpg 5", "../train_1.jpg", r"path with '\.\.'"),
        ("train_/../../x.jpg 5", "train_/../../x.jpg", r"path with '\.\.'"),
        ("train_a/b.jpg 5", "train_a/b.jpg", "lie directly in Image/original"),
        ("train_99999.jpg 5", f"{PICTURES}/train_99999.jpg", "no such file in Image/original"),
    ],
)
def test_a_line_that_cannot_be_used_is_reported_and_the_others_stay(raw, line, source, reason):
    append(raw, line)
    dataset = rafdb(raw)
    (rejection,) = rejected(dataset).items()
    assert rejection[0] == source
    assert re.search(reason, rejection[1])
    assert len(listed(dataset)) == 21


def test_a_picture_listed_again_counts_once(raw):
    first = (raw / LIST).read_text().splitlines()[0]
    append(raw, first)
    dataset = rafdb(raw)
    assert rejected(dataset) == {first.split()[0]: "listed again in line 22"}
    assert len(listed(dataset)) == 21


@pytest.mark.parametrize("second_label", [1, 9])
def test_a_picture_listed_with_different_labels_is_not_used_at_all(raw, second_label):
    name, label = (raw / LIST).read_text().splitlines()[0].split()
    second_label = second_label if str(second_label) != label else 2
    append(raw, f"{name} {second_label}")
    dataset = rafdb(raw)
    assert name not in " ".join(listed(dataset))
    lines = [line for line in dataset.rejected() if line.source == name]
    assert len(lines) == 2
    assert {line.split for line in lines} == {"train"}
    assert all(line.reason == f"listed with different labels: {', '.join(sorted([label, str(second_label)]))}" for line in lines)


@pytest.mark.parametrize("name", ["train_a b.jpg", "train_a,b.jpg", "train_1.2.3.jpg", "train_Zoë Müller 幸.jpg", "train_ 5.jpg"])
def test_names_with_blanks_commas_dots_and_other_letters_work(raw, name):
    copy_picture(raw, name)
    append(raw, f"{name} 3")
    dataset = rafdb(raw)
    item = listed(dataset)[f"{PICTURES}/{name}"]
    assert dataset.classes[item.label] == "disgust"
    assert dataset.read(item).image.shape == (256, 256, 3)
    assert not dataset.rejected()


@pytest.mark.parametrize(
    "change",
    [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n"), lambda b: b.replace(b" ", b"\t")],
    ids=["bom", "crlf", "tab"],
)
def test_byte_order_mark_line_ends_and_tabs_do_not_matter(raw, change):
    before = listed(rafdb(raw))
    (raw / LIST).write_bytes(change((raw / LIST).read_bytes()))
    assert listed(rafdb(raw)) == before


def test_the_list_is_hashed(raw):
    dataset = rafdb(raw)
    dataset.splits()
    assert dataset.provenance()["annotation_sha256"] == hashlib.sha256((raw / LIST).read_bytes()).hexdigest()


def test_pictures_that_are_not_listed_are_noted(raw):
    copy_picture(raw, "train_77777.jpg")
    dataset = rafdb(raw)
    dataset.splits()
    assert dataset.provenance()["notes"] == ["Image/original: 1 files are not listed and are left out, first: train_77777.jpg"]


def test_a_missing_annotation_is_reported_before_anything_is_read(raw):
    (raw / MANUAL / "train_00003_manu_attri.txt").unlink()
    reasons = rejected(rafdb(raw))
    assert reasons == {f"{PICTURES}/train_00003.jpg": "no five points: Annotation/manual/train_00003_manu_attri.txt is missing"}


# reading


def test_the_five_points_land_on_the_template(raw):
    # Nothing but the points of a face of the template's shape, 1.7 times as large as in the result and turned by 20 degrees.
    angle = np.deg2rad(20)
    turn = 1.7 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = template_points(256) @ turn.T + [260, 90]
    y, x = np.mgrid[:640, :700]
    image = sum(255 * np.clip(8.5 - np.hypot(x - px, y - py), 0, 1) for px, py in points)
    Image.fromarray(image.round().astype(np.uint8)).save(raw / FIRST.source, quality=98)
    annotate(raw, points)
    grey = rafdb(raw).read(FIRST).image[..., 0].astype(float)
    grey[grey < 20] = 0  # what JPEG leaves on black
    for px, py in template_points(256):
        window = (slice(round(py) - 12, round(py) + 13), slice(round(px) - 12, round(px) + 13))
        y, x = np.mgrid[window]
        mass = grey[window]
        assert abs((x * mass).sum() / mass.sum() - px) < 0.1
        assert abs((y * mass).sum() / mass.sum() - py) < 0.1


def test_drawn_faces_are_aligned_by_their_annotation(shared):
    raw, tree, _, _ = shared
    face = rafdb(raw, size=112).read(FIRST)
    assert face.image.shape == (112, 112, 3)
    assert face.landmarks is None
    matrix = similarity_from_points(tree["train_00001.jpg"].points, TEMPLATE)
    # What lies at an eye of the original lies at that eye of the result.
    original = np.asarray(Image.open(raw / FIRST.source)).astype(float)
    for point in tree["train_00001.jpg"].points[:2]:
        x, y = point.round().astype(int)
        u, v = carry_over(np.array([[x, y]]), matrix)[0].round().astype(int)
        before, after = original[y - 2 : y + 3, x - 2 : x + 3], face.image[v - 2 : v + 3, u - 2 : u + 3]
        assert np.abs(before.mean(axis=(0, 1)) - after.mean(axis=(0, 1))).max() < 30


def test_the_box_of_an_aligned_face_holds_its_landmarks(shared):
    raw, tree, _, _ = shared
    dataset = rafdb(raw)
    overlaps = []
    for name in list(tree)[:10]:
        box = dataset.read(Item(source=f"{PICTURES}/{name}", label=0)).box
        matrix = similarity_from_points(tree[name].points, template_points(256))
        points = carry_over(tree[name].landmarks, matrix)
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        inter = max(0, min(x1, box.right) - max(x0, box.left)) * max(0, min(y1, box.bottom) - max(y0, box.top))
        union = (x1 - x0) * (y1 - y0) + (box.right - box.left) * (box.bottom - box.top) - inter
        overlaps.append(inter / union)
    assert np.median(overlaps) > 0.75


def test_the_shipped_alignment_comes_as_it_is(shared):
    raw = shared[0]
    dataset = rafdb(raw, source="aligned")
    item = listed(dataset)["basic/Image/aligned/train_00001_aligned.jpg"]
    face = dataset.read(item)
    np.testing.assert_array_equal(face.image, np.asarray(Image.open(raw / item.source)))
    assert tuple(face.box) == (-0.5, -0.5, 99.5, 99.5)
    assert dataset.provenance()["alignment"] is None


def test_gender_race_and_age_are_kept_in_words(raw, small):
    points = small[1]["train_00001.jpg"].points
    annotate(raw, points, rest=("2", "1", "4"))
    assert rafdb(raw).read(FIRST).extra == {"gender": "unsure", "race": "African-American", "age": "70+"}
    annotate(raw, points, rest=("0", "9", "x"))
    assert rafdb(raw).read(FIRST).extra == {"gender": "male"}
    annotate(raw, points, rest=())
    assert rafdb(raw).read(FIRST).extra == {}


def test_attributes_are_kept_for_shipped_alignments_too(shared):
    raw, tree, _, _ = shared
    for source, file in (("original", FIRST.source), ("aligned", "basic/Image/aligned/train_00001_aligned.jpg")):
        extra = rafdb(raw, source=source).read(Item(source=file, label=0)).extra
        gender, race, age = tree["train_00001.jpg"].attributes
        assert extra == {
            "gender": ("male", "female", "unsure")[gender],
            "race": ("Caucasian", "African-American", "Asian")[race],
            "age": ("0-3", "4-19", "20-39", "40-69", "70+")[age],
        }


@pytest.mark.parametrize("orientation", range(2, 9))
def test_points_are_in_stored_pixels_whatever_the_exif_orientation(raw, orientation):
    plain = rafdb(raw).read(FIRST).image
    path = raw / FIRST.source
    stored = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=98)
    turned = rafdb(raw).read(FIRST).image
    # The pixels and the points are the same, so a rotation makes no difference; a mirrored face stays a mirrored one.
    if orientation in (3, 6, 8):
        assert np.abs(turned.astype(int) - plain).mean() < 2
    else:
        assert np.abs(turned.astype(int) - plain).mean() > 5


def as_bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda image: as_bytes(image, "PNG"),
        lambda image: as_bytes(image, "BMP"),
        lambda image: as_bytes(image.convert("CMYK"), "JPEG", quality=98),
        lambda image: as_bytes(image.convert("L"), "JPEG", quality=98),
        lambda image: as_bytes(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8), "PNG"),
    ],
    ids=["png", "bmp", "cmyk", "grey", "16-bit"],
)
def test_pictures_of_another_kind_than_their_suffix_are_read(raw, change):
    plain = rafdb(raw).read(FIRST).image.astype(int)
    path = raw / FIRST.source
    path.write_bytes(change(Image.open(path).convert("RGB")))
    changed = rafdb(raw).read(FIRST).image.astype(int)
    assert changed.shape == plain.shape
    assert np.abs(changed.mean(axis=2) - plain.mean(axis=2)).mean() < 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: b"<html>not here</html>", "not a picture"),
    ],
)
@pytest.mark.parametrize("source", ["original", "aligned"])
def test_unreadable_pictures_are_bad_pictures(raw, change, words, source):
    file = {"original": FIRST.source, "aligned": "basic/Image/aligned/train_00001_aligned.jpg"}[source]
    (raw / file).write_bytes(change((raw / file).read_bytes()))
    with pytest.raises(BadPictureError, match=words):
        rafdb(raw, source=source).read(Item(source=file, label=0))


GOOD = "60 60\n90 60\n75 75\n62 90\n88 90\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has 0 lines; the first five must be points"),
        ("60 60\n90 60\n", "has 2 lines"),
        ("60 60\n90 60\n75\n62 90\n88 90\n0\n0\n0\n", "line 3 .*is not a point x y: '75'"),
        ("60 60\n90 60\n75 75 1\n62 90\n88 90\n", "line 3"),
        ("60 60\nninety 60\n75 75\n62 90\n88 90\n", "line 2 .*'ninety 60'"),
        ("60 60\n90 nan\n75 75\n62 90\n88 90\n", "line 2"),
        ("60 60\n90 60\n75 75\n62 inf\n88 90\n", "line 4"),
        ("60 60\n90 60\n75 75\n62 90\n880 90\n", r"\(880\.0, 90\.0\), lies outside"),
        ("60 60\n90 -40\n75 75\n62 90\n88 90\n", "lies outside"),
        ("60 60\n" * 5, "cannot be aligned by its five points"),
    ],
)
def test_without_five_usable_points_an_original_is_a_bad_picture(raw, text, words):
    (raw / MANUAL / "train_00001_manu_attri.txt").write_text(text)
    with pytest.raises(BadPictureError, match=words):
        rafdb(raw).read(FIRST)


def test_bytes_that_are_no_text_are_a_bad_annotation(raw):
    (raw / MANUAL / "train_00001_manu_attri.txt").write_bytes(b"\xff\xfe\x00\x01 5\n" * 5)
    with pytest.raises(BadPictureError, match="is not a point"):
        rafdb(raw).read(FIRST)


@pytest.mark.parametrize("text", [GOOD, GOOD.replace(" ", "\t"), GOOD.replace("\n", " \r\n"), "\ufeff" + GOOD])
def test_points_are_separated_by_tabs_or_blanks(raw, text):
    path = raw / MANUAL / "train_00001_manu_attri.txt"
    path.write_text(GOOD)
    wanted = rafdb(raw).read(FIRST).image
    path.write_bytes(text.encode())
    np.testing.assert_array_equal(rafdb(raw).read(FIRST).image, wanted)


def test_a_point_just_beyond_the_border_is_no_mistake(raw):
    height = Image.open(raw / FIRST.source).height
    annotate(raw, [(60, 60), (90, 60), (75, 75), (62, height + 2), (88, height + 2)])
    assert rafdb(raw).read(FIRST).image.any()


# options


def test_landmarks_are_found_by_the_network_unless_the_folds_bring_them(shared):
    raw, _, folds, _ = shared
    assert rafdb(raw).options.landmarks == "face-alignment"
    assert rafdb(raw, folds=str(folds)).options.landmarks == "shipped"
    assert rafdb(raw, folds=str(folds), landmarks="dlib").options.landmarks == "dlib"


def test_landmarks_that_are_not_shipped_are_refused_with_what_to_do():
    with pytest.raises(OptionError, match=r"RAF-DB ships 5 and 37 points, not the 68.*face-alignment, dlib or none; or --folds DIR"):
        check_options(DATASETS, "rafdb", {"landmarks": "shipped"})


def test_another_source_is_refused_with_the_choices():
    with pytest.raises(OptionError, match="'original' or 'aligned'"):
        check_options(DATASETS, "rafdb", {"source": "cropped"})


# layout


def refused(raw, *words, **options):
    with pytest.raises(FileNotFoundError) as error:
        rafdb(raw, **options).splits()
    for word in words:
        assert str(word) in str(error.value)


def test_the_raw_folder_may_be_basic_itself(shared):
    raw, tree, _, _ = shared
    dataset = rafdb(raw / "basic")
    items = listed(dataset)
    assert set(items) == {f"Image/original/{name}" for name in tree}
    np.testing.assert_array_equal(dataset.read(items["Image/original/train_00001.jpg"]).image, rafdb(raw).read(FIRST).image)


def test_a_folder_that_is_something_else_is_refused_with_the_layout(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    refused(tmp_path, "no basic/", "holiday.jpg", LIST, f"{PICTURES}/*.jpg", f"{MANUAL}/*_manu_attri.txt")
    refused(tmp_path / "nowhere", "no such folder")


def test_a_folder_too_high_is_told_the_right_one(shared, tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/RAF-DB").symlink_to(shared[0])
    refused(tmp_path / "downloads", f"Say --raw {tmp_path / 'downloads/RAF-DB'}")


def zip_of(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")


def test_what_is_still_in_its_zip_file_is_named_with_the_command(raw):
    manual = raw / MANUAL
    manual.rename(raw.parent / "manual")
    zip_of(manual.with_suffix(".zip"), ["train_00001_manu_attri.txt"])
    refused(raw, f"{manual} is missing", f"unzip {manual}.zip -d {manual}")
    zip_of(manual.with_suffix(".zip"), ["manual/train_00001_manu_attri.txt"])
    refused(raw, f"unzip {manual}.zip -d {manual.parent}")
    assert not manual.exists()


def test_a_zip_file_of_everything_is_named_too(tmp_path):
    zip_of(tmp_path / "basic.zip", ["basic/EmoLabel/list_patition_label.txt"])
    refused(tmp_path, f"unzip {tmp_path / 'basic.zip'} -d {tmp_path}")


def test_pictures_one_level_deeper_are_to_be_moved(raw):
    place = raw / PICTURES
    place.rename(raw / "basic/Image/o")
    place.mkdir()
    (raw / "basic/Image/o").rename(place / "original")
    refused(raw, "has none of the 21 files that are listed", f"mv {place / 'original'}/* {place}/")


def test_a_missing_list_or_folder_is_named(raw):
    (raw / PICTURES).rename(raw / "elsewhere")
    (raw / "basic/Image/aligned").rename(raw / "elsewhere too")
    refused(raw, f"{raw / PICTURES} is missing")
    refused(raw, f"{raw / 'basic/Image/aligned'} is missing", source="aligned")
    (raw / LIST).unlink()
    refused(raw, f"{raw / LIST} is missing")


def test_shipped_alignments_need_no_annotation(raw):
    for path in (raw / MANUAL).iterdir():
        path.unlink()
    dataset = rafdb(raw, source="aligned", val_fraction=0)
    items = listed(dataset)
    assert len(items) == 21
    assert "21 of 21 pictures have no annotation" in dataset.provenance()["notes"][0]
    assert dataset.read(next(iter(items.values()))).extra == {}


def test_a_split_without_a_usable_picture_is_refused_with_the_first_reason(raw):
    for path in (raw / PICTURES).glob("test_*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"split 'test' can be used; the first of 7 .*no such file"):
        rafdb(raw).splits()


# folds


def test_folds_give_splits_classes_and_landmarks(shared):
    raw, tree, folds, landmarks = shared
    dataset = rafdb(raw, folds=str(folds))
    items = listed(dataset)
    assert set(items) == {fold_id(name) for name in tree}
    for name, original in tree.items():
        assert EXPRESSIONS[items[fold_id(name)].label] == ORIGINAL[original.label - 1]
    face = dataset.read(items[fold_id("train_00001.jpg")])
    np.testing.assert_array_equal(face.image, np.asarray(Image.open(raw / fold_id("train_00001.jpg"))))
    np.testing.assert_allclose(face.landmarks, landmarks["train_00001.jpg"], atol=1e-3)
    assert set(face.extra) == {"gender", "race", "age"}
    assert dataset.read(items[fold_id("train_00002.jpg")]).landmarks is None
    facts = dataset.provenance()
    assert facts["folds"]["val_is_test"]
    assert facts["folds"]["pictures_found"]
    assert facts["source"] == "folds"
    assert facts["alignment"] is None


def test_folds_work_with_basic_as_the_raw_folder(shared):
    raw, tree, folds, landmarks = shared
    dataset = rafdb(raw / "basic", folds=str(folds))
    items = listed(dataset)
    assert set(items) == {f"Image/our_aligned/{name}" for name in tree}
    face = dataset.read(items["Image/our_aligned/train_00001.jpg"])
    np.testing.assert_allclose(face.landmarks, landmarks["train_00001.jpg"], atol=1e-3)


def test_a_val_that_is_the_test_split_is_cut_anew(shared):
    raw, _, folds, _ = shared
    splits = rafdb(raw, folds=str(folds)).splits()
    assert all("/train_" in item.source for item in splits["val"])
    assert list(rafdb(raw, folds=str(folds), val_fraction=0).splits()) == ["train", "test"]


def test_a_val_of_its_own_is_taken_as_it_is(shared, tmp_path):
    raw, tree, _, _ = shared
    val = {"train_00003.jpg", "train_00007.jpg"}
    write_folds(tmp_path, raw, tree, val=val, pictures=False)
    dataset = rafdb(raw, folds=str(tmp_path))
    splits = dataset.splits()
    assert {item.source for item in splits["val"]} == {fold_id(name) for name in val}
    assert len(splits["train"]) == sum(SMALL["train"]) - 2
    assert not dataset.provenance()["val"]["cut_from_train"]


def test_without_their_pictures_folds_give_splits_and_classes(raw, small, tmp_path):
    tree = small[1]
    write_folds(tmp_path / "folds", raw, tree, pictures=False)
    for source, ending in (("original", ""), ("aligned", "_aligned")):
        dataset = rafdb(raw, folds=str(tmp_path / "folds"), landmarks="none", source=source)
        items = listed(dataset)
        for name, original in tree.items():
            stem = name.removesuffix(".jpg")
            assert EXPRESSIONS[items[f"basic/Image/{source}/{stem}{ending}.jpg"].label] == ORIGINAL[original.label - 1]
        assert not dataset.provenance()["folds"]["pictures_found"]
        assert "our_aligned/test_0001.jpg, are not here" in dataset.provenance()["notes"][0]
        face = dataset.read(next(iter(items.values())))
        assert face.image.shape == ((256, 256, 3) if source == "original" else (100, 100, 3))
    plain = rafdb(raw, landmarks="none").splits()
    with_folds = rafdb(raw, folds=str(tmp_path / "folds"), landmarks="none").splits()
    assert plain == with_folds


def test_an_ending_of_the_folds_ids_is_no_part_of_the_name(raw, small, tmp_path):
    tree = small[1]
    write_folds(tmp_path / "folds", raw, tree, pictures=False)
    for path in (tmp_path / "folds").rglob("*.txt"):
        path.write_text(path.read_text().replace(".jpg", "_aligned.png"))
    assert set(listed(rafdb(raw, folds=str(tmp_path / "folds"), landmarks="none"))) == {f"{PICTURES}/{name}" for name in tree}


def test_landmarks_of_folds_without_their_pictures_are_refused(raw, small, tmp_path):
    tree = small[1]
    write_folds(tmp_path / "folds", raw, tree, pictures=False)
    with pytest.raises(ValueError, match=r"in pixels of pictures that are not here.*our_aligned.*--landmarks face-alignment, dlib or none"):
        rafdb(raw, folds=str(tmp_path / "folds")).splits()


def test_folds_without_landmarks_are_refused_where_landmarks_are_wanted(shared, tmp_path):
    raw, tree, _, _ = shared
    write_folds(tmp_path, raw, tree, pictures=False)
    for path in tmp_path.rglob("landmarks.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no landmarks\.txt.*--landmarks face-alignment"):
        rafdb(raw, folds=str(tmp_path)).splits()
    assert rafdb(raw, folds=str(tmp_path), landmarks="none").splits()["val"]


def test_one_missing_picture_of_the_folds_is_reported(raw, small, tmp_path):
    tree = small[1]
    write_folds(tmp_path / "folds", raw, tree)
    (raw / fold_id("train_00004.jpg")).unlink()
    dataset = rafdb(raw, folds=str(tmp_path / "folds"))
    assert rejected(dataset) == {fold_id("train_00004.jpg"): "no such file below the raw folder"}
    assert len(listed(dataset)) == 20


def edit_row(folds, name, change):
    path = folds / "train/landmarks.txt"
    lines = [change(line) if line.startswith(f"{fold_id(name)},") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(line for line in lines if line) + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.rpartition(",")[0], "has 135 coordinates"),
        (lambda line: line.rpartition(",")[0] + ",inf", "only some coordinates are finite"),
        (
            lambda line: ",".join([line.partition(",")[0], *(f"{900 + i % 9}.0" for i in range(136))]),
            "all landmarks of the folds lie outside of the 224 x 224",
        ),
    ],
)
def test_a_bad_row_of_landmarks_makes_a_bad_picture(shared, tmp_path, change, words):
    raw, tree, _, _ = shared
    write_folds(tmp_path, raw, tree, pictures=False)
    edit_row(tmp_path, "train_00001.jpg", change)
    dataset = rafdb(raw, folds=str(tmp_path))
    with pytest.raises(BadPictureError, match=words):
        dataset.read(listed(dataset)[fold_id("train_00001.jpg")])


def test_pictures_without_a_row_of_landmarks_are_noted(shared, tmp_path):
    raw, tree, _, _ = shared
    write_folds(tmp_path, raw, tree, pictures=False)
    edit_row(tmp_path, "train_00001.jpg", lambda line: "")
    dataset = rafdb(raw, folds=str(tmp_path))
    items = listed(dataset)
    assert dataset.provenance()["notes"] == ["folds: 1 pictures have no row in landmarks.txt, hence no landmarks"]
    assert dataset.read(items[fold_id("train_00001.jpg")]).landmarks is None


# from the download to verified shards


def make(raw, out, **options):
    options = {"landmarks": "none", **options} if "folds" not in options else options
    return prepare("rafdb", name="rafdb", options=options, raw=raw, out=out, workers=1, allow_partial=True)


def notes_of(out):
    """What is stored beside each picture, with its class."""
    index = load_index(out)
    return {
        (note := json.loads(data["json"]))["source"]: {**note, "class": index.classes[int(data["cls"])]}
        for split, group in index.splits.items()
        for data in read_members(out, group)
    }


def read_members(out, group):
    for shard in group.shards:
        content = (out / shard.name).read_bytes()
        for m in shard.members:
            yield {
                "jpg": content[m.jpg_offset : m.jpg_offset + m.jpg_bytes],
                "cls": content[m.cls_offset : m.cls_offset + m.cls_bytes],
                "json": content[m.json_offset : m.json_offset + m.json_bytes],
            }


@pytest.mark.parametrize(("source", "ending"), [("original", ""), ("aligned", "_aligned")])
def test_a_download_becomes_verified_shards(shared, tmp_path, source, ending):
    raw, tree, _, _ = shared
    index = make(raw, tmp_path / "out", source=source)
    assert verify(tmp_path / "out", deep=True) == []
    assert index.classes == EXPRESSIONS
    assert index.provenance["source"] == source
    assert index.provenance["original_labels"]["4"] == "happiness"
    assert (index.provenance["alignment"] is None) == (source == "aligned")
    assert index.provenance["partial"]["test"]["happiness"] == [2, 1185]
    counts = Counter(ORIGINAL[original.label - 1] for name, original in tree.items() if name.startswith("test"))
    assert index.splits["test"].class_counts == counts
    stored = notes_of(tmp_path / "out")
    for name, original in tree.items():
        note = stored[f"basic/Image/{source}/{name.removesuffix('.jpg')}{ending}.jpg"]
        assert note["class"] == ORIGINAL[original.label - 1]
        assert note["landmarks"] is None
        assert set(note["extra"]) == {"gender", "race", "age"}


def test_landmarks_of_the_folds_arrive_in_the_stored_pixels(shared, tmp_path):
    raw, tree, folds, _ = shared
    index = make(raw, tmp_path / "out", folds=str(folds))
    assert verify(tmp_path / "out", deep=True) == []
    assert sum(index.provenance["samples_without_landmarks"].values()) == 1
    stored = notes_of(tmp_path / "out")
    for name, original in tree.items():
        note = stored[fold_id(name)]
        assert note["class"] == ORIGINAL[original.label - 1]
        if name == "train_00002.jpg":
            assert note["landmarks"] is None
            continue
        # From what was drawn: by the five points onto the template, in 256 x 256.
        matrix = similarity_from_points(original.points, template_points(256))
        assert np.abs(np.array(note["landmarks"]) - carry_over(original.landmarks, matrix)).max() < 1


def test_every_bad_picture_is_counted_and_the_rest_is_kept(raw, tmp_path):
    (raw / PICTURES / "train_00001.jpg").write_bytes(b"")
    (raw / PICTURES / "train_00002.jpg").write_bytes((raw / PICTURES / "train_00002.jpg").read_bytes()[:300])
    (raw / PICTURES / "train_00003.jpg").unlink()
    (raw / MANUAL / "train_00004_manu_attri.txt").unlink()
    annotate(raw, [(9000, 60), (90, 60), (75, 75), (62, 90), (88, 90)], name="train_00005")
    append(raw, "train_00006.jpg", "../train_00007.jpg 5", "other_1.jpg 3")
    index = make(raw, tmp_path / "out", val_fraction=0)
    assert verify(tmp_path / "out", deep=True) == []
    assert sum(split.samples for split in index.splits.values()) == 21 - 5
    reasons = {bad.source.rpartition("/")[2]: bad.reason for bad in index.bad_pictures}
    assert "empty" in reasons["train_00001.jpg"]
    assert "damaged" in reasons["train_00002.jpg"]
    assert "no such file" in reasons["train_00003.jpg"]
    assert "no five points" in reasons["train_00004.jpg"]
    assert "outside" in reasons["train_00005.jpg"]
    assert "is not NAME LABEL" in reasons["list_patition_label.txt: line 22"]
    assert "'..'" in reasons["train_00007.jpg"]
    assert "neither train_" in reasons["other_1.jpg"]
    assert len(index.bad_pictures) == 8
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["bad_pictures"]) == 8


def test_other_numbers_than_published_are_an_error_before_any_picture_is_read(raw, tmp_path):
    with pytest.raises(ValueError, match=r"train: .*fear 2 of 281 \(-279\).*--allow-partial"):
        prepare("rafdb", name="rafdb", options={"landmarks": "none"}, raw=raw, out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_the_generated_tree_is_the_same_every_time(tmp_path, number):
    counts = {"train": (1,) * 7}
    for name in ("one", "two"):
        make_rafdb(tmp_path / name, counts=counts, seed=number)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 1 + 7 * 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b" ", b","),
        lambda data: data.replace(b" ", b"; "),
        lambda data: data.replace(b" ", b"\t"),
        lambda data: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r"),
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.replace(b"\n", b".0\n") if b"\r" not in data else data.replace(b"\r\n", b".0\r\n"),
    ],
    ids=["commas", "semicolons", "tabs", "CR", "UTF-16", "5.0"],
)
def test_a_list_as_a_spreadsheet_saves_it_is_the_same_list(raw, change):
    expected = rafdb(raw).splits()
    (raw / LIST).write_bytes(change((raw / LIST).read_bytes()))
    assert rafdb(raw).splits() == expected


def test_a_list_of_which_no_line_can_be_used_says_why(raw):
    (raw / LIST).write_bytes((raw / LIST).read_bytes().replace(b" ", b"_"))
    with pytest.raises(ValueError, match=r"no picture of split 'train' can be used.*line 1: is not NAME LABEL"):
        rafdb(raw).splits()
