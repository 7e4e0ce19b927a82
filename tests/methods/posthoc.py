"""Small random classifiers, and the read-outs once more: slowly, sample by sample, by autograd, as the papers write them."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.backbone import BACKBONES, Backbone, Features
from bench.method import METHODS
from bench.methods.cam import GAPClassifier
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"

CLOSED = ("cam", "gradcam", "gradcampp", "layercam", "hirescam", "xgradcam", "eigencam", "ablationcam", "finercam")
FORWARD = ("scorecam", "smoothgradcampp")
ALL = CLOSED + FORWARD


def method(name, variant="paper", **options):
    target = METHODS.get(name).target
    return target(target.Options.model_validate(options), variant=variant)


class Tiny(Backbone):
    """Four convolutions; the last layer is rectified or not."""

    def __init__(self, channels, *, rectified, stride):
        super().__init__()
        self.channels = {1: 3, 2: 4, 3: 5, 4: channels}
        widths = [3, *self.channels.values()]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, stride=stride if i in (0, 2) else 1) for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.rectified = rectified

    @classmethod
    def build(cls, options, *, image_size):
        raise NotImplementedError

    def forward(self, images):
        layers, x = {}, images
        for number, conv in enumerate(self.convs, start=1):
            x = conv(x)
            if number < 4 or self.rectified:
                x = x.relu()
            layers[number] = x
        return Features(layers=layers)


def tiny(seed, *, channels=6, classes=4, rectified=True, stride=2):
    """A classifier in double precision and eval mode, all of it drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = GAPClassifier(Tiny(channels, rectified=rectified, stride=stride), num_classes=classes).double().eval()
        for parameter in classifier.parameters():
            nn.init.normal_(parameter, std=0.5)
    return classifier


def draw(seed, *, count, classes, size=12):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, classes, (count,), generator=generator)


def read(method, classifier, images, classes):
    """What the evaluation does: one forward pass, then the maps, in inference mode."""
    with torch.inference_mode():
        images, classes = images.clone(), classes.clone()  # inference tensors, as there
        output = classifier(images)
        output.images = images
        return method.maps(classifier, output, classes)


def pull(classifier, image, label, layer=None, score=None):
    """Activations (C, h, w) of a layer for one picture, and the gradient of the class logit (or of ``score``) by them."""
    output = classifier(image[None])
    tap = output.layers[layer or classifier.backbone.last]
    value = output.logits[0, label] if score is None else score(output.logits[0])
    return tap[0].detach(), torch.autograd.grad(value, tap)[0][0]


def cam(a, g):
    return sum(g[k] * a[k] for k in range(len(a)))


def gradcam(a, g):
    return sum(g[k].mean() * a[k] for k in range(len(a))).relu()


def gradcampp(a, g):
    total = torch.zeros_like(a[0])
    for k in range(len(a)):
        alpha = torch.where(g[k] != 0, g[k] ** 2 / (2 * g[k] ** 2 + a[k].sum() * g[k] ** 3), 0)
        total += (alpha * g[k].relu()).sum() * a[k]
    return total.relu()


def gradcampp_official(a, g):
    return sum((g[k].relu() ** 3).sum() * a[k] for k in range(len(a))).relu()


def layercam(a, g):
    return sum(g[k].relu() * a[k] for k in range(len(a))).relu()


def xgradcam(a, g):
    alive = [k for k in range(len(a)) if a[k].sum() != 0]
    return sum(((g[k] * a[k] / a[k].sum()).sum() * a[k] for k in alive), torch.zeros_like(a[0])).relu()


@functools.cache
def golden_output(large_maps):
    """ResNet-50 with the weights of the golden figures, and its output for their three pictures, from one forward pass."""
    golden = np.load(GOLDEN / "official_CAM.npz", allow_pickle=False)
    images = pictures(str(golden["image_tag"]), count=3, size=224)
    np.testing.assert_allclose([images.double().sum(), images.double().abs().sum()], golden["image_digest"], rtol=1e-6)
    entry = BACKBONES.get("resnet50").target
    classifier = GAPClassifier(entry.build(entry.Options(large_maps=large_maps), image_size=224), num_classes=7)
    names = {"backbone.net.": "encoder/", "head.": "classification_head/fc."}

    def published(name):
        own, published_name = next((a, b) for a, b in names.items() if name.startswith(a))
        return name.replace(own, published_name)

    fill(classifier, published, gain=float(golden["gain"]))
    classifier.eval()
    with torch.inference_mode():
        output = classifier(images)
        output.images = images
    return classifier, output


@torch.inference_mode()
def golden_maps(name, variant, labels, *, large_maps=True):
    """Raw maps (3, h, w) of the golden network."""
    classifier, output = golden_output(large_maps)
    return method(name, variant).maps(classifier, output, torch.as_tensor(labels))


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"official_{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
