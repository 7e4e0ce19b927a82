"""The family ``timm:NAME``: any network of timm."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file

from bench import weights
from bench.backbone import BACKBONES, Backbone
from bench.backbones import timm_any
from bench.backbones.timm_any import TimmPlainViT
from bench.config import ConfigError, join_key, load_settings, split_key
from bench.method import METHODS
from bench.registry import EntryInfo, EntryOptions, Member, Registry, UnknownEntryError
from bench.training.build import build_classifier


def build(name: str, *, image_size: int = 64, **options: object):
    target = BACKBONES.get(name).target
    return target.build(target.Options(**options), image_size=image_size)


NEW_TIMM = pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older timm refuses it elsewhere")


# Networks

NETWORKS = {
    # name -> (height at 64 pixels, channels) of every layer
    "timm:test_resnet": [(32, 32), (16, 32), (8, 48), (4, 192), (2, 96)],
    "timm:resnet18.a1_in1k": [(32, 64), (16, 64), (8, 128), (4, 256), (2, 512)],
    "timm:convnext_atto": [(16, 40), (8, 80), (4, 160), (2, 320)],
    "timm:mobilenetv3_small_050": [(32, 16), (16, 8), (8, 16), (4, 24), (2, 288)],
    "timm:swin_tiny_patch4_window7_224": [(16, 96), (8, 192), (4, 384), (2, 768)],
    "timm:hiera_tiny_224": [(16, 96), (8, 192), (4, 384), (2, 768)],
    "timm:pit_ti_224": [(7, 64), (4, 128), (2, 256)],
    "timm:hrnet_w18_small": [(32, 64), (16, 128), (8, 256), (4, 512), (2, 1024)],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("timm:hrnet_w18_small", "timm:hiera_tiny_224") else []) for name in NETWORKS],
)
def test_layers_are_the_features_of_timm_finest_first(name):
    entry = BACKBONES.get(name)
    assert entry.info.kind == "cnn"
    assert entry.info.guided_layers == (len(NETWORKS[name]),)
    with torch.device("meta"), torch.no_grad():
        backbone = build(name)
        layers = backbone(torch.empty(2, 3, 64, 64)).layers
    assert [(layers[n].shape[2], layers[n].shape[1]) for n in sorted(layers)] == NETWORKS[name]
    assert list(backbone.channels.values()) == [channels for _, channels in NETWORKS[name]]
    assert backbone.last == len(NETWORKS[name])


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:pit_ti_224"])
def test_a_step_gives_every_trainable_parameter_a_gradient(name):
    method = METHODS.get("cam").target
    classifier = method(method.Options(), variant="paper").classifier(build(name), num_classes=7)
    classifier(torch.randn(2, 3, 64, 64)).logits.square().sum().backward()
    assert [n for n, p in classifier.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_network_with_channels_last_is_turned_around():
    backbone = build("timm:swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw, layers = backbone.net(images), backbone(images).layers
    assert raw[-1].shape == (1, 2, 2, 768)
    assert torch.equal(layers[4][0, :, 1, 0], raw[-1][0, 1, 0])


def test_the_same_name_is_the_same_entry_and_other_names_are_others():
    assert BACKBONES.get("timm:test_resnet") is BACKBONES.get("timm:test_resnet")
    assert BACKBONES.get("timm:test_resnet").target is not BACKBONES.get("timm:convnext_atto").target


def test_pictures_are_normalised_as_timm_says():
    with torch.device("meta"):
        assert build("timm:test_resnet").mean == (0.5, 0.5, 0.5)
        assert build("timm:convnext_atto").mean == (0.485, 0.456, 0.406)


def test_a_smaller_output_stride_makes_larger_maps():
    with torch.device("meta"), torch.no_grad():
        layers = build("timm:resnet18", output_stride=8)(torch.empty(1, 3, 64, 64)).layers
    assert [layers[n].shape[2] for n in (3, 4, 5)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param(
            "timm:swin_tiny_patch4_window7_224",
            {"output_stride": 8},
            r"cannot be built for or run on such pictures with {'output_stride': 8}",
            marks=NEW_TIMM,
        ),
        pytest.param("timm:crossvit_tiny_240", {}, r"images\.size = 64: timm network 'crossvit_tiny_240' cannot be built", marks=NEW_TIMM),
    ],
)
def test_what_a_network_cannot_do_is_an_error_when_planning(name, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build(name, **options)


@pytest.mark.parametrize("name", ["mixer_s16_224", "xcit_nano_12_p16_224"])
def test_a_network_with_maps_of_one_size_is_refused_and_others_are_named(name):
    with pytest.raises(ValueError, match=rf"{name}.* has no maps of several sizes .*deit-small"):
        BACKBONES.get(f"timm:{name}")


def test_a_plain_vision_transformer_is_read_like_deit():
    entry = BACKBONES.get("timm:test_vit")
    assert (entry.info.kind, entry.info.guided_layers) == ("vit", (1,))
    backbone = build("timm:test_vit").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = backbone.net.forward_features(images)
        layers = backbone(images).layers
    torch.testing.assert_close(layers[1], tokens[:, 1:].transpose(1, 2).unflatten(-1, (4, 4)), rtol=1e-4, atol=1e-5)
    assert layers[2].shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_siglip_224", "it has no class token"),
        ("vit_base_patch16_xp_224", r"its blocks are of another kind \(ParallelScalingBlock\)"),
        ("mixer_s16_224", "it is a MlpMixer"),
    ],
)
def test_a_refused_transformer_is_told_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        BACKBONES.get(f"timm:{name}")


@pytest.mark.parametrize(("name", "size"), [("deit_tiny_distilled_patch16_224", 64), ("vit_small_patch14_reg4_dinov2", 56)])
def test_registers_and_a_distillation_token_are_no_patches(name, size):
    backbone = build(f"timm:{name}", image_size=size).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = backbone.net.forward_features(images)
        layers = backbone(images).layers
    assert backbone.prefix == backbone.net.num_prefix_tokens > 1
    torch.testing.assert_close(layers[1], tokens[:, backbone.prefix :].transpose(1, 2).unflatten(-1, (4, 4)), rtol=1e-4, atol=1e-5)
    assert layers[2].shape == (2, 1, 4, 4)


@pytest.mark.parametrize("name", ["tscam", "rollout", "legrad"])
def test_maps_of_a_transformer_with_a_distillation_token_are_on_the_grid_of_patches(name):
    target = METHODS.get(name).target
    method = target(target.Options(), variant="paper")
    classifier = method.classifier(build("timm:deit_tiny_distilled_patch16_224"), num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    output = dataclasses.replace(classifier(images), images=images)
    assert method.maps(classifier, output, torch.tensor([0, 1])).shape == (2, 4, 4)


def test_a_size_that_patches_do_not_tile_is_an_error():
    with pytest.raises(ValueError, match=r"images\.size = 60 is not a multiple of the patch side 16; --set images\.size=64"):
        build("timm:test_vit", image_size=60)


# Names


def test_a_mistyped_network_gets_proposals():
    with pytest.raises(UnknownEntryError, match=r"timm has no network 'convnext_tinny'\. Did you mean 'timm:convnext_tiny'"):
        BACKBONES.get("timm:convnext_tinny")


def test_a_tag_that_does_not_exist_is_told_which_do():
    with pytest.raises(UnknownEntryError, match=r"no pretrained tag 'x' of resnet18; .*timm:resnet18\.tv_in1k"):
        BACKBONES.get("timm:resnet18.x")


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(UnknownEntryError, match=r"unknown backbone 'tim:resnet18'\..* timm:NAME,"):
        BACKBONES.get("tim:resnet18")


def test_the_family_is_listed_as_such_and_is_in_no_all(bench_here, tmp_path):
    listed = json.loads(bench_here("list", "backbones", "--format", "json", cwd=tmp_path).stdout)
    family = next(entry for entry in listed if entry["name"] == "timm:NAME")
    assert {"weights", "output_stride", "drop_path"} <= set(family["options"])
    BACKBONES.get("timm:test_resnet")
    assert not [entry.name for entry in BACKBONES if ":" in entry.name]
    assert not [name for name in BACKBONES.names() if ":" in name]


# Weights


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_resnet",
        "timm:hiera_tiny_224",
        pytest.param("timm:convnext_atto", marks=pytest.mark.slow),
        pytest.param("timm:swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ],
)
def test_a_file_with_the_whole_network_fills_its_features(tmp_path, name):
    architecture = name.partition(":")[2]
    donor = timm.create_model(architecture, **({"img_size": 64} if "224" in name else {})).eval()
    with torch.no_grad():
        for parameter in donor.parameters():  # fresh scales of residual branches may be zero, which would hide what they scale
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    backbone = build(name, weights=str(tmp_path / "w.safetensors")).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, wanted = donor.forward_intermediates(images, norm=False)
        last = backbone(images).layers[backbone.last]
    torch.testing.assert_close(last, wanted[-1], rtol=1e-4, atol=1e-5)


def test_a_file_of_another_network_is_refused_by_name(tmp_path):
    save_file({"stem_0.weight": torch.ones(1), "nonsense": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"do not fit the network: missing bn1\.bias; .* and \d+ more"):
        build("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))


def test_a_refusal_names_the_setting_to_change(tmp_path):
    save_file({"nonsense": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"--set 'backbones\.timm:test_resnet\.weights=random'"):
        build("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("architecture", ["lcnet_050", "mnasnet_small", "mobilenetv3_small_050", "resnet10t"])
def test_a_fine_tuned_network_computes_the_same_whatever_its_classifier_is_called(tmp_path, architecture):
    donor = timm.create_model(architecture, num_classes=8).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}, "epoch": 3}, tmp_path / "w.pth.tar")
    backbone = build(f"timm:{architecture}", weights=str(tmp_path / "w.pth.tar")).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = donor.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(backbone(images).layers[backbone.last], wanted[-1], rtol=0, atol=0)


def misfits(architecture: str, *, num_classes: int) -> list[str]:
    """What of timm's own state dict does not fit our network of the same name; on the meta device."""
    try:
        target = BACKBONES.get(f"timm:{architecture}").target
    except ValueError:
        return []  # refused when planning
    with torch.device("meta"):
        whole = timm.create_model(architecture, num_classes=num_classes)
        if issubclass(target, TimmPlainViT):
            net, rename = timm.create_model(architecture, num_classes=0), None
        else:
            net = timm.create_model(architecture, features_only=True)
            rename = timm_any._renaming(net, architecture=architecture, arguments={})
    ignored = weights.ignored_heads(net, timm_name=target.published)
    state = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(ignored)}
    return weights._problems(net.state_dict(), rename(state) if rename else state, fresh=())


@pytest.mark.parametrize("num_classes", [0, 8])
@pytest.mark.parametrize(
    "architecture", ["efficientnet_b6", "inception_v4", "vit_tiny_patch16_224", "mobilenetv4_conv_small", "pit_ti_224"]
)
def test_timms_own_state_dict_fits_our_network(architecture, num_classes):
    assert misfits(architecture, num_classes=num_classes) == []


@pytest.mark.slow
def test_the_state_dicts_of_networks_all_over_timm_fit_ours():
    # Every 25th: all 1,371 of timm 1.0 take a quarter of an hour, and fitted when they were last tried.
    assert {name: differences for name in timm.list_models()[::25] if (differences := misfits(name, num_classes=8))} == {}


# Settings

TABLE = '[run]\nbackbones = ["timm:resnet18.a1_in1k"]\n[backbones."timm:resnet18.a1_in1k"]\noutput_stride = 16\n'


def test_a_table_of_a_name_with_dots_survives(tmp_path):
    (tmp_path / "own.toml").write_text(TABLE)
    settings = load_settings(file=tmp_path / "own.toml", environ={})
    assert settings.config.backbones == {"timm:resnet18.a1_in1k": {"output_stride": 16}}
    assert settings.origin('backbones."timm:resnet18.a1_in1k".output_stride').text == str(tmp_path / "own.toml")


def test_a_setting_of_a_name_with_dots_can_be_given_on_the_command_line(tmp_path):
    (tmp_path / "own.toml").write_text(TABLE)
    given = 'backbones."timm:resnet18.a1_in1k".output_stride=8'
    settings = load_settings(file=tmp_path / "own.toml", sets=[given], environ={})
    assert settings.config.backbones == {"timm:resnet18.a1_in1k": {"output_stride": 8}}
    assert settings.origin('backbones."timm:resnet18.a1_in1k".output_stride').text == f"--set {given}"


@pytest.mark.parametrize("parts", [("a",), ("a", "b"), ("backbones", "timm:resnet50.a1_in1k", "weights"), ("a.b", "c"), ("a", "b.c.d")])
def test_keys_are_joined_and_split_without_loss(parts):
    assert split_key(join_key(*parts)) == list(parts)


@pytest.mark.parametrize("key", ["", "a..b", ".a", "a.", '"a', 'a"b"', '""'])
def test_a_key_that_cannot_be_split_is_an_error(key):
    with pytest.raises(ConfigError, match="separate its parts by dots"):
        split_key(key)


def plan(go_settings: dict[str, object]):
    from bench.sweep.plan import make_plan

    return make_plan(load_settings(environ={}, flags=go_settings))


@pytest.fixture
def settings(project, monkeypatch):
    monkeypatch.chdir(project)
    return {"images.size": 64, "run.guidance": ("au",), "run.methods": ("cam",)}


def test_a_run_with_a_timm_network_is_planned_and_guides_its_last_layer(settings):
    planned = plan({**settings, "run.backbones": ("timm:test_resnet", "timm:convnext_atto"), 'backbones."timm:test_resnet".drop_path': 0.1})
    layers = {training.backbone: training.settings["guidance"]["layers"] for training, _ in planned.matrix.trainings}
    assert layers == {"timm:test_resnet": [5], "timm:convnext_atto": [4]}
    options = {training.backbone: training.backbone_options["drop_path"] for training, _ in planned.matrix.trainings}
    assert options == {"timm:test_resnet": 0.1, "timm:convnext_atto": 0}
    assert isinstance(build_classifier(planned.matrix.trainings[0].training, num_classes=7).backbone, Backbone)


def test_an_unknown_timm_name_is_an_error_with_its_origin(settings):
    with pytest.raises(ConfigError, match=r"--backbones: timm has no network 'resnet5o'\. Did you mean 'timm:resnet50'"):
        plan({**settings, "run.backbones": ("timm:resnet5o",)})


def test_an_option_that_timm_networks_do_not_have_is_an_error(settings):
    with pytest.raises(ConfigError, match=r"backbone 'timm:test_resnet' has no option 'large_maps'"):
        plan({**settings, "run.backbones": ("timm:test_resnet",), "backbones.timm:test_resnet.large_maps": True})


def test_a_table_of_a_mistyped_timm_name_is_an_error(settings):
    with pytest.raises(ConfigError, match=r"\[backbones\.timm:resnet5o\]: timm has no network 'resnet5o'"):
        plan({**settings, "run.backbones": ("timm:test_resnet",), "backbones.timm:resnet5o.drop_path": 0.1})


def test_a_run_with_a_timm_network_trains_and_evaluates(go):
    outcome = go(run__methods=("cam",), run__guidance=("none",), run__backbones=("timm:test_resnet.r160_in1k",), train__epochs=1)
    assert not outcome.failed
    assert [cell.training.backbone for cell in outcome.ran] == ["timm:test_resnet.r160_in1k"]


# Families of any registry


class Thing:
    Options = EntryOptions


def things() -> Registry[Thing, EntryInfo]:
    return Registry("thing", group="bench.no_such_group", base=lambda: Thing, info=EntryInfo)


def test_members_take_the_data_of_the_family_but_for_what_they_say():
    registry = things()

    @registry.register_family("lamp", title="any lamp", year=2020)
    class Lamps(Thing):
        @classmethod
        def member(cls, name: str) -> Member[Thing]:
            return Member(target=type(name, (cls,), {}), info={"title": f"lamp {name}"})

    entry = registry.get("lamp:desk")
    assert (entry.name, entry.info.title, entry.info.year) == ("lamp:desk", "lamp desk", 2020)
    assert issubclass(entry.target, Lamps)
    assert [e.name for e in registry.families()] == ["lamp:NAME"]
    assert registry.names() == ()


def test_a_family_without_members_is_refused():
    with pytest.raises(TypeError, match="no class method 'member'"):
        things().register_family("lamp", title="any lamp")(Thing)


def test_two_families_with_one_prefix_are_refused():
    registry = things()

    class One(Thing):
        @classmethod
        def member(cls, name: str) -> Member[Thing]:
            raise NotImplementedError

    class Two(One):
        pass

    registry.register_family("lamp", title="any lamp")(One)
    with pytest.raises(ValueError, match="defined twice"):
        registry.register_family("lamp", title="any lamp")(Two)
