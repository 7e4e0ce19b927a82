"""ADL against the published code (tests/golden/official_ADL.npz) and against a loop over samples and places."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bench.backbone import BACKBONES, Backbone, Features
from bench.backbones.inception import InceptionV3
from bench.backbones.vgg import VGG16
from bench.evaluation.maps import min_max
from bench.method import METHODS, Batch
from bench.methods import adl
from bench.methods.adl import ADL, TAPPED, attention_dropout, shift_pretrained
from bench.methods.cam import CAM
from bench.training.guidance import layer_attention
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ("paper", "official")


def published_name(name: str) -> str:
    """The dropout layers of the published code take positions 1 of layer3 and 1 and 4 of layer4."""
    if not name.startswith("backbone."):
        return name.replace("head.", "classification_head/fc.")
    parts = name.removeprefix("backbone.net.").split(".")
    if parts[0] in ("layer3", "layer4") and parts[1] != "0":
        parts[1] = str(int(parts[1]) + 1)
    return "encoder/" + ".".join(parts)


def build(name, *, variant, adl_options=None, **options):
    torch.manual_seed(0)
    target = BACKBONES.get(name).target
    backbone = target.build(target.Options(**options), image_size=32)
    method = ADL(ADL.Options(**(adl_options or {})), variant=variant)
    return method, method.classifier(backbone, num_classes=7)


def tiny_batch(count=6):
    labels = torch.arange(count) % 7
    return Batch(
        positions=torch.arange(count),
        seeds=torch.arange(count),
        images=pictures("tiny", count=count, size=32),
        labels=labels,
        au_maps=torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(0)),
        au_valid=labels != 0,
    )


def test_logits_attentions_and_both_maps_are_the_published_ones():
    golden = np.load(GOLDEN / "official_ADL.npz", allow_pickle=False)
    target = BACKBONES.get("resnet50").target
    backbone = target.build(target.Options(), image_size=224)
    method = ADL(ADL.Options(), variant="official")
    classifier = method.classifier(backbone, num_classes=7)
    fill(classifier, published_name, gain=0.7)
    classifier.eval()
    labels = torch.from_numpy(golden["labels"])
    with torch.inference_mode():
        output = classifier(pictures("images", count=3, size=224))
        official = method.maps(classifier, output, labels)
        paper = ADL(ADL.Options(), variant="paper").maps(classifier, output, labels)
    torch.testing.assert_close(output.logits, torch.from_numpy(golden["logits"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(official, torch.from_numpy(golden["maps_raw"]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(min_max(official), torch.from_numpy(golden["maps"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(min_max(paper), torch.from_numpy(golden["maps_paper"]), rtol=0, atol=1e-4)
    for layer in range(1, 6):
        expected = torch.from_numpy(golden[f"attention_layer{layer}"])
        torch.testing.assert_close(layer_attention(output.layers[layer]), expected, rtol=0, atol=1e-5)


@given(
    count=st.integers(1, 4),
    side=st.integers(1, 5),
    threshold=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    drop=st.booleans(),
    negative=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_layer_is_that_of_a_loop_over_places(count, side, threshold, drop, negative, seed):
    features = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    features = features if negative else features.relu()
    result = attention_dropout(features, drop=drop, threshold=threshold)
    for i in range(count):
        means = [[sum(features[i, c, y, x].item() for c in range(3)) / 3 for x in range(side)] for y in range(side)]
        largest = max(max(row) for row in means)
        for y in range(side):
            for x in range(side):
                if drop and math.isclose(means[y][x], threshold * largest, rel_tol=1e-5, abs_tol=1e-7):
                    continue  # the order of the sum decides
                factor = float(means[y][x] < threshold * largest) if drop else 1 / (1 + math.exp(-means[y][x]))
                torch.testing.assert_close(result[i, :, y, x], features[i, :, y, x] * factor)


def test_the_peak_of_every_sample_is_hidden():
    features = torch.rand(5, 4, 6, 6)
    hidden = attention_dropout(features, drop=True, threshold=0.9)
    peaks = features.mean(dim=1).flatten(1).argmax(dim=1)
    assert (hidden.flatten(2)[torch.arange(5), :, peaks] == 0).all()
    assert (hidden != 0).any()


def test_gradient_flows_through_the_importance_map_and_not_through_the_mask():
    features = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: attention_dropout(f, drop=False, threshold=0.9), features)
    hidden = attention_dropout(features, drop=True, threshold=0.9)
    hidden.sum().backward()
    assert torch.equal(features.grad, (hidden != 0).double())


@pytest.mark.parametrize(
    ("name", "points"),
    [("resnet50", ((4, 0), (5, 0), (5, 2))), ("resnet18", ((4, 0), (5, 0), (5, 1))), ("mini", ((4, 0), (5, 0)))],
)
def test_the_layers_stand_after_the_first_blocks_of_two_stages_and_the_last_block(name, points):
    target = BACKBONES.get(name).target
    with torch.device("meta"):
        backbone = target.build(target.Options(), image_size=32)
    assert backbone.attention_points() == points


def test_features_in_training_are_those_of_the_layers_written_out():
    """Draws in order of the layers, each one for the whole batch; what guidance sees comes after the last of them."""
    _, classifier = build("resnet18", variant="paper")
    plain = copy.deepcopy(classifier.backbone.net)
    for block in plain.modules():
        block._forward_hooks.clear()
    classifier.train()
    images = pictures("tiny", count=4, size=32)
    torch.manual_seed(5)
    draws = [bool(torch.rand(()) >= 0.25) for _ in range(3)]
    assert len(set(draws)) == 2, "both kinds occur"
    torch.manual_seed(5)
    output = classifier(images)

    def layer(x, draw):
        return attention_dropout(x, drop=draw, threshold=0.9)

    x = plain.layer2(plain.layer1(plain.maxpool(plain.act1(plain.bn1(plain.conv1(images))))))
    x = plain.layer3[1](layer(plain.layer3[0](x), draws[0]))
    torch.testing.assert_close(output.layers[4], x)
    x = layer(plain.layer4[1](layer(plain.layer4[0](x), draws[1])), draws[2])
    torch.testing.assert_close(output.layers[5], x)
    torch.testing.assert_close(output.logits, classifier.head(x.mean(dim=(2, 3))))


def test_drop_rate_is_the_share_of_passes_that_hide():
    torch.manual_seed(0)
    block = torch.nn.Identity()
    figures = adl._Figures(drop_rate=0.75, threshold=0.9)
    features = torch.ones(1, 1, 2, 2)
    hidden = sum(bool((adl._dropout_hook(block, (), features, figures=figures, site=0) == 0).all()) for _ in range(2000))
    assert abs(hidden / 2000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_drop_rate_of_zero_or_one_is_certain(rate):
    figures = adl._Figures(drop_rate=rate, threshold=0.9)
    features = torch.ones(1, 1, 2, 2)
    for _ in range(200):
        assert bool((adl._dropout_hook(torch.nn.Identity(), (), features, figures=figures, site=0) == 0).all()) == bool(rate)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_dropped_in_evaluation(variant):
    _, classifier = build("mini", variant=variant, width=8)
    cam = CAM(CAM.Options(), variant="paper")
    torch.manual_seed(1)
    target = BACKBONES.get("mini").target
    plain = cam.classifier(target.build(target.Options(width=8), image_size=32), num_classes=7)
    plain.load_state_dict(classifier.state_dict())  # strict: the names are those of CAM
    images = pictures("tiny", count=3, size=32)
    with torch.inference_mode():
        expected, output = plain.eval()(images), classifier.eval()(images)
    assert torch.equal(output.logits, expected.logits)
    assert all(torch.equal(output.layers[layer], expected.layers[layer]) for layer in range(1, 6))


def test_official_weighs_the_second_block_and_paper_the_last():
    method, classifier = build("resnet50", variant="official")
    classifier.eval()
    images = pictures("tiny", count=2, size=32)
    classes = torch.tensor([1, 4])
    with torch.inference_mode():
        output = classifier(images)
        before = output.layers[4]
        first, second, third = classifier.backbone.blocks(5)
        features = second(first(before))
        torch.testing.assert_close(output.extras[TAPPED], features)
        torch.testing.assert_close(third(features), output.layers[5])
        maps = method.maps(classifier, output, classes)
        paper = ADL(ADL.Options(), variant="paper").maps(classifier, output, classes)
        for i, c in enumerate(classes.tolist()):
            for got, used in ((maps, features), (paper, output.layers[5])):
                expected = sum(w.item() * a for w, a in zip(classifier.head.weight[c], used[i], strict=True))
                torch.testing.assert_close(got[i], expected, rtol=1e-3, atol=1e-4)


def test_one_block_a_stage_leaves_official_no_other_block_to_show():
    _, classifier = build("mini", variant="official", width=8)
    with torch.inference_mode():
        output = classifier.eval()(pictures("tiny", count=2, size=32))
    assert torch.equal(output.extras[TAPPED], output.layers[5])


class TestPretrained:
    @pytest.fixture
    def weights(self, tmp_path):
        """A file of weights of a ResNet-50 in which every tensor of a block is filled with 10 * stage + index of the block."""
        target = BACKBONES.get("resnet50").target
        state = target.build(target.Options(), image_size=32).net.state_dict()
        for name, value in state.items():
            if name.startswith("layer") and not name.endswith("num_batches_tracked"):
                stage, index = name.split(".")[:2]
                value.fill_(10 * int(stage[5]) + int(index))
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")

    def seen(self, classifier, stage):
        return [block.conv1.weight.unique().tolist() for block in classifier.backbone.blocks(stage + 1)]

    def test_official_puts_them_into_shifted_blocks(self, weights):
        _, classifier = build("resnet50", variant="official", weights=weights)
        three, four = self.seen(classifier, 3), self.seen(classifier, 4)
        assert three[:5] == [[30], [32], [33], [34], [35]]
        assert four[:2] == [[40], [42]]
        assert self.seen(classifier, 2) == [[20], [21], [22], [23]]
        for block in (classifier.backbone.blocks(4)[5], classifier.backbone.blocks(5)[2]):
            for conv in (block.conv1, block.conv2, block.conv3):
                fan_out = conv.out_channels * conv.kernel_size[0] ** 2
                assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
            for norm in (block.bn1, block.bn2, block.bn3):
                assert (norm.weight == 1).all()
                assert (norm.bias == 0).all()
                assert (norm.running_mean == 0).all()
                assert (norm.running_var == 1).all()

    def test_paper_puts_them_where_they_belong(self, weights):
        _, classifier = build("resnet50", variant="paper", weights=weights)
        assert self.seen(classifier, 3) == [[30], [31], [32], [33], [34], [35]]
        assert self.seen(classifier, 4) == [[40], [41], [42]]

    def test_a_network_that_starts_at_random_is_left_alone(self):
        target = BACKBONES.get("resnet18").target
        backbone = target.build(target.Options(), image_size=32)
        before = copy.deepcopy(backbone.state_dict())
        ADL(ADL.Options(), variant="official").classifier(backbone, num_classes=7)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    def test_one_block_a_stage_has_nothing_to_shift(self):
        target = BACKBONES.get("mini").target
        backbone = target.build(target.Options(width=8), image_size=32)
        before = copy.deepcopy(backbone.state_dict())
        shift_pretrained(backbone)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(("target", "size"), [(VGG16, 32), (InceptionV3, 75)])
def test_networks_with_named_blocks_have_neither_fault(target, size):
    backbone = target.build(target.Options(), image_size=size)
    backbone.pretrained = True
    before = copy.deepcopy(backbone.state_dict())
    method = ADL(ADL.Options(), variant="official")
    classifier = method.classifier(backbone, num_classes=7).eval()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    images, classes = torch.rand(2, 3, size, size), torch.tensor([1, 4])
    with torch.inference_mode():
        output = classifier(images)
        maps = method.maps(classifier, output, classes)
        paper = ADL(ADL.Options(), variant="paper").maps(classifier, output, classes)
    assert torch.equal(maps, paper)


@pytest.mark.parametrize(("target", "size"), [(VGG16, 32), (InceptionV3, 75)])
def test_all_layers_of_other_networks_act_in_training(target, size, monkeypatch):
    backbone = target.build(target.Options(), image_size=size)
    classifier = ADL(ADL.Options(), variant="paper").classifier(backbone, num_classes=7).train()
    seen = []
    monkeypatch.setattr(adl, "attention_dropout", lambda features, **_: seen.append(features) or features)
    with torch.no_grad():
        classifier(torch.rand(2, 3, size, size))
    assert len(seen) == len(backbone.attention_points()) == 3


def test_a_network_without_blocks_is_refused_with_what_to_do():
    class Whole(Backbone):
        def __init__(self):
            super().__init__()
            self.channels = {1: 4, 2: 4}

        @classmethod
        def build(cls, options, *, image_size):
            return cls()

        def forward(self, images):
            return Features(layers={1: images, 2: images})

    with pytest.raises(ValueError, match=r"not made of blocks.*--backbones resnet50"):
        ADL(ADL.Options(), variant="paper").classifier(Whole(), num_classes=7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_it_trains_and_explains(variant, rate):
    method, classifier = build("mini", variant=variant, adl_options={"drop_rate": rate, "threshold": 0.9}, width=8)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(5,))).train()
    batch = method.mix(tiny_batch())
    task(batch, guided_share(int(batch.au_valid.sum()), parts=1))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    classifier.zero_grad()
    with torch.inference_mode():
        maps = method.maps(classifier.eval(), classifier(batch.images), batch.labels)
    assert maps.shape == (6, 4, 4)
    assert all(p.grad is None for p in classifier.parameters())


def test_a_copy_of_the_classifier_taps_its_own_block():
    _, classifier = build("mini", variant="official", width=8)
    twin = copy.deepcopy(classifier).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
        output = twin(pictures("tiny", count=1, size=32))
    assert output.extras[TAPPED].abs().sum() > 0


def test_it_is_registered():
    assert METHODS.get("adl").target is ADL
