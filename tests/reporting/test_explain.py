"""``bench explain``: any picture, its prediction and its maps, from a training's folder alone."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.config import load_settings
from bench.data.alignment import template_points
from bench.data.landmark_table import LANDMARKS_HEADER
from bench.data.pack import prepare
from bench.data.pictures import encode_jpeg
from bench.data.preparation import Preparation
from bench.data.readers import open_reader
from bench.data.samples import decode_jpeg
from bench.data.transforms import eval_images
from bench.dataset import BadPictureError
from bench.reporting.explain import (
    REPORT,
    LandmarkSource,
    Source,
    choose_readers,
    explain,
    find_pictures,
    five_points,
    open_training,
    prepare_face,
)
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import make_plan
from bench.sweep.run import run_plan
from bench.sweep.store import read_cell_rows, read_records
from bench.training.engine import Engine
from bench.training.observer import LogObserver

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
    found = report(tmp_path / "seen")
    assert [Path(one["picture"]).name for one in found["failed"]] == ["broken.png"]
    assert {one["folder"] for one in found["pictures"]} == {"one", "two", "more_one"}
    for one in found["pictures"]:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["probabilities"][one["prediction"]] == max(one["probabilities"].values())
        assert {entry["method"]: entry["au_cosine"] for entry in one["maps"]} == {"cam": None, "layercam": None}
        for entry in one["maps"]:
            assert Image.open(tmp_path / "seen" / one["folder"] / entry["file"]).size == (36, 36)


def test_with_landmarks_there_are_au_maps_of_expressions_and_their_cosines(bench_here, tmp_path, training, faces):
    command = ["explain", faces / "one.png", "--checkpoint", training, "--landmarks", faces / "landmarks.csv"]
    done = bench_here(*command, "--class", "happiness", "--class", "neutral", "--methods", "cam", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (one,) = report(tmp_path / "explanations")["pictures"]
    cosines = {entry["class"]: entry["au_cosine"] for entry in one["maps"]}
    assert 0 < cosines["happiness"] < 1
    assert cosines["neutral"] is None
    drawn = {path.name for path in (tmp_path / "explanations" / "one").iterdir()}
    assert {"face.png", "1-happiness-au-map.png", "1-happiness-cam.png"} <= drawn
    assert "0-neutral-au-map.png" not in drawn


def test_nothing_is_overwritten(bench_here, tmp_path, training, faces):
    mine = tmp_path / "explanations" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep this")
    done = bench_here("explain", faces, "--checkpoint", training, cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--class", "hapiness"], "Did you mean 'happiness'"),
        (["--methods", "acol"], "cannot read a training of cam"),
        (["--landmarks", "none.csv"], "no such file"),
        (["--align"], "needs landmarks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(bench_here, tmp_path, training, faces, arguments, told):
    done = bench_here("explain", faces, "--checkpoint", training, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
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
    Image.fromarray(test_split.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "face.png")
    sources, _ = find_pictures([tmp_path / "face.png"])
    methods = choose_readers(restored.training, ["cam"])
    source, out = LandmarkSource("none"), tmp_path / "out"
    (one,) = explain(sources, restored, methods=methods, landmarks=source, align=False, device=torch.device("cpu"), out=out)
    mean, std = restored.classifier.backbone.mean, restored.classifier.backbone.std
    with torch.inference_mode():
        again = decode_jpeg(encode_jpeg(test_split.images[0].permute(1, 2, 0).numpy(), quality=95))[None]
        expected = restored.classifier(eval_images(again, size=32, mean=mean, std=std)).logits.double().softmax(1)[0]
    np.testing.assert_allclose(list(one.facts["probabilities"].values()), expected, atol=1e-6)


def test_an_aligned_face_lies_on_the_template(faces):
    source = Source(path=faces / "one.png", name="one")
    face = prepare_face(source, LandmarkSource(str(faces / "landmarks.csv")), preparation=Preparation(), align=True)
    assert face.prepared == "aligned"
    assert np.abs(five_points(face.landmarks) - template_points(256)).mean() < 0.05 * 256
    assert face.unlike.startswith("aligned by its landmarks; the training's pictures were kept whole")


def test_a_picture_without_a_row_has_no_landmarks_and_one_with_a_bad_row_cannot_be_explained(faces):
    table = faces / "landmarks.csv"
    table.write_text(table.read_text().replace("two.png,", "two.png,oops"))
    source = LandmarkSource(str(table))
    (faces / "three.png").write_bytes((faces / "one.png").read_bytes())
    assert prepare_face(Source(path=faces / "three.png", name="three"), source, preparation=Preparation(), align=None).landmarks is None
    with pytest.raises(BadPictureError, match=r"line 3 \(two\.png\)"):
        prepare_face(Source(path=faces / "two.png", name="two"), source, preparation=Preparation(), align=None)


def test_pictures_of_one_name_get_folders_of_their_own_and_no_name_leads_elsewhere(tmp_path):
    for name in ("a/face.png", "b/face.png", "c/...hidden é.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    sources, failed = find_pictures([tmp_path / "a" / "face.png", tmp_path / "b", tmp_path / "c" / "...hidden é.png", tmp_path / "d"])
    assert [source.name for source in sources] == ["face", "face-2", "hidden_é"]
    assert [one.reason for one in failed] == ["no such file or folder"]


def test_where_nothing_is_explained_nothing_is_written_and_the_status_says_so(bench_here, tmp_path, training, faces):
    done = bench_here("explain", tmp_path / "fasces", "--checkpoint", training, cwd=tmp_path)
    assert done.returncode == 2
    assert "no such file or folder" in done.stdout
    assert "nothing was explained, and nothing is written" in done.stdout
    assert not (tmp_path / "explanations").exists()


def test_a_file_of_a_training_stands_for_its_folder(training):
    (weights,) = training.glob("best/*/model.safetensors")
    for file in (training / "trained.json", weights):
        assert open_training(file).training.key == open_training(training).training.key


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


def shapes(split):
    """Faces as people have them: tall, wide, turned by EXIF; with landmarks of the upright picture."""
    for number, (image, points) in enumerate(zip(split.images, split.landmarks, strict=True)):
        face = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((80, 80))
        points = (points.double().numpy() + 0.5) * 80 / 36 - 0.5
        size, at = [((80, 144), (0, 20)), ((150, 80), (40, 0)), ((80, 80), (0, 0))][number % 3]
        picture = Image.new("RGB", size, (90, 110, 140))
        picture.paste(face, at)
        yield int(split.labels[number]), picture, points + np.array(at), number % 2 == 1


def write_folder(root, split, *, landmarks, classes):
    rows = [",".join(LANDMARKS_HEADER)]
    for number, (label, picture, points, turned) in enumerate(shapes(split)):
        for part in ("train", "test"):
            file = root / part / classes[label] / f"{number:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            if turned:
                exif[0x0112] = 6  # the file is to be turned clockwise
            stored = picture.transpose(Image.Transpose.ROTATE_90) if turned else picture
            moved = np.stack([points[:, 1], picture.width - 1 - points[:, 0]], axis=1) if turned and landmarks == "stored" else points
            stored.save(file, quality=97, exif=exif)
            rows.append(",".join([file.relative_to(root).as_posix(), *(f"{value:.3f}" for value in moved.ravel())]))
    if landmarks != "none":
        (root / "landmarks.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("landmarks", "options"),
    [("none", {}), ("stored", {"size": 48}), ("upright", {"size": 64, "quality": 60, "landmark_frame": "upright"})],
    ids=["whole pictures", "small", "turned, of low quality"],
)
def test_the_network_sees_what_was_evaluated(test_split, tmp_path, monkeypatch, bench_here, landmarks, options):
    classes = ("neutral", "happiness", "surprise", "fear", "anger", "disgust", "sadness")
    write_folder(tmp_path / "raw", test_split, landmarks=landmarks, classes=classes)
    prepare("folder", name="f", options=options | {"val_fraction": 0.3}, raw=tmp_path / "raw", out=tmp_path / "data" / "f", workers=1)
    monkeypatch.chdir(tmp_path)
    flags = {**SETTINGS, "run.results": tmp_path / "r", "run.data": tmp_path / "data", "run.datasets": ["f"], "train.batch_size": 4}
    settings = load_settings(environ={}, flags=flags)
    assert not run_plan(make_plan(settings), engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver()).failed
    ((cell, _),) = read_records(tmp_path / "r")
    source = ["--landmarks", tmp_path / "raw" / "landmarks.csv"] if landmarks != "none" else []
    done = bench_here("explain", "raw/test", "--checkpoint", cell, "--methods", "cam", "--out", "e", *source, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_cell_rows(cell)
    reader = open_reader(tmp_path / "data" / "f", "test")
    logits = dict(zip(rows.keys, rows.logits, strict=True))
    expected = {sample_source(tmp_path / "data" / "f", key): logits[key] for key in reader.keys}
    assert len(expected) == len(report(tmp_path / "e")["pictures"]) == 27
    for picture in report(tmp_path / "e")["pictures"]:
        z = expected[Path(picture["picture"]).relative_to("raw").as_posix()].astype(np.float64)
        wanted = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        np.testing.assert_allclose(list(picture["probabilities"].values()), wanted, atol=1e-5)


def sample_source(folder, key):
    for shard in folder.glob("test-*.tar"):
        with tarfile.open(shard) as tar:
            if f"{key}.json" in tar.getnames():
                return json.loads(tar.extractfile(f"{key}.json").read())["source"]
    raise KeyError(key)
