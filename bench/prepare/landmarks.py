"""The 68 landmarks of faces, found by a network or by dlib where a dataset brings none.

Neither the package nor its weights are trusted blindly: every file is compared with its published SHA-256 before it is opened, and no
setting of torch outlives a call (the package itself turns cuDNN's benchmark mode on for the whole process).
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib
import importlib.metadata
import importlib.util
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bench.dataset import Box
from bench.extras import install_command
from bench.io import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightsFile(NamedTuple):
    """A published file that a landmark source needs."""

    name: str
    sha256: str
    """Its SHA-256 in hexadecimal, or the first digits of it."""
    url: str


WEIGHTS: dict[str, dict[str, WeightsFile]] = {
    "face-alignment": {
        "network": WeightsFile(
            "2DFAN4-11f355bf06.pth.tar", "11f355bf06", "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar"
        ),
        "detector": WeightsFile(
            "s3fd-619a316812.pth", "619a316812", "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth"
        ),
    },
    "dlib": {
        "predictor": WeightsFile(
            "shape_predictor_68_face_landmarks.dat",
            "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            "http://dlib.net/files/shape_predictor_68_face_landmarks.dat.bz2",
        ),
    },
}
"""Landmark source -> what the file is for -> the file, as the packages name it. The hash in face-alignment's names is that of the file."""

NETWORK_BATCH = 16
"""Faces in one pass of the network: 1 GB of memory on a CPU."""
DETECTOR_SIDE = 640
"""Longer side of a picture, in pixels, in which S3FD searches; that of its training pictures (Zhang et al., ICCV 2017, section 3.4)."""
HOG_SIDE = 1600
"""The same for dlib, whose detector finds faces from 80 pixels on, from 40 with the picture doubled."""
MIN_BOX_SIDE = 4.0
"""Pixels. A smaller box is a mistake."""

_MIN_DETECTOR_SIDE = 64  # its strides leave nothing of smaller pictures
_MIN_DETECTOR_SCORE = 0.5  # the package's
_DETECTOR_OVERLAP = 0.3  # the package's
_DETECTOR_MEAN = (104.0, 117.0, 123.0)  # blue, green, red
_PACKAGES = {"face-alignment": "face_alignment", "dlib": "dlib"}
_EXTRAS = {"face-alignment": "landmarks", "dlib": "dlib"}


class Landmarker(ABC):
    """Finds the landmarks of the one face that a picture is about."""

    @abstractmethod
    def find(self, images: Sequence[npt.NDArray[np.uint8]], boxes: Sequence[Box | None]) -> list[npt.NDArray[np.float64] | None]:
        """Landmarks of several pictures.

        Args:
            images: (height, width, 3) each, RGB, of any size.
            boxes: where the face is, as far as known; None = it is searched for, and the largest face found is taken. So it is where
                a box cannot be one: its centre outside the picture, a side below `MIN_BOX_SIDE` or far larger than the picture.

        Returns:
            For each picture (68, 2), x and y in its pixels, integers at pixel centres, iBUG order; None where no face was found.
        """


def describe_source(name: str, *, weights: Path | None) -> dict[str, Any]:
    """JSON-able facts of a landmark source for the index: name, package version, sha256 of each weights file.

    Called once in the main process: it is here that weights are downloaded and that anything missing comes to light.

    Args:
        name: ``face-alignment`` or ``dlib``; ``shipped`` and ``none`` need nothing.
        weights: folder that holds the files of `WEIGHTS` under their own names. None: torch's hub folder, downloaded if need be, for
            face-alignment. For dlib the package face_recognition_models serves where the folder does not.

    Raises:
        ValueError: the source cannot be used here; the message says what to install, or which file to put where.
    """
    if name not in WEIGHTS:
        if weights is not None:
            raise ValueError(
                f"--landmark-weights {weights}: landmarks={name} needs no weights; leave it out, or say --landmarks face-alignment"
            )
        return {"name": name}
    _import(name)
    files = {path.name: _sha256_of(path) for path in _files(name, weights=weights).values()}
    return {"name": name, "version": importlib.metadata.version(name), "weights_sha256": files}


def open_landmarker(name: str, *, weights: Path | None) -> Landmarker | None:
    """Load what finds landmarks; None for ``shipped`` and ``none``.

    Raises:
        ValueError: see `describe_source`; or a file that is as published does not fit the package.
    """
    if name not in WEIGHTS:
        return None
    _import(name)
    files = _files(name, weights=weights)
    return FaceAlignmentLandmarker(files) if name == "face-alignment" else DlibLandmarker(files)


class FaceAlignmentLandmarker(Landmarker):
    """2D-FAN-4 (Bulat and Tzimiropoulos, ICCV 2017) as the package face-alignment runs it, in batches.

    It computes what the package's ``get_landmarks_from_image`` does with ``flip_input=True``, in float32 without TF32, on the first
    CUDA device if there is one. The same batch gives the same bits on the same machine and number of threads. Other batches, threads
    or devices change the heat maps in their last digits only; a landmark is the place of a maximum, so it moves where two places tie.

    Coordinates are whole pixels: the package maps the centre of a cell of the 64 x 64 heat map, a quarter of a cell towards the higher
    neighbour, to the picture, where pixel i spans i to i + 1, and cuts off the fraction. That is the pixel that holds the point, but for
    the square's edges, which it rounds down too: on average a point lies 0.5 - s / 512 pixels too far to the right and the bottom, s the
    side of the square (twice the face's). A cell is s / 64 pixels wide; this is kept, the network may have been trained with it.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Load the network; the face detector is loaded when a picture first needs it.

        Args:
            files: paths of ``network`` and ``detector``, see `WEIGHTS`.

        Raises:
            ValueError: the file is damaged, holds other things than tensors, or does not fit.
        """
        import torch
        from face_alignment.models import FAN

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = _load(lambda: FAN(4), files["network"], self._device)
        self._detector_file = files["detector"]
        self._detector: nn.Module | None = None

    def find(self, images: Sequence[npt.NDArray[np.uint8]], boxes: Sequence[Box | None]) -> list[npt.NDArray[np.float64] | None]:
        """See `Landmarker.find`."""
        from face_alignment.utils import get_preds_fromhm

        places = [
            _place(box if box is not None and _is_plausible(box, image) else self._search(image))
            for image, box in zip(images, boxes, strict=True)
        ]
        crops = [_crop(image, place) for image, place in zip(images, places, strict=True) if place is not None]
        maps = iter(self._heat_maps(crops))
        faces: list[npt.NDArray[np.float64] | None] = []
        for place in places:
            if place is None:
                faces.append(None)
                continue
            _, points, _ = get_preds_fromhm(next(maps)[None], place.center, place.scale)
            faces.append(points.reshape(68, 2).astype(np.float64))
        return faces

    def _heat_maps(self, crops: Sequence[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
        """(68, 64, 64) of each (256, 256, 3) crop: the sum over the crop and its mirror image, each from the last hourglass."""
        import torch
        from face_alignment.utils import flip

        for start in range(0, len(crops), NETWORK_BATCH):
            stack = np.stack(crops[start : start + NETWORK_BATCH]).transpose(0, 3, 1, 2).astype(np.float32) / 255.0
            with torch.inference_mode(), _exact_convolutions():
                batch = torch.from_numpy(stack).to(self._device)
                maps = self._network(batch)[-1]
                maps += flip(self._network(flip(batch))[-1], is_label=True)
            yield from maps.cpu().numpy()

    def _search(self, image: npt.NDArray[np.uint8]) -> Box | None:
        """The largest face that S3FD finds, in pixels of the picture."""
        import torch
        from face_alignment.detection.sfd.bbox import nms
        from face_alignment.detection.sfd.detect import get_predictions
        from face_alignment.detection.sfd.net_s3fd import s3fd

        if self._detector is None:
            self._detector = _load(s3fd, self._detector_file, self._device)
        small, factor = _reduced(image, DETECTOR_SIDE)
        lacking = [(0, max(0, _MIN_DETECTOR_SIDE - side)) for side in small.shape[:2]]
        padded = np.pad(small, [*lacking, (0, 0)])
        with torch.inference_mode(), _exact_convolutions():
            batch = torch.from_numpy(padded.transpose(2, 0, 1)[None].astype(np.float32)).to(self._device)
            batch = batch.flip(1) - torch.tensor(_DETECTOR_MEAN, device=self._device).view(1, 3, 1, 1)
            outputs = self._detector(batch)  # scores and boxes of six strides, in turns
        arrays = [(output.softmax(1) if i % 2 == 0 else output).cpu().numpy() for i, output in enumerate(outputs)]
        candidates = get_predictions(arrays, 1)[0]  # (n, 5): left, top, right, bottom, score
        kept = candidates[nms(candidates, _DETECTOR_OVERLAP)] if len(candidates) else []
        faces = [tuple(map(float, face)) for face in kept if face[4] > _MIN_DETECTOR_SCORE]
        if not faces:
            return None
        left, top, right, bottom, _ = max(faces, key=lambda face: ((face[2] - face[0]) * (face[3] - face[1]), face[4]))
        box = Box(left / factor, top / factor, right / factor, bottom / factor)
        return box if _is_plausible(box, image) else None


class DlibLandmarker(Landmarker):
    """dlib's ensemble of regression trees (Kazemi and Sullivan, CVPR 2014), trained on iBUG 300-W, and its HOG face detector.

    Runs on the CPU, one picture after the other; whole pixels, integers at pixel centres.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Load the predictor.

        Args:
            files: path of ``predictor``, see `WEIGHTS`.

        Raises:
            ValueError: dlib cannot read the file.
        """
        import dlib

        self._rectangle = dlib.rectangle
        self._detect = dlib.get_frontal_face_detector()
        try:
            self._predict = dlib.shape_predictor(str(files["predictor"]))
        except RuntimeError as error:
            raise ValueError(f"{files['predictor']}: dlib cannot read it: {error}") from error

    def find(self, images: Sequence[npt.NDArray[np.uint8]], boxes: Sequence[Box | None]) -> list[npt.NDArray[np.float64] | None]:
        """See `Landmarker.find`."""
        faces: list[npt.NDArray[np.float64] | None] = []
        for image, box in zip(images, boxes, strict=True):
            place = box if box is not None and _is_plausible(box, image) else self._search(image)
            if place is None:
                faces.append(None)
                continue
            shape = self._predict(np.ascontiguousarray(image), self._rectangle(*map(round, place)))
            faces.append(np.array([(point.x, point.y) for point in shape.parts()], np.float64))
        return faces

    def _search(self, image: npt.NDArray[np.uint8]) -> Box | None:
        """The largest face that the detector finds; where there is none, once more in the picture at twice its size."""
        small, factor = _reduced(image, HOG_SIDE)
        faces = self._detect(small, 0) or self._detect(small, 1)
        if not faces:
            return None
        face = max(faces, key=lambda face: int(face.area()))
        # dlib's right and bottom are the last pixels inside.
        edges = (face.left(), face.top(), face.right(), face.bottom())
        return Box(*((edge + 0.5) / factor - 0.5 for edge in edges))


class _Place(NamedTuple):
    """Where the network looks: a square of 200 ``scale`` pixels around ``center``."""

    center: npt.NDArray[np.float64]
    scale: float


def _place(box: Box | None) -> _Place | None:
    """The package's rule, from ``get_landmarks_from_image``: a little above the middle of the box, and about twice as large."""
    from face_alignment.utils import CENTER_Y_OFFSET, REFERENCE_SCALE

    if box is None:
        return None
    width, height = box.right - box.left, box.bottom - box.top
    center = np.array([box.right - width / 2.0, box.bottom - height / 2.0])
    center[1] = center[1] - height * CENTER_Y_OFFSET
    return _Place(center, (width + height) / REFERENCE_SCALE)


def _crop(image: npt.NDArray[np.uint8], place: _Place) -> npt.NDArray[np.uint8]:
    """(256, 256, 3), black where the square leaves the picture."""
    from face_alignment.utils import crop

    cropped: npt.NDArray[np.uint8] = crop(image, place.center, place.scale)
    return cropped


def _is_plausible(box: Box, image: npt.NDArray[np.uint8]) -> bool:
    """Whether a box can be that of a face in the picture; see `Landmarker.find`."""
    height, width = image.shape[:2]
    sides = (box.right - box.left, box.bottom - box.top)
    return (
        all(map(math.isfinite, box))
        and all(MIN_BOX_SIDE <= side <= 4 * max(height, width) for side in sides)
        and 0 <= (box.left + box.right) / 2 < width
        and 0 <= (box.top + box.bottom) / 2 < height
    )


def _reduced(image: npt.NDArray[np.uint8], side: int) -> tuple[npt.NDArray[np.uint8], float]:
    """The picture with its longer side at most ``side`` pixels, and by which factor it shrank."""
    height, width = image.shape[:2]
    factor = min(1.0, side / max(height, width))
    if factor == 1.0:
        return np.ascontiguousarray(image), 1.0
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), factor


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Full float32 and one fixed algorithm on CUDA, one thread on the CPU, in this context only.

    One thread: sums come out the same for any number of workers, and workers do not crowd each other out.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _load(build: Callable[[], nn.Module], path: Path, device: Any) -> nn.Module:
    import torch

    with torch.device("meta"):  # first weights would be drawn from the caller's random numbers, in vain
        network = build()
    try:
        network.load_state_dict(_tensors(path), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the network of the installed package: {error}") from error
    return network.requires_grad_(False).eval().float().to(device)


def _tensors(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, because it is damaged or holds other things than tensors, which could run code") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: the file is damaged: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors")
    return content


def _import(name: str) -> None:
    """See that the package is there and can be imported, with all it needs in turn."""
    package = _PACKAGES[name]
    alternatives = f"Other choices: {_others(name)}"
    if importlib.util.find_spec(package) is None:
        patience = "; it compiles for some minutes" if name == "dlib" else ""
        raise ValueError(f"landmarks={name} needs the package {name}: {install_command(_EXTRAS[name])}{patience}. {alternatives}")
    try:
        importlib.import_module(package)
    except ImportError as error:
        hint = ""
        if "libGL" in str(error):
            hint = " On a machine without a display: pip install --force-reinstall --no-deps opencv-python-headless."
        raise ValueError(
            f"landmarks={name}: the package {name} is installed but cannot be imported: {error}.{hint} {alternatives}"
        ) from error


def _others(name: str) -> str:
    return " or ".join(f"--landmarks {choice}" for choice in (*WEIGHTS, "none") if choice != name)


def _files(name: str, *, weights: Path | None) -> dict[str, Path]:
    """Find the files of a source, as published; download them where that is the package's way."""
    wanted = WEIGHTS[name]
    if name == "dlib":
        # Wherever it lies, it is the same file: its hash decides.
        own = {role: weights / file.name for role, file in wanted.items()} if weights is not None else {}
        paths = own if own and all(path.is_file() for path in own.values()) else _packaged(wanted, weights)
    elif weights is not None:
        missing = [file for file in wanted.values() if not (weights / file.name).is_file()]
        if missing:
            fault = "is no folder" if not weights.is_dir() else f"lacks {' and '.join(file.name for file in missing)}"
            urls = ", ".join(file.url for file in missing)
            raise ValueError(
                f"--landmark-weights {weights} {fault}. For landmarks={name} it must hold "
                f"{' and '.join(file.name for file in wanted.values())}; get {urls}. Other choices: {_others(name)}"
            )
        paths = {role: weights / file.name for role, file in wanted.items()}
    else:
        paths = {role: _hub_folder() / file.name for role, file in wanted.items()}
        for role, file in wanted.items():
            if not paths[role].is_file():
                _download(file, paths[role], name=name)
    for role, file in wanted.items():
        _check(paths[role], file, name=name)
    return paths


def _packaged(wanted: Mapping[str, WeightsFile], weights: Path | None) -> dict[str, Path]:
    """The files in the package face_recognition_models; importing that itself would need an old setuptools."""
    spec = importlib.util.find_spec("face_recognition_models")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        paths = {role: Path(place) / "models" / file.name for role, file in wanted.items()}
        if all(path.is_file() for path in paths.values()):
            return paths
    names, urls = " and ".join(file.name for file in wanted.values()), " and ".join(file.url for file in wanted.values())
    tried = f"; it is not in {weights}" if weights is not None else ""
    raise ValueError(
        f"landmarks=dlib needs {names}{tried}: pip install face_recognition_models; or get {urls}, unpack it and give its folder with "
        f"--landmark-weights DIR. Other choices: {_others('dlib')}"
    )


def _hub_folder() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _download(file: WeightsFile, path: Path, *, name: str) -> None:
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: what came has another hash
        files = WEIGHTS[name].values()
        names, urls = " and ".join(f.name for f in files), " and ".join(f.url for f in files)
        raise ValueError(
            f"landmarks={name} needs {names}, and {file.name} could not be downloaded ({type(error).__name__}: {error}). Where there is no "
            f"network, get {urls} elsewhere and put them into {path.parent} (TORCH_HOME moves that folder), or into a folder of your own "
            f"that you give with --landmark-weights DIR. Other choices: {_others(name)}"
        ) from error


def _check(path: Path, file: WeightsFile, *, name: str) -> None:
    sha256 = _sha256_of(path)
    if not sha256.startswith(file.sha256):
        raise ValueError(
            f"{path} is not the published {file.name}: its sha256 begins with {sha256[: len(file.sha256)]}, published is {file.sha256}. "
            f"It is damaged or another version: delete it and get {file.url}. Other choices: {_others(name)}"
        )


def _sha256_of(path: Path) -> str:
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, _size: int, _modified: int) -> str:
    """Hash a file once per process, unless it changes."""
    return file_sha256(path)
