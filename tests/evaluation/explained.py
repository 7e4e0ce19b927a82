"""Small networks, pictures and maps as the optional measures see them, for tests."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from bench.au.maps import action_unit_maps
from bench.evaluation.maps import enlarged
from bench.evaluation.measures import Explained
from bench.evaluation.measures.randomisation import randomise
from bench.evaluation.parts import convert
from bench.evaluation.read_out import forward, read_out
from bench.method import Classifier, Output
from tests.au.faces import faces
from tests.methods.posthoc import method, tiny


class Logits(nn.Module):
    """The classifier as the libraries want it: pictures in, logits out."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier(images).logits


class Window(Classifier):
    """A network that knows nothing but the mean of one window of the picture: the logit of class 1 is that, of class 0 nothing."""

    def __init__(self, window):
        super().__init__()
        self.window = nn.Parameter(window.float(), requires_grad=False)

    def forward(self, images, labels=None):
        seen = (images.mean(dim=1) * self.window).sum(dim=(1, 2)) / self.window.sum()
        return Output(logits=torch.stack([torch.zeros_like(seen), 2 * seen], dim=1), layers={})


def explained(seed=0, *, count=6, size=32, name="cam"):
    """What the evaluation hands to measures, of a small random network and jittered faces of all expressions."""
    generator = torch.Generator().manual_seed(seed)
    classifier = tiny(seed, classes=7).float()
    reader = method(name)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % 6 + 1
    landmarks = faces(count, seed=seed).float()
    au_maps, valid = action_unit_maps(landmarks, labels, frame=224, size=size, variant="symmetric")
    with torch.no_grad():
        output = forward(classifier, images)
        predicted = output.logits.argmax(dim=1)
        raw_true, raw_predicted = (read_out(reader, classifier, output, classes) for classes in (labels, predicted))
    return Explained(
        method=reader,
        classifier=classifier,
        randomised=lambda part: randomise(classifier, part, seed=5),
        images=images,
        logits=output.logits,
        predicted=predicted,
        raw_predicted=raw_predicted,
        map_true=enlarged(raw_true, size=size),
        map_predicted=enlarged(raw_predicted, size=size),
        landmarks=landmarks,
        expressions=labels,
        au_maps=au_maps,
        au_valid=valid,
        au_variant="symmetric",
    )


def explained_window(*, inverse=False, count=4, size=20):
    """Pictures that the network `Window` takes for class 1, with the map that knows where it looks, or with its inverse.

    It looks at every other pixel of its window, so that blurred pictures tell it little.
    """
    window = torch.zeros(size, size)
    window[4:10:2, 6:14:2] = window[5:10:2, 7:14:2] = 1
    base = explained(count=count, size=size)
    images = 0.5 + 0.1 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)) + 2 * window - 1
    classifier = Window(window)
    maps = (1 - window if inverse else window).expand(count, -1, -1)
    logits = classifier(images).logits
    assert (logits.argmax(dim=1) == 1).all()
    return dataclasses.replace(
        base, classifier=classifier, images=images, logits=logits, predicted=logits.argmax(dim=1), map_predicted=maps
    )


def doubled(seen):
    """The same in double precision, for sums done by hand."""
    exact = convert(seen, lambda value: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value)
    return dataclasses.replace(exact, classifier=copy.deepcopy(seen.classifier).double())
