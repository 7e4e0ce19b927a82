"""``bench explain``: any picture, its prediction and its maps, from a training's folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from bench.config import load_settings
from bench.data.index import load_index
from bench.data.readers import open_reader
from bench.data.samples import decode_jpeg
from bench.data.transforms import eval_images
from bench.dataset import BadPictureError
from bench.prepare.alignment import template_points
from bench.prepare.landmark_table import LANDMARKS_HEADER
from bench.prepare.pack import prepare
from bench.prepare.pictures import encode_jpeg
from bench.prepare.preparation import Preparation
from bench.reporting.pictures.explain import (
    REPORT,
    LandmarkSource,
    PictureFile,
    choose_readers,
    explain,
    find_pictures,
    five_points,
    open_training,
    prepare_face,
    with_preparation,
)
from bench.runtime.engine import Engine
from bench.runtime.observer import LogObserver
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import make_plan
from bench.sweep.run import run_plan
from bench.sweep.store import read_records

SETTINGS = {
    "run.methods": ["cam"],
    "run.backbones": ["mini"],
    "run.guidance": ["none"],
    "run.seeds": [0],
    "images.size": 32,
    "backbones.mini.width": 8,
    "datasets.synthetic.size": 36,
    "datasets.synthetic.train": 48,
    "datasets.synthetic.val": 14,
    "datasets.synthetic.test": 27,
    "train.epochs": 1,
    "train.warmup_epochs": 0,
    "train.batch_size": 12,
    "train.lr": 0.003,
    "loader.workers": 0,
}


@pytest.fixture(scope="module")
def results(data_root, tmp_path_factory) -> Path:
    """A results folder with one training."""
    folder = tmp_path_factory.mktemp("explain") / "results"
    settings = load_settings(environ={}, flags={**SETTINGS, "run.results": folder, "run.data": data_root})
    prepare_missing(make_plan(settings).sources.values(), observer=LogObserver(), plugins=())
    outcome = run_plan(make_plan(settings), engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver())
    assert not outcome.failed
    return folder


@pytest.fixture
def training(results):
    (folder,) = (results / "trainings").iterdir()
    return folder


@pytest.fixture(scope="module")
def test_split(results, data_root):
    (source,) = make_plan(load_settings(environ={}, flags={**SETTINGS, "run.results": results, "run.data": data_root})).sources.values()
    (batch,) = open_reader(source.folder, "test").eval_batches(rank=0, world_size=1, batch_size=27)
    return batch


@pytest.fixture
def faces(test_split, tmp_path):
    """A folder with three faces, their landmarks, and a file that is no picture."""
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    names = ("one.png", "two.png", "more/one.png")
    rows = [",".join(LANDMARKS_HEADER)]
    for name, image, points in zip(names, test_split.images, test_split.landmarks, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        rows.append(",".join([name, *(f"{value:.2f}" for value in points.flatten().tolist())]))
    (folder / "landmarks.csv").write_text("\n".join(rows))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def report(folder):
    return json.loads((folder / REPORT).read_text())


def test_a_folder_is_explained_and_what_cannot_be_read_is_named(bench_here, tmp_path, training, faces):
    done = bench_here("explain", faces, "--checkpoint", training, "--out", "seen", "--methods", "cam,layercam", cwd=tmp_path)
    assert done.returncode == 1
    assert "broken.png: not a picture" in done.stdout
    assert "without landmarks: 3" in done.stdout
    results = report(tmp_path / "seen")
    assert [Path(failure["picture"]).name for failure in results["failed"]] == ["broken.png"]
    assert {picture["folder"] for picture in results["pictures"]} == {"one", "two", "more_one"}
    for picture in results["pictures"]:
        assert sum(picture["probabilities"].values()) == pytest.approx(1)
        assert picture["probabilities"][picture["prediction"]] == max(picture["probabilities"].values())
        assert {entry["method"]: entry["au_cosine"] for entry in picture["maps"]} == {"cam": None, "layercam": None}
        for entry in picture["maps"]:
            assert Image.open(tmp_path / "seen" / picture["folder"] / entry["file"]).size == (36, 36)


def test_with_landmarks_there_are_au_maps_of_expressions_and_their_cosines(bench_here, tmp_path, training, faces):
    command = ["explain", faces / "one.png", "--checkpoint", training, "--landmarks", faces / "landmarks.csv"]
    done = bench_here(*command, "--class", "happiness", "--class", "neutral", "--methods", "cam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (picture,) = report(tmp_path / "explanations")["pictures"]
    cosines = {entry["class"]: entry["au_cosine"] for entry in picture["maps"]}
    assert 0 < cosines["happiness"] < 1
    assert cosines["neutral"] is None
    drawn = {path.name for path in (tmp_path / "explanations" / "one").iterdir()}
    assert {"face.png", "1-happiness-au-map.png", "1-happiness-cam.png"} <= drawn
    assert "0-neutral-au-map.png" not in drawn


def test_nothing_is_overwritten(bench_here, tmp_path, training, faces):
    kept = tmp_path / "explanations" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("keep this")
    done = bench_here("explain", faces, "--checkpoint", training, cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert [path.name for path in kept.parent.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "hapiness"], "Did you mean 'happiness'"),
        (["--methods", "acol"], "cannot read a training of cam"),
        (["--landmarks", "none.csv"], "no such file"),
        (["--align"], "needs landmarks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bench_here, tmp_path, training, faces, arguments, message):
    done = bench_here("explain", faces, "--checkpoint", training, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "explanations").exists()


def test_a_folder_without_a_training_is_told_so(bench_here, tmp_path, faces):
    done = bench_here("explain", faces, "--checkpoint", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no finished training" in done.stderr


def test_the_folder_of_a_cell_leads_to_its_training(results, training):
    ((cell, _),) = read_records(results)
    assert open_training(cell).training.key == open_training(training).training.key


def test_all_methods_that_can_read_a_training_do(training):
    chosen = choose_readers(open_training(training).training)
    assert {"cam", "gradcam", "layercam", "scorecam"} <= set(chosen)
    assert not {"acol", "tscam"} & set(chosen)


def test_the_prediction_is_that_of_the_evaluation_of_the_same_pixels(training, test_split, tmp_path):
    restored = open_training(training)
    pixels = test_split.images[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "face.png")
    stored = decode_jpeg(encode_jpeg(pixels, quality=95))[None]
    sources, _ = find_pictures([tmp_path / "face.png"])
    methods = choose_readers(restored.training, ["cam"])
    source, out = LandmarkSource("none"), tmp_path / "out"
    (explanation,) = explain(sources, restored, methods=methods, landmarks=source, align=False, device=torch.device("cpu"), out=out)
    mean, std = restored.classifier.backbone.mean, restored.classifier.backbone.std
    with torch.inference_mode():
        expected = restored.classifier(eval_images(stored, size=32, mean=mean, std=std)).logits.double().softmax(1)[0]
    np.testing.assert_allclose(list(explanation.facts["probabilities"].values()), expected, atol=1e-6)


def test_an_aligned_face_lies_on_the_template(faces):
    source = LandmarkSource(str(faces / "landmarks.csv"))
    face = prepare_face(PictureFile(path=faces / "one.png", name="one"), source, preparation=None, align=True)
    assert face.prepared == "aligned"
    assert np.abs(five_points(face.landmarks) - template_points(256)).mean() < 0.05 * 256


def test_a_picture_without_a_row_has_no_landmarks_and_one_with_a_bad_row_cannot_be_explained(faces):
    table = faces / "landmarks.csv"
    table.write_text(table.read_text().replace("two.png,", "two.png,oops"))
    source = LandmarkSource(str(table))
    (faces / "three.png").write_bytes((faces / "one.png").read_bytes())
    face = prepare_face(PictureFile(path=faces / "three.png", name="three"), source, preparation=None, align=False)
    assert face.landmarks is None
    with pytest.raises(BadPictureError, match=r"line 3 \(two\.png\)"):
        prepare_face(PictureFile(path=faces / "two.png", name="two"), source, preparation=None, align=False)


def test_pictures_of_one_name_get_folders_of_their_own_and_no_name_leads_elsewhere(tmp_path):
    for name in ("a/face.png", "b/face.png", "c/...hidden é.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources, failed = find_pictures([tmp_path / "a" / "face.png", tmp_path / "b", tmp_path / "c" / "...hidden é.png", tmp_path / "d"])
    assert [source.name for source in sources] == ["face", "face-2", "hidden_é"]
    assert [failure.reason for failure in failed] == ["no such file or folder"]


def test_where_nothing_is_explained_nothing_is_written_and_the_status_is_2(bench_here, tmp_path, training):
    done = bench_here("explain", tmp_path / "typo.png", "--checkpoint", training, cwd=tmp_path)
    assert done.returncode == 2
    assert "wrote" not in done.stdout
    assert not (tmp_path / "explanations").exists()


def test_a_file_of_a_training_stands_for_its_folder(training):
    key = open_training(training).training.key
    weights = next(path for path in (training / "best").rglob("*") if path.is_file())
    assert {open_training(file).training.key for file in (training / "trained.json", weights)} == {key}


def test_the_record_of_a_cell_stands_for_its_folder(results, training):
    ((cell, _),) = read_records(results)
    assert open_training(cell / "record.json").training.key == open_training(training).training.key


def test_a_file_in_no_training_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileNotFoundError, match="give the folder <results>/trainings/<hash>"):
        open_training(tmp_path / "weights.bin")


def test_a_training_keeps_how_its_pictures_were_prepared(training):
    preparation = open_training(training).preparation
    assert (preparation.entry, preparation.size, preparation.quality, preparation.needs) == ("synthetic", 36, 95, "")


@pytest.fixture
def older(training, tmp_path):
    """A training's folder of a version that did not keep the preparation."""
    folder = shutil.copytree(training, tmp_path / "trainings" / training.name)
    trained = json.loads((folder / "trained.json").read_text())
    del trained["preparation"]
    (folder / "trained.json").write_text(json.dumps(trained))
    return folder


def test_an_older_training_takes_the_preparation_from_its_data(older, training, data_root):
    restored = open_training(older)
    assert restored.preparation is None
    assert with_preparation(restored, data_root).preparation == open_training(training).preparation


def test_an_older_training_without_its_data_says_what_is_assumed(bench_here, tmp_path, older, faces):
    done = bench_here("explain", faces / "one.png", "--checkpoint", older, "--methods", "cam", cwd=tmp_path)
    assert "is not known; assumed: 256 x 256 pixels, JPEG quality 95, letterboxed" in " ".join(done.stdout.split())
    (picture,) = report(tmp_path / "explanations")["pictures"]
    assert not picture["as_trained"]


def test_data_that_is_not_the_trainings_is_refused(older, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold the dataset of the training"):
        with_preparation(open_training(older), tmp_path)


def test_a_preparation_that_needs_an_annotation_is_named(faces):
    needy = Preparation(entry="rafdb", size=64, quality=95, aligned=True, needs="the five points")
    face = prepare_face(PictureFile(path=faces / "one.png", name="one"), LandmarkSource("none"), preparation=needy, align=None)
    assert face.image.shape == (64, 64, 3)
    assert "prepared with the five points" in face.deviation


@pytest.mark.parametrize(("align", "prepared"), [(None, "letterboxed"), (False, "letterboxed"), (True, "aligned")])
def test_a_flag_overrides_the_preparation_of_the_training_and_the_report_says_so(faces, align, prepared):
    whole = Preparation(entry="folder", size=48, quality=95)
    source = LandmarkSource(str(faces / "landmarks.csv"))
    face = prepare_face(PictureFile(path=faces / "one.png", name="one"), source, preparation=whole, align=align)
    assert face.prepared == prepared
    assert (face.deviation is None) == (prepared == "letterboxed")


LAYOUTS = {
    "tall": ({}, {}),
    "wide": ({}, {}),
    "small": ({"size": 48, "quality": 60}, {}),
    "landmarks": ({}, {}),
    "stored": ({"landmark_frame": "stored"}, {ExifTags.Base.Orientation: 6}),
    "upright": ({"landmark_frame": "upright"}, {ExifTags.Base.Orientation: 6}),
}
"""Name of a raw folder -> options of the dataset, EXIF entries of its pictures."""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Raw folders of all `LAYOUTS`, and the results of one training on each."""
    home = tmp_path_factory.mktemp("layouts")
    sides = {"tall": (30, 61), "wide": (70, 33)}
    for name, (options, exif_entries) in LAYOUTS.items():
        rows = [",".join(LANDMARKS_HEADER)]
        exif = Image.Exif()
        exif.update(exif_entries)
        for number, split in enumerate(["train"] * 8 + ["test"] * 3):
            for label in ("happiness", "anger"):
                source = f"{split}/{label}/{number}.jpg"
                random = np.random.default_rng([number, label == "anger", len(name)])
                (home / name / source).parent.mkdir(parents=True, exist_ok=True)
                noise = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
                noise.resize(sides.get(name, (44, 52)), Image.Resampling.BICUBIC).save(home / name / source, exif=exif)
                rows.append(",".join([source, *(f"{value:.2f}" for value in random.uniform(5, 30, 136))]))
        if name not in sides:
            (home / name / "landmarks.csv").write_text("\n".join(rows))
        prepare("folder", name=name, options=options, raw=home / name, out=home / "data" / name, workers=1)
    flags = {key: value for key, value in SETTINGS.items() if not key.startswith("datasets.")}
    flags |= {"run.datasets": list(LAYOUTS), "train.batch_size": 6, "run.results": home / "results", "run.data": home / "data"}
    settings = load_settings(environ={}, flags=flags)
    outcome = run_plan(make_plan(settings), engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver())
    assert not outcome.failed
    return home


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_probabilities_of_a_file_are_those_of_its_evaluation(layouts, tmp_path, name):
    (cell,) = (folder for folder, record in read_records(layouts / "results") if record.cell.dataset == name)
    rows = pq.read_table(cell / "samples.parquet").to_pylist()
    evaluated = {row["key"]: torch.tensor(row["logits"]).double().softmax(0).numpy() for row in rows}
    keys = {}
    for shard in load_index(layouts / "data" / name).splits["test"].shards:
        data = (layouts / "data" / name / shard.name).read_bytes()
        for member in shard.members:
            note = json.loads(data[member.json_offset : member.json_offset + member.json_bytes])
            keys[note["source"]] = member.key
    sources, _ = find_pictures([layouts / name / "test"])
    restored = open_training(cell)
    table = layouts / name / "landmarks.csv"
    results = list(
        explain(
            sources,
            restored,
            methods=choose_readers(restored.training, ["cam"]),
            landmarks=LandmarkSource(str(table) if table.exists() else "none"),
            align=None,
            device=torch.device("cpu"),
            out=tmp_path / "out",
        )
    )
    assert len(results) == len(keys) == 6
    for result in results:
        key = keys[result.file.path.relative_to(layouts / name).as_posix()]
        assert result.facts["as_trained"]
        np.testing.assert_allclose(list(result.facts["probabilities"].values()), evaluated[key], atol=1e-5)


def test_a_map_of_nan_is_an_error_of_that_map(training, test_split, tmp_path):
    restored = open_training(training)
    Image.fromarray(test_split.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "face.png")
    methods = choose_readers(restored.training, ["cam", "gradcam"])
    plain = methods["gradcam"].maps
    methods["gradcam"].maps = lambda *arguments: plain(*arguments) * float("nan")
    sources, _ = find_pictures([tmp_path / "face.png"])
    settings = {"landmarks": LandmarkSource("none"), "align": None, "device": torch.device("cpu"), "out": tmp_path / "out"}
    (result,) = explain(sources, restored, methods=methods, **settings)
    assert [entry.get("error") for entry in result.facts["maps"]] == [None, "the map holds NaN or infinite values"]
