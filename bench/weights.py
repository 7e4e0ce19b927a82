"""Initial weights of a backbone: random, published, or from a file. Never a silent fall-back, never a pickle.

Downloads go through timm's sources: the Hugging Face hub, then torch's own hub. Whatever comes from there, or lies in
their caches, is compared with its published SHA-256 each time, so that a damaged file is an error and not a bad result.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.extras import install_command

State = dict[str, Tensor]

VGGFACE2_FILE = "rcmalli_vggface_tf_notop_resnet50.h5"
VGGFACE2_URL = f"https://github.com/rcmalli/keras-vggface/releases/download/v2.0/{VGGFACE2_FILE}"
VGGFACE2_MEAN = (131.0912 / 255, 103.8827 / 255, 91.4953 / 255)
"""RGB, for pictures in [0, 1]: the network was trained on 0..255 with the mean subtracted and no scaling."""
VGGFACE2_STD = (1 / 255, 1 / 255, 1 / 255)
MS1M_FILE = "backbone_ir50_ms1m_epoch120.pth"
MS1M_SOURCE = "the model zoo of face.evoLVe, IR-50 trained on MS-Celeb-1M"

_loading: ContextVar[bool] = ContextVar("loading", default=True)


@contextlib.contextmanager
def without_loading() -> Iterator[None]:
    """Networks built in this context keep their random weights whatever their options say: trained ones are put in next.

    All else that follows from the options (normalisation, shapes) stays as it is with the weights.
    """
    token = _loading.set(False)
    try:
        yield
    finally:
        _loading.reset(token)


def load_weights(
    net: nn.Module,
    weights: str,
    *,
    timm_name: str | None,
    others: Mapping[str, Callable[[], State]] | None = None,
    dropped: tuple[str, ...] = (),
    fresh: tuple[str, ...] = (),
    rename: Callable[[State], State] | None = None,
    timm_options: Mapping[str, Any] | None = None,
) -> None:
    """Fill ``net`` in place.

    Args:
        net: the network, without classifier.
        weights: ``random`` (leave as initialised), ``imagenet`` (timm's published weights of ``timm_name``), a key of
            ``others``, or a path of a ``.safetensors``, ``.pth`` or ``.pt`` file of tensors; classifier weights in it
            are ignored.
        timm_name: timm model name with its pretrained tag; None where no published weights exist.
        others: further names of weights -> what reads them.
        dropped: prefixes of tensors of the published network that ``net`` does not have; ignored.
        fresh: prefixes of modules of ``net`` that the published network does not have: a source may lack one of them
            altogether, which then keeps its random weights. Nothing else may be missing.
        rename: from the names of the source to those of ``net``; sees the source without ``dropped`` and classifier.
        timm_options: arguments of timm's model (``img_size``) the published weights are to be adapted to.

    Raises:
        FileNotFoundError: the file is not there, or the published weights cannot be downloaded; says what to do.
        ValueError: the file is damaged, holds other things than tensors, or its tensors do not fit: every missing,
            unknown and misshapen name is listed.
    """
    others = others or {}
    if weights == "random" or not _loading.get():
        return
    if weights in others:
        state = others[weights]()
    elif weights != "imagenet":
        state = read_tensors(Path(weights), names=("random", *(("imagenet",) if timm_name else ()), *others))
    elif timm_name is None:
        known = " or ".join(repr(name) for name in ("random", *others))
        raise ValueError(f"weights = 'imagenet': no published weights for this network; use {known}, or the path of a file")
    else:
        state = published_weights(timm_name, **(timm_options or {}))
    classifier = timm.models.get_pretrained_cfg_value(timm_name, "classifier") if timm_name else None
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or ["fc", "head"]))
    state = {name: tensor for name, tensor in state.items() if not name.startswith((*heads, *dropped))}
    fit(net, rename(state) if rename else state, source=weights, fresh=fresh)


def fit(net: nn.Module, state: State, *, source: str, fresh: tuple[str, ...] = ()) -> None:
    """Load a state dict in which nothing may be missing, unknown or of another shape; see `load_weights` for ``fresh``.

    Raises:
        ValueError: it does not fit; lists the first names and counts the others.
    """
    wanted = net.state_dict()
    absent = tuple(prefix for prefix in fresh if not any(name.startswith(prefix) for name in state))
    missing = [name for name in wanted.keys() - state.keys() if not name.startswith(absent)]
    problems = [f"missing {name}" for name in missing if not name.endswith("num_batches_tracked")]
    problems += [f"unknown {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights {source!r} do not fit the network: {shown}")
    net.load_state_dict({**wanted, **state})


def published_weights(timm_name: str, **options: Any) -> State:
    """The whole state dict of a timm model with its published weights, classifier included.

    Args:
        timm_name: name with pretrained tag.
        options: arguments of the model; timm adapts the weights to them (position embeddings to ``img_size``).

    Raises:
        FileNotFoundError: neither cached nor within reach; says which file to get and how to name it.
        ValueError: the file differs from what was published.
    """
    state = read_tensors(_published_file(timm_name))
    # All classes and strict: timm drops what does not fit without a word only where the classifier differs.
    donor: nn.Module = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **options)
    return dict(donor.state_dict())


def _published_file(timm_name: str) -> Path:
    cfg: Any = timm.get_pretrained_cfg(timm_name)
    url: str | None = cfg.url if _HASH_IN_NAME.search(cfg.url or "") else None
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url or "").path).name
    reasons, advice = [], []
    if url and kept.is_file():
        return _from_url(url, kept)
    if cfg.hf_hub_id:
        name = cfg.hf_hub_filename or "model.safetensors"
        try:
            return _from_hub(cfg.hf_hub_id, name)
        except _UNREACHABLE as error:
            reasons.append(f"Hugging Face hub: {type(error).__name__}")
            advice.append(
                f"get https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{name} and --set backbones.NAME.weights=/path/to/{name}"
            )
    if url:
        try:
            return _from_url(url, kept)
        except _UNREACHABLE as error:
            reasons.append(f"{urlparse(url).hostname}: {type(error).__name__}")
            advice.append(f"put {url} into {kept.parent} under its own name")
    if not reasons:
        raise FileNotFoundError(f"timm publishes no weights with a checksum for {timm_name}; get them yourself and give the file's path")
    raise FileNotFoundError(
        f"the published weights {timm_name} are not on this machine and cannot be downloaded ({'; '.join(reasons)}). "
        f"Where there is no network, {', or '.join(advice)}; or train from scratch with weights = 'random'"
    )


_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
# Libraries of HTTP clients come and go below both hubs; what they raise derives from one of these or has them as a base.
_UNREACHABLE = (OSError, RuntimeError)


def _from_hub(repository: str, name: str) -> Path:
    path = Path(hf_hub_download(repository, name))
    # The hub's cache names the content of large files by their SHA-256, which is their ETag.
    expected = path.resolve().name
    if not re.fullmatch("[0-9a-f]{64}", expected):
        expected = str(get_hf_file_metadata(hf_hub_url(repository, name)).etag)
    check_sha256(path, expected)
    return path


def _from_url(url: str, path: Path) -> Path:
    match = _HASH_IN_NAME.search(url)
    assert match is not None
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    check_sha256(path, match[1])
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file with its SHA-256, or the first digits of it.

    Raises:
        ValueError: they differ.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        found = found[: len(expected)]
        raise ValueError(f"{path.resolve()} is damaged: its sha256 starts with {found}, published is {expected}; delete it and run again")


def stored_file(name: str, *, source: str) -> Path:
    """A file of weights that cannot be downloaded by rule (licence, no checksum) and that the user puts in torch's folder.

    Raises:
        FileNotFoundError: it is not there; says where to get it and where to put it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. Get {name} from {source}, and put it into {path.parent} (TORCH_HOME moves that folder)"
        )
    return path


def read_tensors(path: Path, *, names: tuple[str, ...] = ()) -> State:
    """Read a ``.safetensors``, ``.pth`` or ``.pt`` file of tensors, unwrapping ``state_dict`` or ``model``.

    Args:
        path: the file.
        names: words that could have stood in its place; for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds anything but tensors. Nothing in it is executed.
    """
    if not path.is_file():
        words = f", and not one of {', '.join(map(repr, names))}" if names else ""
        raise FileNotFoundError(f"weights = {str(path)!r}: no such file{words}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights = {str(path)!r}: the file is damaged: {error}") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(f"weights = {str(path)!r}: expected a .safetensors, .pth or .pt file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights = {str(path)!r}: refused, because it is damaged or holds other things than tensors, which could run code; "
            f"save its state dict alone, best as .safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"weights = {str(path)!r}: the file is damaged: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights = {str(path)!r}: expected a dictionary of tensors")
    return content


def ms1m_weights() -> State:
    """APViT's IR-50, pretrained on MS-Celeb-1M, from `MS1M_FILE` in torch's folder.

    Raises:
        FileNotFoundError: the file is not there; says where to put it.
        ValueError: the file is not that one.
    """
    return ir50_from_ms1m(read_tensors(stored_file(MS1M_FILE, source=MS1M_SOURCE)))


def ir50_from_ms1m(state: Mapping[str, Tensor]) -> State:
    """Names of face.evoLVe's IR-50 -> those of APViT's extractor.

    ``input_layer.*`` keeps its name; unit ``body.N`` becomes ``body.STAGE.UNIT``: 0-2, 3-6 and 7-20 are the three stages
    that APViT has. The fourth stage and ``output_layer`` are left out.

    Raises:
        ValueError: a name that IR-50 does not have.
    """
    mapped: State = {}
    for name, tensor in state.items():
        top, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if top == "input_layer":
            mapped[name] = tensor
        elif top == "body" and number.isdecimal() and int(number) < 24:
            unit = int(number)
            stage = sum(unit >= first for first in (3, 7, 21))
            if stage < 3:
                mapped[f"body.{stage}.{unit - (0, 3, 7)[stage]}.{inner}"] = tensor
        elif top != "output_layer":
            raise ValueError(f"{name!r} is not a tensor of face.evoLVe's IR-50")
    return mapped


def vggface2_weights() -> State:
    """ResNet-50 pretrained on VGGFace2, from `VGGFACE2_FILE` (Keras) in torch's folder.

    Raises:
        FileNotFoundError: the file is not there; says where to get it and where to put it.
        ValueError: h5py is not installed, or the file is not that one.
    """
    path = stored_file(VGGFACE2_FILE, source=VGGFACE2_URL)
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"weights = 'vggface2' is a Keras file and needs h5py: {install_command('vggface2')}") from error
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    try:
        with h5py.File(path) as file:
            root = file.get("model_weights", file)
            for layer in map(_text, root.attrs["layer_names"]):
                for weight in map(_text, root[layer].attrs["weight_names"]):
                    arrays[weight] = root[layer][weight][()]
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or no file of Keras weights: {error}") from error
    return resnet50_from_vggface2(arrays)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def resnet50_from_vggface2(arrays: Mapping[str, np.ndarray[Any, Any]]) -> State:
    """Weights of keras-vggface's ResNet-50 (name -> array) -> a timm ResNet-50 that computes the same on RGB pictures.

    Three things differ, and each is mended here: kernels are stored (h, w, in, out); the network wants BGR, so the first
    convolution's input channels are reversed; its batch norm adds 1e-3 to the variance, where timm adds 1e-5, so the
    difference goes into the running variance. (The published FER converter does none of the last two, and swaps height
    and width of the kernels.) The stride of stages 2 to 4 stays where timm has it, on the 3 x 3 convolution.

    Raises:
        ValueError: a name that this network does not have, or one that is missing.
    """
    wanted = {"conv1/7x7_s2": ("conv1", "bn1")}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            ours, theirs = f"layer{stage}.{block}", f"conv{stage + 1}_{block + 1}"
            for number, part in enumerate(("1x1_reduce", "3x3", "1x1_increase"), start=1):
                wanted[f"{theirs}_{part}"] = (f"{ours}.conv{number}", f"{ours}.bn{number}")
            if block == 0:
                wanted[f"{theirs}_1x1_proj"] = (f"{ours}.downsample.0", f"{ours}.downsample.1")
    left = {name.removesuffix(":0"): array for name, array in arrays.items()}
    state: State = {}
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in left:
            missing.append(name)
            return torch.empty(0)
        return torch.from_numpy(np.ascontiguousarray(left.pop(name), dtype=np.float32))

    for theirs, (conv, norm) in wanted.items():
        kernel = take(f"{theirs}/kernel")
        state[f"{conv}.weight"] = kernel.permute(3, 2, 0, 1).contiguous() if kernel.ndim == 4 else kernel
        state[f"{norm}.weight"] = take(f"{theirs}/bn/gamma")
        state[f"{norm}.bias"] = take(f"{theirs}/bn/beta")
        state[f"{norm}.running_mean"] = take(f"{theirs}/bn/moving_mean")
        state[f"{norm}.running_var"] = take(f"{theirs}/bn/moving_variance") + (1e-3 - 1e-5)
    problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in left]
    if problems:
        raise ValueError(f"these are not the weights of keras-vggface's ResNet-50: {'; '.join(problems[:6])} ({len(problems)} in all)")
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    return state
