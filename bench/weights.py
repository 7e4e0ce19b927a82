"""Initial weights of a backbone: random, published, or from a file. Never a silent fall-back, never a pickle.

A file may be wrapped (``{"state_dict": ..., "epoch": 3}``), and its names may share a prefix (``module.``). Both are undone
where there is exactly one way that fits the network. Nothing is guessed beyond that.

Downloads go through timm's sources: the Hugging Face hub, then torch's own hub. Whatever comes from there, or lies in
their caches, is compared with its published SHA-256 each time, so that a damaged file is an error and not a bad result.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from bench.io import file_sha256

State = dict[str, Tensor]

VGGFACE2_FILE = "rcmalli_vggface_tf_notop_resnet50.h5"
VGGFACE2_URL = f"https://github.com/rcmalli/keras-vggface/releases/download/v2.0/{VGGFACE2_FILE}"
VGGFACE2_MEAN = (131.0912 / 255, 103.8827 / 255, 91.4953 / 255)
"""RGB, for pictures in [0, 1]: the network was trained on 0..255 with the mean subtracted and no scaling."""
VGGFACE2_STD = (1 / 255, 1 / 255, 1 / 255)
MS1M_FILE = "backbone_ir50_ms1m_epoch120.pth"
MS1M_SOURCE = "the model zoo of face.evoLVe, IR-50 trained on MS-Celeb-1M"

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "backbone")
"""Keys under which training scripts keep the network itself, and not its average or its optimiser."""
HEADS = ("fc", "head", "heads", "head_dist", "classifier", "logits", "last_linear")
"""Names that training scripts give a classifier; ignored in files of networks that have no such part."""

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
    sources: Mapping[str, Callable[[], State]] | None = None,
    dropped: tuple[str, ...] = (),
    fresh: tuple[str, ...] = (),
    rename: Callable[[State], State] | None = None,
    timm_options: Mapping[str, Any] | None = None,
    key: str = "backbones.NAME.weights",
) -> None:
    """Fill ``net`` in place.

    Args:
        net: the network, without classifier.
        weights: ``random`` (leave as initialised), ``imagenet`` (timm's published weights of ``timm_name``), a key of
            ``sources``, or a path of a file of tensors (safetensors or PyTorch, whatever its ending). Classifier weights in
            it are ignored; a wrapper or a common prefix is undone where exactly one way fits.
        timm_name: timm model name with its pretrained tag; None where no published weights exist.
        sources: further names of weights -> function that reads them.
        dropped: prefixes of tensors of the published network that ``net`` does not have; ignored.
        fresh: prefixes of modules of ``net`` that the published network does not have: a source may lack one of them
            altogether, which then keeps its random weights. Nothing else may be missing.
        rename: from the names of the source to those of ``net``; sees the source without ``dropped`` and classifier.
        timm_options: arguments of timm's model (``img_size``) the published weights are to be adapted to.
        key: the setting that ``weights`` comes from, dotted; for messages.

    Raises:
        FileNotFoundError: the file is not there, or the published weights cannot be downloaded; says what to do.
        ValueError: the file is damaged or would need code; its tensors do not fit, in which case missing, unknown and
            misshapen names are listed; several of its networks fit; or a tensor holds NaN or infinity.
    """
    sources = sources or {}
    if weights == "random" or not _loading.get():
        return

    ignored = (*ignored_heads(net, timm_name=timm_name), *dropped)

    def prepare(state: State) -> State:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(ignored)}
        return rename(state) if rename else state

    if weights in sources:
        fit(net, prepare(sources[weights]()), source=weights, fresh=fresh)
    elif weights == "imagenet":
        if timm_name is None:
            known = " or ".join(repr(name) for name in ("random", *sources))
            raise ValueError(f"weights = 'imagenet': no published weights for this network; use {known}, or the path of a file")
        fit(net, prepare(published_weights(timm_name, **(timm_options or {}))), source=weights, fresh=fresh)
    else:
        tables = read_tables(Path(weights), names=("random", *(("imagenet",) if timm_name else ()), *sources))
        _fit_file(net, tables, prepare=prepare, source=weights, fresh=fresh, key=key)


def ignored_heads(net: nn.Module, *, timm_name: str | None) -> tuple[str, ...]:
    """Prefixes of classifier tensors in a file: timm's, and those of `HEADS` that no part of ``net`` is called.

    timm's feature networks write ``head_norm`` for ``head.norm``, or have all their names below ``model`` or ``body``.
    """
    published = timm.models.get_pretrained_cfg_value(timm_name, "classifier") if timm_name else None
    names = [name.removeprefix("model.").removeprefix("body.").replace(".", "_") for name in net.state_dict()]
    foreign = [head for head in HEADS if not any(name.startswith(f"{head}_") for name in names)]
    return tuple(f"{name}." for name in (*([published] if isinstance(published, str) else published or ()), *foreign))


def _fit_file(
    net: nn.Module, tables: Mapping[str, State], *, prepare: Callable[[State], State], source: str, fresh: tuple[str, ...], key: str
) -> None:
    """`fit` with the one table and prefix of a file that fit the network.

    Args:
        net: the network, without classifier.
        tables: see `read_tables`.
        prepare: from names without prefix to those of ``net``.
        source: see `fit`.
        fresh: see `load_weights`.
        key: see `load_weights`.

    Raises:
        ValueError: none fits, or more than one with different tensors.
    """
    wanted = net.state_dict()
    ways: list[tuple[int, str, str, State]] = []
    for where, table in tables.items():
        for prefix in _prefixes(table, count=_count(wanted) // 2):
            state = prepare({name.removeprefix(prefix): tensor for name, tensor in table.items() if name.startswith(prefix)})
            ways.append((len(_problems(wanted, state, fresh=fresh)), where, prefix, state))
    clean = _different([way for way in ways if not way[0]], names=wanted.keys())
    # An average or a teacher beside the network, under a name of its own, does not make the network itself ambiguous.
    usual = [way for way in clean if way[1].rpartition(".")[2] in ("", *WRAPPERS)]
    chosen = usual if usual else clean
    if len(chosen) > 1:
        places = " and ".join(
            repr(".".join(filter(None, (where, prefix))).rstrip(".") or "the file itself") for _, where, prefix, _ in chosen
        )
        raise ValueError(
            f"weights {source!r} hold several networks that fit, with different tensors: {places}; "
            f"save one of them alone and --set '{key}=/path/to/it'"
        )
    nearest = max(ways, key=lambda way: (len(wanted.keys() & way[3].keys()), -way[0]))
    _, where, _, state = chosen[0] if chosen else nearest
    fit(net, state, source=source, fresh=fresh, given=tables[where], key=key)


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(not name.endswith("num_batches_tracked") for name in state)


def _prefixes(table: State, *, count: int) -> list[str]:
    """The empty prefix, and the dotted ones that at least ``count`` names have."""
    seen: Counter[str] = Counter()
    for name in table:
        if not name.endswith("num_batches_tracked"):
            parts = name.split(".")
            seen.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 5)))
    return ["", *(prefix for prefix, number in seen.items() if number >= max(count, 1))]


def _different(ways: list[tuple[int, str, str, State]], *, names: Iterable[str]) -> list[tuple[int, str, str, State]]:
    """The ways without those that give the same tensors as an earlier one."""
    kept: list[tuple[int, str, str, State]] = []
    for way in ways:
        if not any(all(_same(earlier[3].get(name), way[3].get(name)) for name in names) for earlier in kept):
            kept.append(way)
    return kept


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


def _problems(wanted: State, state: State, *, fresh: tuple[str, ...]) -> list[str]:
    """What keeps a state dict from filling the network whose state dict is ``wanted``, a phrase each."""
    absent = tuple(prefix for prefix in fresh if not any(name.startswith(prefix) for name in state))
    missing = [name for name in wanted.keys() - state.keys() if not name.startswith(absent)]
    problems = [f"missing {name}" for name in missing if not name.endswith("num_batches_tracked")]
    problems += [f"unknown {name}" for name in state.keys() - wanted.keys()]
    for name in wanted.keys() & state.keys():
        if state[name].shape != wanted[name].shape:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}")
        elif wanted[name].is_floating_point() and not state[name].is_floating_point():
            problems.append(f"{name} is of {state[name].dtype}, wanted {wanted[name].dtype}")
    return problems


def fit(
    net: nn.Module,
    state: State,
    *,
    source: str,
    fresh: tuple[str, ...] = (),
    given: State | None = None,
    key: str = "backbones.NAME.weights",
) -> None:
    """Load a state dict in which nothing may be missing, unknown or of another shape, or not finite.

    Numbers of other widths (float16, bfloat16, float64) are cast to those of the network.

    Args:
        net: filled in place, or left as it is.
        state: names of ``net`` -> tensors.
        source: what the message calls the origin: a word or the path of a file.
        fresh: see `load_weights`.
        given: the tensors under the names that the source has; for the message.
        key: see `load_weights`.

    Raises:
        ValueError: it does not fit; lists the first names and counts the others, and shows names of both sides.
    """
    wanted = net.state_dict()
    problems = _problems(wanted, state, fresh=fresh)
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        sides = f"The network has {_sample(wanted)}; the source has {_sample(state if given is None else given)}"
        advice = f"give a file of this network, or random weights: --set '{key}=random'"
        raise ValueError(f"weights {source!r} do not fit the network: {shown}. {sides}; {advice}")
    cast = {name: tensor.to(wanted[name].dtype) for name, tensor in state.items()}
    for name, tensor in cast.items():
        # Before the cast too: NaN becomes some integer in a counter. After it: a large float64 becomes infinite.
        bad = int((~(state[name].isfinite() & tensor.isfinite())).sum())
        if bad:
            raise ValueError(
                f"weights {source!r}: tensor {name!r} holds NaN or infinity in {bad} of its {tensor.numel()} values, so that no loss "
                f"would be finite; give a file saved before the training diverged: --set '{key}=/path/to/it'"
            )
    net.load_state_dict({**wanted, **cast})


def _sample(state: Mapping[str, Tensor]) -> str:
    """Number of names, and a few of them."""
    names = list(state)
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


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
    actual = file_sha256(path)
    if not actual.startswith(expected):
        actual = actual[: len(expected)]
        raise ValueError(f"{path.resolve()} is damaged: its sha256 starts with {actual}, published is {expected}; delete it and run again")


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


def read_tensors(path: Path) -> State:
    """Read the tensors of a file that holds one network: those under a name of `WRAPPERS`, otherwise the largest table.

    Raises:
        FileNotFoundError: see `read_tables`.
        ValueError: see `read_tables`.
    """
    tables = read_tables(path)
    wrapped = [wrapper for wrapper in WRAPPERS if wrapper in tables]
    return tables[wrapped[0] if wrapped else max(tables, key=lambda where: len(tables[where]))]


def read_tables(path: Path, *, names: tuple[str, ...] = ()) -> dict[str, State]:
    """Read every table of tensors in a safetensors or PyTorch file; the content tells which it is, whatever the ending.

    Numbers, words and NumPy values beside the tensors are passed over. Nothing in the file is executed.

    Args:
        path: the file.
        names: words that could have stood in its place; for the message.

    Returns:
        Where in the file, as dotted keys (empty for the top level) -> name -> tensor. At least one table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds no tensors, or holds objects that only code of their own could make.
    """
    if not path.is_file():
        words = f", and not one of {', '.join(map(repr, names))}" if names else ""
        raise FileNotFoundError(f"weights = {str(path)!r}: no such file{words}")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights = {str(path)!r}: the file is damaged: {error}") from error
    else:
        content = _unpickled(path)
    tables = dict(_tables(content))
    if not tables:
        held = (
            f"a dictionary of {', '.join(map(repr, list(content)[:6])) or 'nothing'}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise ValueError(f"weights = {str(path)!r}: expected a dictionary of tensors by name, found {held}; {_SAVE}")
    return tables


_SAVE = "save the tensors alone, where the network can be loaded: torch.save(network.state_dict(), 'weights.pth')"
_CLASS = re.compile(r"GLOBAL ([\w.]+)")


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors do: the length of a JSON header, and its brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


class _PassedOver:
    """Stands in for a NumPy value beside the tensors: NumPy itself never sees what the file says."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_PASSED_OVER: list[Any] = [
    *((_PassedOver, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((_PassedOver, name) for name in ("numpy.dtype", "numpy.ndarray", "_codecs.encode")),
]


def _unpickled(path: Path) -> Any:
    """What a PyTorch file holds, made by torch's restricted reader, which knows tensors and plain values only."""
    try:
        with torch.serialization.safe_globals(_PASSED_OVER):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = _CLASS.search(str(error))
        if match is None:
            reason = "it is damaged or holds other things than tensors, which could run code: expected a .safetensors, .pth or .pt file"
        else:
            reason = f"it holds other things than tensors, which could run code: {match[1]}"
        raise ValueError(f"weights = {str(path)!r}: refused, because {reason}; {_SAVE}") from error
    except Exception as error:
        # The restricted reader raises whatever the bytes of a damaged file lead it to.
        raise ValueError(
            f"weights = {str(path)!r}: the file is damaged, or of another kind: expected a .safetensors, .pth or .pt file: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _tables(content: object, where: tuple[str, ...] = ()) -> Iterator[tuple[str, State]]:
    if not isinstance(content, dict) or len(where) > 3:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield ".".join(where), tensors
    for name, value in content.items():
        yield from _tables(value, (*where, str(name)))


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
            own, published = f"layer{stage}.{block}", f"conv{stage + 1}_{block + 1}"
            for number, part in enumerate(("1x1_reduce", "3x3", "1x1_increase"), start=1):
                wanted[f"{published}_{part}"] = (f"{own}.conv{number}", f"{own}.bn{number}")
            if block == 0:
                wanted[f"{published}_1x1_proj"] = (f"{own}.downsample.0", f"{own}.downsample.1")
    left = {name.removesuffix(":0"): array for name, array in arrays.items()}
    state: State = {}
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in left:
            missing.append(name)
            return torch.empty(0)
        return torch.from_numpy(np.ascontiguousarray(left.pop(name), dtype=np.float32))

    for published, (conv, norm) in wanted.items():
        kernel = take(f"{published}/kernel")
        state[f"{conv}.weight"] = kernel.permute(3, 2, 0, 1).contiguous() if kernel.ndim == 4 else kernel
        state[f"{norm}.weight"] = take(f"{published}/bn/gamma")
        state[f"{norm}.bias"] = take(f"{published}/bn/beta")
        state[f"{norm}.running_mean"] = take(f"{published}/bn/moving_mean")
        state[f"{norm}.running_var"] = take(f"{published}/bn/moving_variance") + (1e-3 - 1e-5)
    problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in left]
    if problems:
        raise ValueError(f"these are not the weights of keras-vggface's ResNet-50: {'; '.join(problems[:6])} ({len(problems)} in all)")
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    return state
