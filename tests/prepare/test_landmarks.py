"""Finding landmarks. The networks carry random weights: loading, batching and coordinates are proved here, not how well faces are found."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.index import load_index
from bench.dataset import Box
from bench.prepare import landmarks as room
from bench.prepare.landmarks import WEIGHTS, WeightsFile, describe_source, open_landmarker
from bench.prepare.pack import prepare

PUBLISHED = dict(WEIGHTS["face-alignment"])
NETWORK, DETECTOR = PUBLISHED["network"].name, PUBLISHED["detector"].name


def picture(seed, height=120, width=100):
    """A smooth coloured picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def detector_state(*, finds):
    """Weights of S3FD that see a face of 64 pixels at every 16th pixel, or none anywhere."""
    from face_alignment.detection.sfd.net_s3fd import s3fd

    state = s3fd().state_dict()
    for name, tensor in state.items():
        if "mbox" in name:
            tensor.zero_()
        if name.endswith("mbox_conf.bias"):
            face = finds and name.startswith("conv5_3")
            tensor[-1] = 5.0 if face else -5.0
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files named as the published ones, with random weights; and their real hashes."""
    pytest.importorskip("face_alignment", exc_type=ImportError)
    from face_alignment.models import FAN

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(FAN(4).state_dict(), folder / NETWORK)
        torch.save(detector_state(finds=False), folder / DETECTOR)
    return folder


def table_of(folder, *, url="https://invalid.example/"):
    """What `WEIGHTS` would say if the files of a folder were the published ones."""
    return {
        role: WeightsFile(file.name, hashlib.sha256((folder / file.name).read_bytes()).hexdigest()[:10], f"{url}{file.name}")
        for role, file in PUBLISHED.items()
    }


@pytest.fixture
def weights(files, monkeypatch):
    """The folder of random weights, taken for the published ones."""
    monkeypatch.setitem(WEIGHTS, "face-alignment", table_of(files))
    return files


@pytest.fixture(scope="module")
def opened(files):
    before = WEIGHTS["face-alignment"]
    WEIGHTS["face-alignment"] = table_of(files)
    try:
        return open_landmarker("face-alignment", weights=files)
    finally:
        WEIGHTS["face-alignment"] = before


@pytest.fixture
def landmarker(opened, monkeypatch):
    """One network for all tests; what a test puts in its place goes with the test."""
    monkeypatch.setattr(opened, "_detector", opened._detector)
    monkeypatch.setattr(opened, "_network", opened._network)
    return opened


IMAGES = [picture(0), picture(1, 200, 260), picture(2, 64, 64)]
BOXES = [Box(20, 30, 80, 100), Box(90.5, -20.25, 220, 110), Box(4, 8, 70, 80)]


@pytest.fixture(scope="module")
def located(opened):
    """A batch of three, computed once."""
    return opened.find(IMAGES, BOXES)


def test_a_batch_agrees_with_the_package_face_by_face(located, files, tmp_path, monkeypatch):
    import face_alignment

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/checkpoints").symlink_to(files)
    package = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device="cpu", compile=False)
    expected = [package.get_landmarks_from_image(image, [np.array(box)])[0] for image, box in zip(IMAGES, BOXES, strict=True)]
    assert [points.shape for points in located] == [(68, 2)] * 3
    assert [points.dtype for points in located] == [np.float64] * 3
    np.testing.assert_allclose(np.stack(located), np.stack(expected), atol=1e-3, rtol=0)
    assert all(len(np.unique(points, axis=0)) > 10 for points in located)  # they are not all in one corner


def test_the_same_batch_gives_the_same_bits(landmarker, located):
    assert np.stack(landmarker.find(IMAGES, BOXES)).tobytes() == np.stack(located).tobytes()


def settings():
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": torch.backends.cudnn.allow_tf32,
        "enabled": torch.backends.cudnn.enabled,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().numpy().tobytes(),
    }


SETTINGS_CODE = """
import sys, json, torch
sys.path.insert(0, {tests!r})
from test_landmarks import IMAGES, BOXES, WEIGHTS, WeightsFile, open_landmarker, settings
from pathlib import Path
WEIGHTS["face-alignment"] = {{role: WeightsFile(*row) for role, row in json.loads({table!r}).items()}}
before = settings()
landmarker = open_landmarker("face-alignment", weights=Path({weights!r}))
landmarker.find(IMAGES[2:], [None])
landmarker.find(IMAGES[:1], BOXES[:1])
after = settings()
print(before == after, {{key: (before[key], after[key]) for key in before if before[key] != after[key]}})
"""


@pytest.mark.slow
def test_opening_and_finding_leave_the_settings_of_torch_alone(files, run_python):
    code = SETTINGS_CODE.format(tests=str(Path(__file__).parent), table=json.dumps(table_of(files)), weights=str(files))
    output = run_python(code)
    assert output.startswith("True"), output


def test_finding_leaves_the_settings_of_torch_alone(landmarker, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # the user's own choice
    before = settings()
    landmarker.find([IMAGES[2]], [None])
    landmarker.find(IMAGES[:1], BOXES[:1])
    assert settings() == before


@pytest.mark.gpu
def test_finding_on_a_gpu_leaves_cudnn_alone_and_repeats_itself(landmarker):
    assert next(landmarker._network.parameters()).is_cuda
    before = settings()
    first = landmarker.find(IMAGES, BOXES)
    landmarker.find([IMAGES[2]], [None])
    assert settings() == before
    assert np.stack(first).tobytes() == np.stack(landmarker.find(IMAGES, BOXES)).tobytes()


class Brightness(torch.nn.Module):
    """Heat maps that are the brightness of the crop: their maximum is where the bright spot is."""

    def forward(self, batch):
        return [torch.nn.functional.avg_pool2d(batch.mean(1, keepdim=True), 4).repeat(1, 68, 1, 1)]


def test_a_bright_spot_is_found_at_its_pixel(landmarker):
    landmarker._network = Brightness()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:300, :320]
    images, boxes, spots = [], [], []
    for _ in range(100):
        spot, corner = rng.integers(110, 200, 2), rng.uniform(80, 110, 2)
        spots.append(spot)
        images.append(np.repeat((255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 50))[..., None], 3, axis=2).astype(np.uint8))
        boxes.append(Box(*corner, *(corner + 125)))  # the square is 256 pixels: nothing is scaled, a cell is 4 pixels
    errors = np.stack([points[0] for points in landmarker.find(images, boxes)]) - np.array(spots)
    assert np.abs(errors).max() <= 2  # half a cell, of which the neighbours tell a half, and a pixel that the crop is off
    assert np.abs(errors.mean(axis=0)).max() < 0.3  # another convention of pixel centres would show as half a pixel


def test_a_face_at_the_left_of_the_picture_is_not_mirrored(landmarker):
    landmarker._network = Brightness()
    image = np.zeros((200, 200, 3), np.uint8)
    image[90:100, 40:50] = 255
    (points,) = landmarker.find([image], [Box(30, 30, 170, 170)])
    assert np.abs(points - [44.5, 94.5]).max() < 4


def test_an_empty_batch_is_no_trouble(landmarker):
    assert landmarker.find([], []) == []


@pytest.mark.parametrize("shape", [(24, 30), (18, 700), (64, 64)])
def test_a_picture_without_a_face_has_no_landmarks(landmarker, shape):
    assert landmarker.find([picture(0, *shape)], [None]) == [None]


def test_pictures_with_and_without_a_face_keep_their_order(landmarker, located):
    first, second, third = landmarker.find([IMAGES[2], IMAGES[0], IMAGES[2]], [None, BOXES[0], None])
    assert first is None
    assert third is None
    np.testing.assert_array_equal(second, located[0])


def test_the_detector_is_loaded_only_where_a_box_is_missing(landmarker):
    landmarker._detector, landmarker._network = None, Brightness()
    landmarker.find(IMAGES, BOXES)
    assert landmarker._detector is None
    landmarker.find(IMAGES[2:], [None])
    assert landmarker._detector is not None


def test_the_search_agrees_with_the_detector_of_the_package(landmarker, files):
    from face_alignment.detection.sfd.sfd_detector import SFDDetector

    package = SFDDetector("cpu", path_to_detector=str(files / DETECTOR))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, layer in package.face_detector.named_modules():
            if name.endswith(("mbox_conf", "mbox_loc")):  # scores on both sides of a half, boxes of somewhat different sizes
                torch.nn.init.normal_(layer.weight, std=1.0 if name.endswith("conf") else 0.03)
    landmarker._detector = package.face_detector
    for image in (picture(5, 96, 128), picture(6, 90, 70)):
        boxes = list(package.detect_from_image(image))
        assert len({tuple(box) for box in boxes}) > 5
        largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        np.testing.assert_allclose(landmarker._search(image), largest[:4], atol=1e-3)


class Planted(torch.nn.Module):
    """A detector that sees faces at given (stride number, row, column, score before softmax)."""

    def __init__(self, *faces):
        super().__init__()
        self.faces = faces

    def forward(self, batch):
        outputs = []
        for level in range(6):
            stride = 4 * 2**level
            scores = torch.zeros(1, 2, batch.shape[2] // stride + 1, batch.shape[3] // stride + 1)
            scores[:, 0] = 8
            for where, row, column, score in self.faces:
                if where == level:
                    scores[:, :, row, column] = torch.tensor([0.0, score])
            outputs += [scores, torch.zeros(1, 4, *scores.shape[2:])]
        return outputs


def test_the_largest_face_is_taken_in_pixels_of_the_original(landmarker):
    # 32-pixel strides carry boxes of 128 pixels, 16-pixel strides of 64; the smaller one is the surer one.
    landmarker._detector = Planted((3, 4, 6, 2.0), (2, 20, 30, 9.0))
    box = landmarker._search(picture(0, 1280, 1280))  # searched at half its size
    np.testing.assert_allclose(box, 2 * np.array([208 - 64, 144 - 64, 208 + 64, 144 + 64]))


def test_an_uncertain_face_is_none(landmarker):
    landmarker._detector = Planted((3, 4, 6, -0.5))  # a score of 0.38, beyond the candidates' 0.05
    assert landmarker._search(picture(0, 300, 300)) is None


@pytest.mark.parametrize(
    "box",
    [Box(-90, 10, -10, 90), Box(10, 10, 12, 60), Box(80, 80, 20, 20), Box(0, 0, float("nan"), 50), Box(-5e8, -5e8, 5e8, 5e8)],
    ids=["outside", "thin", "turned", "nan", "huge"],
)
def test_a_box_that_cannot_be_one_is_searched_instead(landmarker, monkeypatch, box):
    searched = []
    monkeypatch.setattr(type(landmarker), "_search", lambda self, image: searched.append(image.shape))
    assert landmarker.find([IMAGES[0]], [box]) == [None]
    assert searched == [IMAGES[0].shape]


@pytest.mark.parametrize("box", [Box(0, 0, 4, 4), Box(96, 116, 103, 123), Box(-150, -150, 250, 250), Box(0, 0, 99, 4)])
def test_any_box_that_can_be_one_is_cut_out(landmarker, box):
    landmarker._network = Brightness()
    (points,) = landmarker.find([IMAGES[0]], [box])
    assert np.isfinite(points).all()


def test_the_facts_for_the_index_are_versions_and_hashes(weights):
    import face_alignment

    facts = describe_source("face-alignment", weights=weights)
    hashes = {name: hashlib.sha256((weights / name).read_bytes()).hexdigest() for name in (NETWORK, DETECTOR)}
    assert facts == {"name": "face-alignment", "version": face_alignment.__version__, "weights_sha256": hashes}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("name", ["shipped", "none"])
def test_no_network_no_facts_no_landmarker(name, tmp_path):
    assert describe_source(name, weights=None) == {"name": name}
    assert open_landmarker(name, weights=None) is None
    with pytest.raises(ValueError, match=f"landmarks={name} needs no weights"):
        describe_source(name, weights=tmp_path)


@pytest.mark.parametrize("use", [describe_source, open_landmarker])
def test_a_file_that_is_not_the_published_one_is_refused(files, use, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "face-alignment", PUBLISHED)
    with pytest.raises(
        ValueError, match=r"not the published 2DFAN4-11f355bf06.pth.tar: its sha256 begins with \w{10}, published is 11f355bf06"
    ):
        use("face-alignment", weights=files)  # real names, random content


def test_a_file_damaged_after_it_was_checked_is_refused(weights, tmp_path):
    copy = shutil.copytree(weights, tmp_path / "copy")
    describe_source("face-alignment", weights=copy)
    data = bytearray((copy / DETECTOR).read_bytes())
    data[-1000] ^= 1
    (copy / DETECTOR).write_bytes(data)
    with pytest.raises(ValueError, match=f"not the published {DETECTOR}"):
        open_landmarker("face-alignment", weights=copy)


def test_a_folder_that_lacks_a_file_is_told_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks {NETWORK} and {DETECTOR}.*python-fan/{NETWORK}.*--landmarks dlib.*none"):
        describe_source("face-alignment", weights=tmp_path)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        describe_source("face-alignment", weights=tmp_path / "nowhere")


def test_weights_are_downloaded_into_the_hub_folder_and_checked(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(WEIGHTS, "face-alignment", table_of(files, url=f"{files.as_uri()}/"))
    facts = describe_source("face-alignment", weights=None)
    assert sorted(path.name for path in (tmp_path / "hub/checkpoints").iterdir()) == sorted(facts["weights_sha256"]) == [NETWORK, DETECTOR]


def test_a_download_of_something_else_is_refused_and_leaves_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    table = {role: file._replace(url=f"{files.as_uri()}/{file.name}") for role, file in PUBLISHED.items()}
    monkeypatch.setitem(WEIGHTS, "face-alignment", table)
    with pytest.raises(ValueError, match=r'invalid hash value .expected "11f355bf06"'):
        describe_source("face-alignment", weights=None)
    assert not any((tmp_path / "hub/checkpoints").iterdir())


def test_an_unreachable_server_is_one_error_that_says_which_files_go_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    table = {role: file._replace(url=f"{tmp_path.as_uri()}/{file.name}") for role, file in PUBLISHED.items()}
    monkeypatch.setitem(WEIGHTS, "face-alignment", table)
    with pytest.raises(ValueError, match="could not be downloaded") as caught:
        describe_source("face-alignment", weights=None)
    for words in (NETWORK, DETECTOR, f"into {tmp_path}/hub/checkpoints", "--landmark-weights DIR", "--landmarks dlib or --landmarks none"):
        assert words in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def replaced(weights, tmp_path, monkeypatch, content):
    """A copy of the weights whose network file holds something else, and is taken for the published one."""
    copy = shutil.copytree(weights, tmp_path / "copy")
    torch.save(content, copy / NETWORK)
    monkeypatch.setitem(WEIGHTS, "face-alignment", table_of(copy))
    return copy


def test_a_pickled_object_is_refused_and_not_run(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    folder = replaced(files, tmp_path, monkeypatch, {"conv1.weight": Trap()})
    with pytest.raises(ValueError, match="refused, because it is damaged or holds other things than tensors"):
        open_landmarker("face-alignment", weights=folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"conv1.weight": torch.zeros(3)}, "does not fit the network"),
        ([1, 2], "expected a dictionary"),
        ({"a": 1}, "expected a dictionary"),
    ],
)
def test_tensors_of_another_network_are_refused(files, tmp_path, monkeypatch, content, words):
    with pytest.raises(ValueError, match=words):
        open_landmarker("face-alignment", weights=replaced(files, tmp_path, monkeypatch, content))


@pytest.mark.parametrize(("name", "command"), [("face-alignment", "face-alignment>="), ("dlib", "dlib>=.*compiles")])
def test_a_missing_package_is_named_with_the_command(monkeypatch, name, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the package {name}: pip install '{command}"):
        describe_source(name, weights=None)


def test_a_package_that_cannot_be_imported_is_no_riddle(monkeypatch):
    pytest.importorskip("face_alignment", exc_type=ImportError)

    def broken(name):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(room.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"cannot be imported: libGL.so.1.*opencv-python-headless.*--landmarks dlib"):
        describe_source("face-alignment", weights=None)


def test_the_module_is_light(run_python):
    code = (
        "import sys, bench.prepare.landmarks; print([m for m in ('torch', 'face_alignment', 'dlib', 'cv2', 'numba') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two pictures per split."""
    root = tmp_path_factory.mktemp("raw")
    for number, split in enumerate(("train", "val", "test")):
        for i in range(2):
            path = root / split / ("happiness", "fear")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(10 * number + i, 80 + i, 90)).save(path)
    return root


@pytest.fixture(scope="module")
def finding(files, tmp_path_factory):
    """Random weights whose detector sees a face in every picture."""
    folder = tmp_path_factory.mktemp("finding")
    shutil.copy(files / NETWORK, folder)
    torch.save(detector_state(finds=True), folder / DETECTOR)
    return folder


def prepared(raw, out, weights, **changes):
    options = {"landmarks": "face-alignment", "size": 64}
    prepare("folder", name="m", options=options, raw=raw, out=out, landmark_weights=weights, **{"workers": 1, **changes})
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def random_weights(finding):
    """`WEIGHTS` that takes them for the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WEIGHTS, "face-alignment", table_of(finding))
        yield WEIGHTS["face-alignment"]


@pytest.fixture(scope="module")
def whole(raw, finding, random_weights, tmp_path_factory):
    """The files that one worker makes undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "m"
    files = prepared(raw, out, finding)
    index = load_index(out)
    assert index.provenance["landmark_source"] == describe_source("face-alignment", weights=finding)
    assert set(index.provenance["samples_without_landmarks"].values()) == {0}
    return files


@pytest.mark.slow
def test_an_interrupted_preparing_with_landmarks_ends_with_the_same_bytes(raw, finding, whole, tmp_path):
    def stop(progress):
        if progress.done > progress.reused:  # one more shard than the run before
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepared(raw, tmp_path / "again", finding, on_progress=stop)
    assert not (tmp_path / "again/index.json").exists()
    assert prepared(raw, tmp_path / "again", finding) == whole


PLUGIN = """
import json
from pathlib import Path
from bench.prepare.landmarks import WEIGHTS, WeightsFile
rows = json.loads(Path(__file__).with_suffix(".json").read_text())
WEIGHTS["face-alignment"] = {role: WeightsFile(*row) for role, row in rows.items()}
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_workers_find_the_landmarks_of_one(raw, finding, random_weights, whole, tmp_path):
    # A worker starts from nothing but its arguments, so the random weights reach it as a plugin, which is any code of the user's.
    plugin = tmp_path / "random_weights.py"
    plugin.write_text(PLUGIN)
    plugin.with_suffix(".json").write_text(json.dumps(random_weights))
    assert prepared(raw, tmp_path / "two", finding, plugins=(str(plugin),), workers=2) == whole


def test_preparing_without_weights_stops_before_anything_is_written(raw, tmp_path):
    pytest.importorskip("face_alignment", exc_type=ImportError)
    with pytest.raises(ValueError, match="lacks 2DFAN4"):
        prepared(raw, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def dlib():
    module = pytest.importorskip("dlib")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("face_recognition_models is not installed")
    return module


def test_dlib_is_described_by_its_version_and_file(dlib):
    file = WEIGHTS["dlib"]["predictor"]
    facts = describe_source("dlib", weights=None)
    assert facts == {"name": "dlib", "version": dlib.__version__, "weights_sha256": {file.name: file.sha256}}
    assert "face_recognition_models" not in sys.modules
    assert "pkg_resources" not in sys.modules


def test_dlib_finds_the_points_of_a_given_box_in_pixels_of_the_picture(dlib):
    image, box = picture(3, 200, 180), Box(40.4, 50.6, 140, 150)
    (points,) = open_landmarker("dlib", weights=None).find([image], [box])
    package = importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]
    model = Path(package) / "models" / WEIGHTS["dlib"]["predictor"].name
    shape = dlib.shape_predictor(str(model))(image, dlib.rectangle(40, 51, 140, 150))
    np.testing.assert_array_equal(points, [(shape.part(i).x, shape.part(i).y) for i in range(68)])


def test_dlib_finds_no_face_where_there_is_none(dlib):
    assert open_landmarker("dlib", weights=None).find([picture(0)], [None]) == [None]


def test_dlib_of_another_file_is_refused(dlib, tmp_path):
    (tmp_path / WEIGHTS["dlib"]["predictor"].name).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"not the published shape_predictor_68_face_landmarks\.dat"):
        open_landmarker("dlib", weights=tmp_path)


def test_dlib_without_its_model_says_where_to_get_it(dlib, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "face_recognition_models" else real(name))
    with pytest.raises(ValueError, match=rf"not in {tmp_path}.*pip install face_recognition_models; or get .*--landmark-weights DIR"):
        describe_source("dlib", weights=tmp_path)
