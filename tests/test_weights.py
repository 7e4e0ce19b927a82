"""Initial weights: only what was asked for, whole, unharmed, and never executed."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bench import weights
from bench.backbone import BACKBONES
from bench.weights import (
    VGGFACE2_FILE,
    VGGFACE2_MEAN,
    ir50_from_ms1m,
    load_weights,
    published_weights,
    read_tensors,
    resnet50_from_vggface2,
    vggface2_weights,
    without_loading,
)

TINY = "test_resnet.r160_in1k"
"""The smallest network that timm publishes weights of."""


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def filled(module: nn.Module, value: float = 2.0) -> dict[str, torch.Tensor]:
    return {k: torch.full_like(v, value) for k, v in module.state_dict().items()}


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """Torch's folder of downloads, empty, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(weights, "hf_hub_download", unreachable)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# Files


@pytest.mark.parametrize(
    ("name", "wrapper"), [("w.safetensors", None), ("w.pth", None), ("w.pt", None), ("w.pth", "state_dict"), ("w.pth", "model")]
)
def test_a_file_of_tensors_fills_the_network(tmp_path, name, wrapper):
    module = net()
    path = tmp_path / name
    state = filled(module)
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    load_weights(module, str(path), timm_name=None)
    assert all((tensor == 2).all() for tensor in module.state_dict().values())


def test_random_leaves_the_network_alone():
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    load_weights(module, "random", timm_name=TINY)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_classifier_in_the_file_is_ignored(tmp_path):
    module = net()
    save_file({**filled(module), "fc.weight": torch.ones(7, 4), "head.bias": torch.ones(7)}, tmp_path / "w.safetensors")
    load_weights(module, str(tmp_path / "w.safetensors"), timm_name=None)
    assert (module[0].weight == 2).all()


def test_a_mismatch_lists_missing_unknown_and_misshapen_names_and_changes_nothing(tmp_path):
    module = net()
    before = module[0].bias.clone()
    state = filled(module)
    state["0.weight"] = torch.ones(4, 3, 3, 3)
    state["2.weight"] = state.pop("1.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"0\.weight has shape \(4, 3, 3, 3\), wanted \(4, 3, 1, 1\); missing 1\.weight; unknown 2\.weight"
    ):
        load_weights(module, str(tmp_path / "w.safetensors"), timm_name=None)
    assert torch.equal(module[0].bias, before)


def test_a_declared_gap_may_be_missing_as_a_whole_and_keeps_its_random_weights():
    module = net()
    before = module[1].weight.clone()
    weights.fit(module, {k: v for k, v in filled(module).items() if k.startswith("0.")}, source="x", fresh=("1.",))
    assert (module[0].weight == 2).all()
    assert torch.equal(module[1].weight, before)


def test_a_declared_gap_that_is_half_filled_is_an_error():
    module = net()
    state = filled(module)
    del state["1.bias"]
    with pytest.raises(ValueError, match=r"missing 1\.bias"):
        weights.fit(module, state, source="x", fresh=("1.",))


def test_nothing_but_the_declared_gap_may_be_missing():
    module = net()
    with pytest.raises(ValueError, match=r"missing 0\.bias; missing 0\.weight"):
        weights.fit(module, {}, source="x", fresh=("1.",))


def test_no_such_file_names_the_words_that_would_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file, and not one of 'random', 'imagenet', 'ms1m'"):
        load_weights(net(), str(tmp_path / "none.pth"), timm_name=TINY, sources={"ms1m": dict})


def test_a_misspelt_word_is_not_random():
    with pytest.raises(FileNotFoundError, match="'imagent': no such file"):
        load_weights(net(), "imagent", timm_name=TINY)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_an_error(tmp_path, name, harm):
    path = tmp_path / name
    save_file(filled(net()), path) if name.endswith("safetensors") else torch.save(filled(net()), path)
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[0] ^= 0xFF
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b"", "text": b"not weights" * 50}[harm])
    with pytest.raises(ValueError, match=r"damaged"):
        read_tensors(path)


FORMS = {
    "wrapper with epoch": lambda state: {"state_dict": state, "epoch": 3, "best_acc": 0.9},
    "model_state_dict and optimiser": lambda state: {
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "net": lambda state: {"net": state, "acc": 0.9},
    "numbers beside tensors": lambda state: {**state, "epoch": 3},
    "NumPy scalar beside tensors": lambda state: {"state_dict": state, "best_acc": np.float64(0.5), "history": np.ones(2)},
    "DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
    "two prefixes": lambda state: {"state_dict": {f"module.backbone.{k}": v for k, v in state.items()}},
    "prefix of the backbone alone": lambda state: {**{f"encoder.{k}": v for k, v in state.items()}, "fc.weight": torch.ones(8, 4)},
    "average beside": lambda state: {"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}},
    "half": lambda state: {k: v.half() for k, v in state.items()},
    "bfloat16": lambda state: {k: v.bfloat16() for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_a_usual_form_fills_the_network(tmp_path, form):
    module = net()
    torch.save(FORMS[form](filled(module)), tmp_path / "w.pth")
    load_weights(module, str(tmp_path / "w.pth"), timm_name=None)
    assert all((tensor == 2).all() for tensor in module.state_dict().values())
    assert module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["w.pth.tar", "w.ckpt", "w.model", "w.bin", "w"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_tells_the_format_and_not_the_ending(tmp_path, name, kind):
    module = net()
    state, path = filled(module), tmp_path / name
    save_file(state, path) if kind == "safetensors" else torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    load_weights(module, str(path), timm_name=None)
    assert (module[0].weight == 2).all()


def test_two_networks_that_fit_are_refused_by_their_places(tmp_path):
    module = net()
    student, teacher = filled(module), {k: v + 1 for k, v in filled(module).items()}
    path = tmp_path / "w.pth"
    torch.save({**{f"student.{k}": v for k, v in student.items()}, **{f"teacher.{k}": v for k, v in teacher.items()}}, path)
    with pytest.raises(ValueError, match=r"several networks that fit, with different tensors: 'student' and 'teacher'; .*--set"):
        load_weights(module, str(path), timm_name=None)


def test_the_same_tensors_twice_are_one_network(tmp_path):
    module = net()
    torch.save({"model": filled(module), "net": filled(module)}, tmp_path / "w.pth")
    load_weights(module, str(tmp_path / "w.pth"), timm_name=None)
    assert (module[0].weight == 2).all()


def test_a_file_of_another_network_shows_names_of_both_sides_and_the_setting(tmp_path):
    torch.save({"state_dict": {"module.a.weight": torch.ones(1), "module.b.weight": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError,
        match=r"The network has \d+ tensors \(0\.weight, .*the source has 2 tensors \(module\.a\.weight, .*--set 'backbones\.x\.weights=",
    ):
        load_weights(net(), str(tmp_path / "w.pth"), timm_name=None, key="backbones.x.weights")


def test_a_gap_below_a_prefix_is_listed_alone(tmp_path):
    module = net()
    state = {f"module.{k}": v for k, v in filled(module).items()}
    del state["module.0.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"do not fit the network: missing 0\.bias\. The network"):
        load_weights(module, str(tmp_path / "w.pth"), timm_name=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, value):
    module = net()
    before = module[0].weight.clone()
    state = filled(module)
    state["1.weight"][0] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth': tensor '1\.weight' holds NaN or infinity in 1 of its"):
        load_weights(module, str(tmp_path / "w.pth"), timm_name=None)
    assert torch.equal(module[0].weight, before)


def test_integers_in_place_of_weights_are_refused(tmp_path):
    module = net()
    torch.save({k: v.to(torch.int8) for k, v in filled(module).items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"0\.weight is of torch\.int8, wanted torch\.float32"):
        load_weights(module, str(tmp_path / "w.pth"), timm_name=None)


def test_an_object_that_needs_code_is_refused_by_its_class(tmp_path):
    torch.save({"state_dict": filled(net()), "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"refused, .* argparse\.Namespace; .*torch\.save\(network\.state_dict\(\)"):
        load_weights(net(), str(tmp_path / "w.pth"), timm_name=None)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind):
    mark, path = tmp_path / "executed", tmp_path / "w.pth"
    content = {"0.weight": torch.ones(1), "x": Payload(mark)}
    torch.save(content, path) if kind == "torch" else path.write_bytes(pickle.dumps({"x": Payload(mark)}))
    with pytest.raises(ValueError, match="refused"):
        load_weights(net(), str(path), timm_name=None)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload itself must work, or this test shows nothing"


def test_a_file_of_other_things_is_refused(tmp_path):
    torch.save({"0.weight": [1, 2]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="dictionary of tensors"):
        read_tensors(tmp_path / "w.pth")
    (tmp_path / "w.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a \.safetensors, \.pth or \.pt file"):
        read_tensors(tmp_path / "w.npz")


def test_without_loading_nothing_is_read():
    with without_loading():
        load_weights(net(), "/no/such/file.pth", timm_name=None)
    with pytest.raises(FileNotFoundError):
        load_weights(net(), "/no/such/file.pth", timm_name=None)


# Published weights


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A hub that has the tiny network; its cache names files by their hash, as the real one."""
    donor = timm.create_model(TINY.partition(".")[0], pretrained=False)
    blobs, snapshots = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshots.mkdir()
    save_file(donor.state_dict(), tmp_path / "file")
    blob = blobs / hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    (tmp_path / "file").rename(blob)
    (snapshots / "model.safetensors").symlink_to(blob)
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(snapshots / name)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return donor, blob, asked


def test_published_weights_come_whole_from_the_hub(on_hub):
    donor, _, asked = on_hub
    state = published_weights(TINY)
    assert asked == [(f"timm/{TINY}", "model.safetensors")]
    assert state.keys() == donor.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in donor.state_dict().items())


def test_a_network_is_filled_with_published_weights(on_hub):
    donor, *_ = on_hub
    module = timm.create_model("test_resnet", num_classes=0, global_pool="")
    load_weights(module, "imagenet", timm_name=TINY)
    assert torch.equal(module.layer4[0].conv1.weight, donor.layer4[0].conv1.weight)


def test_a_cached_file_with_another_hash_is_an_error(on_hub):
    _, blob, _ = on_hub
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1  # one bit of one weight: the file can be read
    blob.write_bytes(content)
    with pytest.raises(ValueError, match=rf"is damaged: its sha256 starts with [0-9a-f]+, published is {blob.name}; delete it"):
        published_weights(TINY)


def test_without_links_in_the_cache_the_hash_is_asked_for(on_hub, monkeypatch):
    _, blob, _ = on_hub
    plain = blob.parent.parent / "snapshots" / "model.safetensors"
    plain.unlink()
    plain.write_bytes(blob.read_bytes())
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda url: type("M", (), {"etag": blob.name}))
    assert published_weights(TINY)
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda url: type("M", (), {"etag": "0" * 64}))
    with pytest.raises(ValueError, match="damaged"):
        published_weights(TINY)


def test_an_unreachable_network_says_which_file_to_put_where(torch_home):
    with pytest.raises(FileNotFoundError) as caught:
        published_weights("resnet18.tv_in1k")
    message = str(caught.value)
    assert "https://huggingface.co/timm/resnet18.tv_in1k/resolve/main/model.safetensors" in message
    assert f"put https://download.pytorch.org/models/resnet18-f37072fd.pth into {torch_home}" in message
    assert "ConnectionError" in message


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "inceptionv3", "timm:test_resnet", "timm:test_vit"])
def test_a_backbone_whose_weights_are_out_of_reach_is_an_error_and_not_random(torch_home, name):
    target = BACKBONES.get(name).target
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        target.build(target.Options(weights="imagenet"), image_size=64)


def test_a_file_put_into_torchs_folder_is_checked_against_the_hash_in_its_name(torch_home):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged: its sha256 starts with [0-9a-f]{8}, published is f37072fd"):
        published_weights("resnet18.tv_in1k")


def test_a_file_in_torchs_folder_with_the_right_hash_is_used(torch_home, monkeypatch):
    donor = timm.create_model("test_resnet", pretrained=False)
    path = torch_home / "tiny.pth"
    torch.save(donor.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path.rename(torch_home / f"tiny-{digest}.pth")
    cfg = timm.get_pretrained_cfg(TINY)
    monkeypatch.setattr(cfg, "url", f"https://example.org/tiny-{digest}.pth")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    assert torch.equal(published_weights(TINY)["conv1.0.weight"], donor.conv1[0].weight)


def test_a_network_without_published_weights_says_so():
    with pytest.raises(ValueError, match=r"no published weights for this network; use 'random', or the path of a file"):
        load_weights(net(), "imagenet", timm_name=None)


# IR-50 of face.evoLVe


def test_ir50_units_go_to_their_stages():
    state = {"input_layer.0.weight": torch.tensor(-1.0), "output_layer.0.weight": torch.tensor(-2.0)}
    state |= {f"body.{n}.res_layer.1.weight": torch.tensor(float(n)) for n in range(24)}
    mapped = ir50_from_ms1m(state)
    assert mapped.pop("input_layer.0.weight") == -1
    flat = [(0, n) for n in range(3)] + [(1, n) for n in range(4)] + [(2, n) for n in range(14)]
    assert {k: int(v) for k, v in mapped.items()} == {f"body.{s}.{u}.res_layer.1.weight": n for n, (s, u) in enumerate(flat)}


def test_a_file_that_is_not_ir50_is_refused():
    with pytest.raises(ValueError, match=r"'conv1\.weight' is not a tensor of face\.evoLVe's IR-50"):
        ir50_from_ms1m({"conv1.weight": torch.ones(1)})


def test_ms1m_says_where_to_put_its_file(torch_home):
    with pytest.raises(FileNotFoundError, match=rf"Get backbone_ir50_ms1m_epoch120\.pth from .*face\.evoLVe.* put it into {torch_home}"):
        weights.ms1m_weights()


def test_ms1m_reads_its_file(torch_home):
    torch.save({"body.3.res_layer.0.bias": torch.ones(2)}, torch_home / weights.MS1M_FILE)
    assert list(weights.ms1m_weights()) == ["body.1.0.res_layer.0.bias"]


# VGGFace2


def keras_arrays(generator: np.random.Generator, *, width: int = 4) -> dict[str, np.ndarray]:
    """Names as in keras-vggface's ResNet-50; small arrays."""
    arrays: dict[str, np.ndarray] = {}

    def layer(name: str, side: int, inputs: int) -> None:
        arrays[f"{name}/kernel:0"] = generator.standard_normal((side, side, inputs, width)).astype(np.float32)
        for part in ("gamma", "beta", "moving_mean"):
            arrays[f"{name}/bn/{part}:0"] = generator.standard_normal(width).astype(np.float32)
        arrays[f"{name}/bn/moving_variance:0"] = generator.random(width).astype(np.float32)

    layer("conv1/7x7_s2", 7, 3)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(1, blocks + 1):
            layer(f"conv{stage}_{block}_1x1_reduce", 1, width)
            layer(f"conv{stage}_{block}_3x3", 3, width)
            layer(f"conv{stage}_{block}_1x1_increase", 1, width)
            if block == 1:
                layer(f"conv{stage}_1_1x1_proj", 1, width)
    return arrays


def test_the_conversion_has_every_name_of_timms_resnet50():
    ours = {k for k in timm.create_model("resnet50", num_classes=0).state_dict() if not k.endswith("num_batches_tracked")}
    assert resnet50_from_vggface2(keras_arrays(np.random.default_rng(0))).keys() == ours


def test_a_converted_convolution_computes_what_keras_computes_on_bgr_pictures():
    rng = np.random.default_rng(1)
    arrays = keras_arrays(rng)
    state = resnet50_from_vggface2(arrays)
    conv, norm = nn.Conv2d(3, 4, 7, bias=False).double(), nn.BatchNorm2d(4).double().eval()
    conv.load_state_dict({"weight": state["conv1.weight"]})
    norm.load_state_dict({k: state[f"bn1.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}, strict=False)
    rgb = rng.standard_normal((7, 7, 3))
    kernel, bn = arrays["conv1/7x7_s2/kernel:0"], {k: arrays[f"conv1/7x7_s2/bn/{k}:0"] for k in ("gamma", "beta", "moving_mean")}
    plain = [sum(rgb[y, x, 2 - c] * kernel[y, x, c, o] for y in range(7) for x in range(7) for c in range(3)) for o in range(4)]
    wanted = (np.array(plain) - bn["moving_mean"]) / np.sqrt(arrays["conv1/7x7_s2/bn/moving_variance:0"] + 1e-3) * bn["gamma"] + bn["beta"]
    with torch.no_grad():
        output = norm(conv(torch.from_numpy(rgb).permute(2, 0, 1)[None]))[0, :, 0, 0]
    np.testing.assert_allclose(output.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_keras_weights_of_another_network_are_refused_by_name():
    arrays = keras_arrays(np.random.default_rng(0))
    arrays["conv6/kernel:0"] = arrays.pop("conv1/7x7_s2/kernel:0")
    with pytest.raises(ValueError, match=r"missing conv1/7x7_s2/kernel; unknown conv6/kernel \(2 in all\)"):
        resnet50_from_vggface2(arrays)


def test_the_keras_file_is_read_as_keras_writes_it(torch_home):
    h5py = pytest.importorskip("h5py")
    arrays = keras_arrays(np.random.default_rng(2))
    layers: dict[str, list[str]] = {}
    for name in arrays:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    with h5py.File(torch_home / VGGFACE2_FILE, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in ("input_1", *layers)]
        file.create_group("input_1").attrs["weight_names"] = np.array([], dtype="S1")
        for layer, names in layers.items():
            group = file.require_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                group.create_dataset(name, data=arrays[name])
    state = vggface2_weights()
    wanted = resnet50_from_vggface2(arrays)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[k], v) for k, v in wanted.items())


def test_a_file_that_is_no_keras_file_is_an_error(torch_home):
    pytest.importorskip("h5py")
    (torch_home / VGGFACE2_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="damaged, or no file of Keras weights"):
        vggface2_weights()


def test_vggface2_says_where_to_put_its_file(torch_home):
    target = BACKBONES.get("resnet50").target
    with pytest.raises(FileNotFoundError, match=rf"Get {VGGFACE2_FILE} from https://github\.com/rcmalli/.* and put it into {torch_home}"):
        target.build(target.Options(weights="vggface2"), image_size=64)


def test_only_resnet50_has_vggface2():
    target = BACKBONES.get("resnet18").target
    with pytest.raises(FileNotFoundError, match=r"'vggface2': no such file, and not one of 'random', 'imagenet'$"):
        target.build(target.Options(weights="vggface2"), image_size=64)


def test_pictures_are_normalised_as_the_weights_want():
    target = BACKBONES.get("resnet50").target

    def build(**options: str):
        with torch.device("meta"), without_loading():
            return target.build(target.Options(**options), image_size=64)

    face = build(weights="vggface2")
    picture = torch.tensor([10.0, 100.0, 200.0]) / 255
    normalised = (picture - torch.tensor(face.mean)) / torch.tensor(face.std)
    torch.testing.assert_close(normalised, torch.tensor([10 - 131.0912, 100 - 103.8827, 200 - 91.4953]))
    assert build(weights="imagenet").mean == build(weights="random").mean == (0.485, 0.456, 0.406)
    assert build(weights="own.pth", normalization="vggface2").mean == VGGFACE2_MEAN
    assert (build(normalization="none").mean, build(normalization="none").std) == ((0, 0, 0), (1, 1, 1))
