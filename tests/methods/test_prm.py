"""PRM against the published figures, and peak back-propagation against a slow walk over every position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from bench.backbone import BACKBONES, Backbone, Features
from bench.backbones.mini import MiniResNet
from bench.backbones.resnet import ResNet50
from bench.evaluation.maps import min_max
from bench.method import Batch
from bench.methods.prm import PRM, PeakPropagation, find_peaks, peak_stimulation, valid_peaks
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"


def _mini(**options):
    return MiniResNet.build(MiniResNet.Options(width=8, **options), image_size=32)


def _read(method, classifier, images, classes):
    with torch.inference_mode():
        output = classifier(images)
        output.images = images
        return method.maps(classifier, output, classes), output


# --- Peaks ---


def _slow_peaks(plane, window):
    height, width = plane.shape
    reach = window // 2
    peaks = np.zeros(plane.shape, dtype=bool)
    for i in range(height):
        for j in range(width):
            around = plane[max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            peaks[i, j] = plane[i, j] == around.max()
    return peaks


def _steps(shape, height, seed):
    """Whole numbers from -height to height: equal neighbours are common, and with height 0 all are equal."""
    return np.random.default_rng(seed).integers(-height, height + 1, shape).astype(np.float64)


MAPS = st.builds(_steps, hnp.array_shapes(min_dims=4, max_dims=4, max_side=6), st.integers(0, 4), st.integers(0, 2**32 - 1))


@given(values=MAPS, window=st.sampled_from([1, 3, 5]))
def test_peaks_are_the_local_maxima(values, window):
    peaks = find_peaks(torch.from_numpy(values), window=window).numpy()
    for sample in range(values.shape[0]):
        for channel in range(values.shape[1]):
            np.testing.assert_array_equal(peaks[sample, channel], _slow_peaks(values[sample, channel], window))


@given(values=MAPS)
def test_valid_peaks_are_the_peaks_not_below_the_median_and_there_always_is_one(values):
    valid = valid_peaks(torch.from_numpy(values), window=3).numpy()
    for sample in range(values.shape[0]):
        for channel in range(values.shape[1]):
            plane = values[sample, channel]
            lower_median = sorted(plane.ravel())[(plane.size - 1) // 2]
            np.testing.assert_array_equal(valid[sample, channel], _slow_peaks(plane, 3) & (plane >= lower_median))
            assert valid[sample, channel].any()


@given(values=MAPS)
def test_the_score_is_the_mean_over_the_peaks_and_its_gradient_reaches_them_alone(values):
    maps = torch.from_numpy(values).requires_grad_()
    score = peak_stimulation(maps, window=3)
    (gradient,) = torch.autograd.grad(score.sum(), maps)
    for sample in range(values.shape[0]):
        for channel in range(values.shape[1]):
            peaks = _slow_peaks(values[sample, channel], 3)
            assert score[sample, channel].item() == pytest.approx(values[sample, channel][peaks].mean())
            np.testing.assert_allclose(gradient[sample, channel].numpy(), peaks / peaks.sum())


# --- Peak back-propagation: a network small enough to walk by hand ---


class Tiny(Backbone):
    """Convolution, norm, ReLU, max pooling; then a residual block with mean pooling on its shortcut."""

    def __init__(self):
        super().__init__()
        self.channels = {1: 3, 2: 4}
        self.conv1 = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn2 = nn.GroupNorm(2, 4)
        self.narrow = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.bn1.running_mean.normal_(std=0.3)
            self.bn1.running_var.uniform_(0.5, 2)
            for norm in (self.bn1, self.bn2):
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_(std=0.3)

    @classmethod
    def build(cls, options, *, image_size):
        raise AssertionError

    def forward(self, images):
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        pooled = F.max_pool2d(stem, 3, stride=2, padding=1)
        x = self.bn2(self.conv2(pooled))
        x += self.narrow(F.avg_pool2d(pooled, 2))
        return Features(layers={1: stem, 2: torch.relu_(x)})


def _walk_convolution(p, u, weight, *, stride, padding):
    """P(U) from P(V), eq. 3 to 5, position by position. p (O, H, W), u (C, h, w) not negative, weight (O, C, k, k)."""
    out = np.zeros_like(u)
    size = weight.shape[-1]
    for o, y, x in np.ndindex(*p.shape):
        causes = {}
        for c, i, j in np.ndindex(u.shape[0], size, size):
            row, column = y * stride + i - padding, x * stride + j - padding
            if 0 <= row < u.shape[1] and 0 <= column < u.shape[2]:
                causes[c, row, column] = u[c, row, column] * max(weight[o, c, i, j], 0.0)
        total = sum(causes.values())
        if total > 0:
            for position, value in causes.items():
                out[position] += p[o, y, x] * value / total
    return out


def _walk_max(p, u, *, size, stride, padding):
    out = np.zeros_like(u)
    for c, y, x in np.ndindex(*p.shape):
        rows = [y * stride + i - padding for i in range(size)]
        columns = [x * stride + j - padding for j in range(size)]
        inside = [(i, j) for i in rows for j in columns if 0 <= i < u.shape[1] and 0 <= j < u.shape[2]]
        winner = max(inside, key=lambda at: u[c, at[0], at[1]])  # the first of equals
        out[c, winner[0], winner[1]] += p[c, y, x]
    return out


def _walk(net, head, image, start):
    """Peak response of one picture at layer 1 and at the picture, channels kept, by the walks above."""

    def array(tensor):
        return tensor.detach()[0].numpy() if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor.detach().numpy()

    stem = F.relu(net.bn1(net.conv1(image)))
    pooled = F.max_pool2d(stem, 3, stride=2, padding=1)
    main, short = array(net.bn2(net.conv2(pooled))), array(net.narrow(F.avg_pool2d(pooled, 2)))
    last = np.maximum(main + short, 0)
    p = _walk_convolution(start, last, head.weight.detach().numpy(), stride=1, padding=0)
    to_main, to_short = np.zeros_like(p), np.zeros_like(p)
    for at in np.ndindex(*p.shape):
        a, b = max(main[at], 0.0), max(short[at], 0.0)
        share = a / (a + b) if a + b > 0 else 0.5
        to_main[at], to_short[at] = p[at] * share, p[at] * (1 - share)
    through_main = _walk_convolution(to_main, array(pooled), net.conv2.weight.detach().numpy(), stride=2, padding=1)
    to_means = _walk_convolution(to_short, array(F.avg_pool2d(pooled, 2)), net.narrow.weight.detach().numpy(), stride=1, padding=0)
    uniform = np.zeros((3, 3, 2, 2))
    for channel in range(3):
        uniform[channel, channel] = 0.25
    through_short = _walk_convolution(to_means, array(pooled), uniform, stride=2, padding=0)
    at_stem = _walk_max(through_main + through_short, array(stem), size=3, stride=2, padding=1)
    picture = array(image)
    at_picture = _walk_convolution(at_stem, picture - min(picture.min(), 0.0), net.conv1.weight.detach().numpy(), stride=2, padding=1)
    return at_stem.sum(axis=0), at_picture.sum(axis=0)


def _tiny_classifier(layer, seed):
    torch.manual_seed(seed)
    method = PRM(PRM.Options(response_layer=layer), variant="paper")
    return method, method.classifier(Tiny(), num_classes=3).double().eval()


@pytest.mark.parametrize("seed", [0, 1, 3, 4])  # in these some response has a cause at both layers
@pytest.mark.parametrize("layer", [0, 1])
def test_the_response_is_that_of_a_walk_over_every_position(layer, seed):
    method, classifier = _tiny_classifier(layer, seed)
    images, classes = torch.randn(2, 2, 16, 16).double(), torch.tensor([2, 1])
    maps, output = _read(method, classifier, images, classes)
    for sample in range(2):
        start = np.zeros((3, 2, 2))
        plane = output.class_maps[sample, classes[sample]].numpy()
        start[classes[sample]] = _slow_peaks(plane, 3) & (plane >= sorted(plane.ravel())[1])
        wanted = _walk(classifier.backbone, classifier.head, images[sample : sample + 1], start)
        np.testing.assert_allclose(maps[sample].numpy(), wanted[0 if layer == 1 else 1], atol=1e-12)
    assert maps.sum() > 0.5


def _mass_per_peak(classifier, method):
    images, classes = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 6])
    maps, output = _read(method, classifier, images, classes)
    assert maps.amin() >= 0
    return maps.sum(dim=(1, 2)) / valid_peaks(output.class_maps[range(3), classes], window=3).sum(dim=(1, 2))


@pytest.mark.parametrize("layer", range(6))
def test_a_peak_s_probability_is_neither_lost_nor_made_on_the_way_to_any_layer(layer):
    torch.manual_seed(0)
    method = PRM(PRM.Options(response_layer=layer), variant="paper")
    classifier = method.classifier(_mini(), num_classes=7).eval()
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if name.endswith("weight"):
                parameter.abs_()  # so that every response has a positive cause
    torch.testing.assert_close(_mass_per_peak(classifier, method), torch.ones(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_hardly_any_probability_is_lost_in_a_network_with_random_weights(norm):
    torch.manual_seed(0)
    method = PRM(PRM.Options(), variant="paper")
    mass = _mass_per_peak(method.classifier(_mini(norm=norm), num_classes=7).eval(), method)
    assert (mass > 0.95).all()
    assert (mass < 1 + 1e-4).all()


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "inceptionv3"])
def test_there_is_a_rule_for_every_operation_of_the_large_networks(name):
    torch.manual_seed(0)
    target = BACKBONES.get(name).target
    method = PRM(PRM.Options(), variant="paper")
    classifier = method.classifier(target.build(target.Options(), image_size=80), num_classes=7).eval()
    maps, output = _read(method, classifier, torch.randn(1, 3, 80, 80), torch.tensor([2]))
    assert maps.shape == (1, 80, 80)
    assert maps.sum().item() == pytest.approx(valid_peaks(output.class_maps[:, 2], window=3).sum().item(), rel=0.05)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1),
        lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
        lambda x: torch.cat([F.relu6(x), x.flatten(2).view(x.shape)], dim=1),
        lambda x: F.gelu(F.dropout(x, training=False) * 3 + 1),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2),
        lambda x: F.conv2d(x, torch.full((6, 1, 3, 3), 0.1), torch.ones(6), padding=2, dilation=2, groups=3),
    ],
)
def test_each_rule_keeps_the_value_and_the_probability(operation):
    u = torch.rand(2, 3, 8, 8).add(0.1).requires_grad_()
    with PeakPropagation():
        value = operation(u)
    torch.testing.assert_close(value, operation(u.detach()))
    p = torch.rand_like(value)
    (back,) = torch.autograd.grad(value, u, p)
    assert (back >= 0).all()
    torch.testing.assert_close(back.sum(dim=(1, 2, 3)), p.sum(dim=(1, 2, 3)))


@given(seed=st.integers(0, 10_000))
def test_a_residual_sum_splits_and_keeps_the_probability(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, 3, 4, 4, generator=generator).requires_grad_() for _ in range(2))
    p = torch.rand(2, 3, 4, 4, generator=generator)
    with PeakPropagation():
        value = a + b
    to_a, to_b = torch.autograd.grad(value, (a, b), p)
    torch.testing.assert_close(value, a.detach() + b.detach())
    torch.testing.assert_close(to_a + to_b, p)
    one_sided = (a > 0) & (b <= 0)
    torch.testing.assert_close(to_a[one_sided], p[one_sided])


def test_only_gradients_differ_inside_the_context():
    classifier = PRM(PRM.Options(), variant="paper").classifier(_mini(), num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = classifier.backbone(images).layers
    with PeakPropagation():
        inside = classifier.backbone(images.clone().requires_grad_()).layers
    for layer, features in plain.items():
        torch.testing.assert_close(inside[layer], features)


class Squared(Tiny):
    """With an operation that has no rule between layers 1 and 2."""

    def forward(self, images):
        layers = super().forward(images).layers
        return Features(layers={1: layers[1], 2: layers[2] ** 2})


def test_an_operation_without_a_rule_stops_the_walk_instead_of_passing_for_one():
    for layer in (0, 1):
        method = PRM(PRM.Options(response_layer=layer), variant="paper")
        with pytest.raises(NotImplementedError, match=r"no rule for 'pow'.*response_layer"):
            _read(method, method.classifier(Squared(), num_classes=3).eval(), torch.randn(1, 2, 16, 16), torch.tensor([0]))


def test_the_walk_may_end_above_an_operation_without_a_rule():
    method = PRM(PRM.Options(response_layer=2), variant="paper")
    maps, _ = _read(method, method.classifier(Squared(), num_classes=3).eval(), torch.randn(1, 2, 16, 16), torch.tensor([0]))
    assert maps.shape == (1, 2, 2)


# --- The contract ---


def test_a_map_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    method = PRM(PRM.Options(), variant="paper")
    classifier = method.classifier(_mini(), num_classes=7).eval()
    images, classes = torch.randn(4, 3, 32, 32) * torch.tensor([1.0, 3.0, 0.1, 1.0]).view(4, 1, 1, 1), torch.tensor([0, 1, 5, 6])
    together, _ = _read(method, classifier, images, classes)
    alone = torch.cat([_read(method, classifier, images[i : i + 1], classes[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_reading_maps_leaves_parameters_gradients_statistics_and_mode_alone():
    method = PRM(PRM.Options(), variant="paper")
    classifier = method.classifier(_mini(), num_classes=7).eval()
    for parameter in classifier.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    _read(method, classifier, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    torch.testing.assert_close(classifier.state_dict(), before, rtol=0, atol=0)
    assert all((p.grad == 7).all() and p.requires_grad for p in classifier.parameters())
    assert not any(module.training for module in classifier.modules())


def test_the_official_map_is_the_class_response_map():
    method = PRM(PRM.Options(), variant="official")
    classifier = method.classifier(_mini(), num_classes=7).eval()
    maps, output = _read(method, classifier, torch.randn(3, 3, 32, 32), torch.tensor([4, 0, 2]))
    torch.testing.assert_close(maps, torch.stack([output.class_maps[0, 4], output.class_maps[1, 0], output.class_maps[2, 2]]))


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_training_step_lowers_the_loss_and_maps_are_had(variant):
    torch.manual_seed(0)
    method = PRM(PRM.Options(), variant=variant)
    classifier = method.classifier(_mini(norm="group"), num_classes=7)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=1.0, layers=(5,)))
    batch = Batch(
        positions=torch.arange(4),
        seeds=torch.arange(4),
        images=torch.randn(4, 3, 32, 32),
        labels=torch.tensor([0, 1, 2, 3]),
        au_maps=torch.rand(4, 32, 32),
        au_valid=torch.tensor([False, True, True, True]),
    )
    optimiser = torch.optim.SGD(task.parameters(), lr=0.01)
    first = task(batch, guided_share(3, parts=1))["loss"]
    first.backward()
    optimiser.step()
    assert task(batch, guided_share(3, parts=1))["loss"] < first
    maps, _ = _read(method, classifier.eval(), batch.images, batch.labels)
    assert maps.shape == ((4, 32, 32) if variant == "paper" else (4, 4, 4))


# --- Published figures ---


@pytest.mark.parametrize(("name", "options"), [("PRM", {"window": 3, "stride": 1}), ("PRM_variant", {"window": 5, "stride": 2})])
def test_logits_and_maps_are_the_published_ones(name, options):
    golden = np.load(GOLDEN / f"official_{name}.npz", allow_pickle=False)
    backbone = ResNet50.build(ResNet50.Options(), image_size=224)
    images = pictures(str(golden["image_tag"]), count=3, size=224)

    def published(key):
        return key.replace("backbone.net.", "encoder/").replace("head.", "classification_head/conv.")

    method = PRM(PRM.Options(**options), variant="official")
    classifier = method.classifier(backbone, num_classes=7).eval()
    fill(classifier, published, gain=float(golden["gain"]))
    maps, output = _read(method, classifier, images, torch.from_numpy(golden["labels"]))
    np.testing.assert_allclose(output.logits.numpy(), golden["logits"], atol=1e-4)
    np.testing.assert_allclose(output.class_maps.numpy(), golden["head_maps"], atol=1e-4)
    np.testing.assert_allclose(maps.numpy(), golden["maps_raw"], atol=1e-4)
    np.testing.assert_allclose(min_max(maps).numpy(), golden["maps"], atol=1e-4)
    np.testing.assert_allclose(peak_stimulation(output.class_maps, window=3).numpy(), golden["logits_paper"], atol=1e-4)


# --- Settings that cannot be ---


def test_an_even_window_names_its_neighbours():
    with pytest.raises(ValueError, match="nearest: 3 or 5"):
        PRM.Options(window=4)


def test_a_layer_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"response_layer = 9.*1, 2, 3, 4, 5"):
        PRM(PRM.Options(response_layer=9), variant="paper").classifier(_mini(), num_classes=7)


def test_maps_smaller_than_the_official_window_say_so():
    classifier = PRM(PRM.Options(window=5), variant="official").classifier(_mini(), num_classes=7)
    with pytest.raises(ValueError, match=r"window = 5 is larger than the class maps \(4 x 4\)"):
        classifier(torch.randn(2, 3, 32, 32))
