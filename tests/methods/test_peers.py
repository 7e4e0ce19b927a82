"""Against the two libraries people use, grad-cam and torchcam: agreement where they are right, proof where they are not.

The judge is always autograd in double precision, sample by sample (`tests.methods.posthoc`). All comparisons are of maps
scaled to [0, 1] exactly, so that differences are shares of the full range.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from bench.backbone import BACKBONES
from bench.evaluation.maps import min_max, upsample
from bench.methods.cam import GAPClassifier
from tests.methods import posthoc

AGREE = 2e-4
WRONG = 0.05


class Logits(nn.Module):
    """The classifier as the libraries want it: pictures in, logits out."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier(images).logits


@functools.cache
def network(size):
    """A network of the project with maps of size / 8, pictures, labels, and its output as the evaluation has it."""
    entry = BACKBONES.get("mini").target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = GAPClassifier(entry.build(entry.Options(width=8), image_size=size), num_classes=7)
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_(0, 0.3)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        images = torch.randn(3, 3, size, size)
        classifier.head.weight.data *= 0.2  # the size of weights that a head of 2048 inputs starts with
    classifier.eval()
    with torch.no_grad():
        labels = classifier(images).logits.topk(2, dim=1).indices[:, 1]
    return classifier, images, labels


def ours(name, size, variant="paper", **options):
    classifier, images, labels = network(size)
    return min_max(posthoc.read(posthoc.method(name, variant, **options), classifier, images, labels))


@functools.cache
def truth(formula, size):
    """Maps by autograd in double precision, scaled to [0, 1]."""
    classifier, images, labels = network(size)
    exact = copy.deepcopy(classifier).double()
    maps = [formula(*posthoc.pull(exact, image, label)) for image, label in zip(images.double(), labels, strict=True)]
    return min_max(torch.stack(maps)).float()


def torchcam_raw(name, size, layer="layer4", **options):
    """A torchcam extractor's maps before its scaling, by its public interface."""
    methods = pytest.importorskip("torchcam.methods")
    classifier, images, labels = network(size)
    model = Logits(classifier)
    with getattr(methods, name)(model, f"classifier.backbone.net.{layer}", **options) as extractor:
        (maps,) = extractor(labels.tolist(), model(images), normalized=False)
    return maps.detach()


def torchcam(name, size, **options):
    return min_max(torchcam_raw(name, size, **options))


def grad_cam(name, size):
    """A grad-cam extractor's maps at the size of the picture, by its public interface."""
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    classifier, images, labels = network(size)
    with getattr(library, name)(Logits(classifier), [classifier.backbone.net.layer4]) as extractor:
        maps = extractor(images, [targets.ClassifierOutputTarget(int(label)) for label in labels])
    for parameter in classifier.parameters():
        parameter.grad = None  # the library leaves its own behind
    return min_max(torch.from_numpy(maps))


def grown(maps, size):
    """What grad-cam does after its scaling: enlarge, then scale again."""
    return min_max(upsample(maps, size=size))


def apart(a, b):
    assert a.shape == b.shape
    return (a - b).abs().amax().item()


SIZES = [56, 224]  # maps of 7 x 7 and 28 x 28


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "peer", "formula"),
    [
        ("cam", "CAM", posthoc.cam),
        ("gradcam", "GradCAM", posthoc.gradcam),
        ("layercam", "LayerCAM", posthoc.layercam),
        ("xgradcam", "XGradCAM", posthoc.xgradcam),
    ],
)
def test_torchcam_agrees(name, peer, formula, size):
    options = {"fc_layer": "classifier.head"} if name == "cam" else {}
    assert apart(torchcam(peer, size, **options), ours(name, size)) < AGREE
    assert apart(ours(name, size), truth(formula, size)) < AGREE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "peer", "formula"),
    [
        ("gradcam", "GradCAM", posthoc.gradcam),
        ("layercam", "LayerCAM", posthoc.layercam),
        ("xgradcam", "XGradCAM", posthoc.xgradcam),
    ],
)
def test_grad_cam_agrees(name, peer, formula, size):
    assert apart(grad_cam(peer, size), grown(ours(name, size), size)) < 2e-3  # its epsilons, 1e-7 against maps of 1e-4
    assert apart(ours(name, size), truth(formula, size)) < AGREE


def test_grad_cam_agrees_on_ablationcam_which_it_does_by_ablating():
    assert apart(grad_cam("AblationCAM", 56), grown(ours("ablationcam", 56), 56)) < 2e-3


@pytest.mark.parametrize("size", SIZES)
def test_grad_cam_agrees_on_hirescam_up_to_a_relu_that_the_paper_does_not_have(size):
    classifier, images, labels = network(size)
    raw = posthoc.read(posthoc.method("hirescam"), classifier, images, labels)
    assert (raw < 0).any()
    assert apart(grad_cam("HiResCAM", size), grown(min_max(raw.relu()), size)) < 2e-3


def test_grad_cam_agrees_on_eigencam_up_to_its_arbitrary_sign():
    classifier, images, labels = network(56)
    raw = posthoc.read(posthoc.method("eigencam", centre=True), classifier, images, labels)
    peer = grad_cam("EigenCAM", 56)
    either = [grown(min_max(m.relu()), 56) for m in (raw, -raw)]
    for sample in range(3):
        assert min(apart(peer[sample], e[sample]) for e in either) < 2e-3


@pytest.mark.parametrize("size", SIZES)
def test_torchcam_agrees_on_finercam(size):
    assert apart(torchcam("FinerCAM", size), ours("finercam", size)) < AGREE


@pytest.mark.parametrize(("layer", "number"), [("layer1", 2), ("layer2", 3), ("layer3", 4)])
def test_torchcam_agrees_on_layercam_of_earlier_layers(layer, number):
    assert apart(torchcam("LayerCAM", 56, layer=layer), ours("layercam", 56, layers=(number,))) < AGREE


@functools.cache
def fine_network(size):
    """Maps as large as the picture, so that it plays no part how masks are enlarged (the three do it in three ways)."""
    classifier = posthoc.tiny(4, channels=9, classes=7, stride=1).float()
    generator = torch.Generator().manual_seed(1)
    return classifier, torch.randn(3, 3, size, size, generator=generator), torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def fine_scorecam():
    classifier, images, labels = fine_network(10)
    maps = min_max(posthoc.read(posthoc.method("scorecam"), classifier, images, labels))
    assert maps.amax() == 1
    return maps


def test_torchcam_agrees_on_scorecam(fine_scorecam):
    methods = pytest.importorskip("torchcam.methods")
    classifier, images, labels = fine_network(10)
    model = Logits(classifier)
    with methods.ScoreCAM(model, "classifier.backbone", reshape_transform=lambda features: features.layers[4]) as extractor:
        (maps,) = extractor(labels.tolist(), model(images), normalized=False)
    assert apart(min_max(maps), fine_scorecam) < AGREE


def test_grad_cam_agrees_on_scorecam(fine_scorecam):
    # Its last layer has no module of its own with the ReLU: give the library the backbone, and pick the layer.
    class Last(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, images):
            return self.backbone(images).layers[4]

    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    classifier, images, labels = fine_network(10)
    model = nn.Sequential(Last(classifier.backbone), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier.head)
    with library.ScoreCAM(model, [model[0]]) as extractor:
        maps = torch.from_numpy(extractor(images, [targets.ClassifierOutputTarget(int(label)) for label in labels]))
    assert apart(min_max(maps), fine_scorecam) < AGREE


@pytest.mark.parametrize("size", SIZES)
def test_torchcam_gradcampp_lacks_the_division_and_ours_does_not(size):
    """alpha[mask].div_() divides a copy: the weights are ReLU(g)^3, as in the published FER code."""
    peer = torchcam("GradCAMpp", size)
    assert apart(peer, truth(posthoc.gradcampp, size)) > WRONG
    assert apart(peer, truth(posthoc.gradcampp_official, size)) < AGREE
    assert apart(ours("gradcampp", size), truth(posthoc.gradcampp, size)) < AGREE
    assert apart(ours("gradcampp", size, "official"), peer) < AGREE


def test_torchcam_scaling_does_not_reach_one_on_small_values_and_ours_does():
    """Its min-max adds 1e-8 to maps of that size."""
    methods = pytest.importorskip("torchcam.methods")
    classifier, images, labels = network(224)
    model = Logits(classifier)
    with methods.GradCAMpp(model, "classifier.backbone.net.layer4") as extractor:
        (maps,) = extractor(labels.tolist(), model(images))
    assert maps.amax(dim=(1, 2)).max() < 0.5
    assert (ours("gradcampp", 224, "official").amax(dim=(1, 2)) == 1).all()


def test_grad_cam_gradcampp_is_swamped_by_its_epsilon_on_large_maps_and_ours_is_not():
    """1e-6 beside 2 g^2 of about 1e-9: alpha is g^2 times a constant, the weights are the cubic ones again."""
    peer = grad_cam("GradCAMPlusPlus", 224)
    right, cubic = (grown(truth(formula, 224), 224) for formula in (posthoc.gradcampp, posthoc.gradcampp_official))
    assert apart(peer, right) > WRONG
    assert apart(peer, cubic) < 5e-3
    assert apart(grown(ours("gradcampp", 224), 224), right) < AGREE


def test_torchcam_smoothgradcampp_is_not_gradcampp_and_its_own_formula_is():
    """Averages of derivatives that noise cannot change: only its epsilon keeps the map from being that of Grad-CAM++."""
    peer = torchcam("SmoothGradCAMpp", 224)
    assert apart(peer, truth(posthoc.gradcampp, 224)) > WRONG
    assert apart(ours("smoothgradcampp", 224, noise=0), truth(posthoc.gradcampp, 224)) < AGREE


def test_grad_cam_writes_parameter_gradients_and_ours_does_not():
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    classifier, images, _ = network(56)
    with library.GradCAM(Logits(classifier), [classifier.backbone.net.layer4]) as extractor:
        extractor(images[:1], [targets.ClassifierOutputTarget(0)])
    assert classifier.head.weight.grad is not None
    for parameter in classifier.parameters():
        parameter.grad = None
    ours("gradcam", 56)
    ours("layercam", 56, layers=(3, 4))
    assert all(parameter.grad is None for parameter in classifier.parameters())
