"""Every method on every backbone it can take: a guided training step and a map; every pair of them, each in both variants somewhere."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import pytest
import torch

from bench.backbone import BACKBONES
from bench.config import ConfigError, load_settings
from bench.method import METHODS, Batch
from bench.sweep.plan import make_plan
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.pairwise import pairwise, slow_beyond_pairs


class Net(NamedTuple):
    """How a backbone is tried out."""

    size: int
    options: dict[str, object]
    slow: bool


NETS = {
    "mini": Net(32, {"width": 8}, slow=False),
    "mini-vit": Net(32, {"dim": 24, "depth": 2}, slow=False),
    "mini-apvit": Net(32, {"width": 8, "dim": 32, "depth": 2}, slow=False),
    "timm:test_resnet": Net(96, {}, slow=False),
    "timm:test_vit": Net(64, {}, slow=False),
    "timm:convnext_atto": Net(96, {}, slow=True),
    "timm:swin_tiny_patch4_window7_224": Net(96, {}, slow=True),
    "resnet18": Net(64, {}, slow=True),
    "resnet34": Net(64, {}, slow=True),
    "resnet50": Net(64, {}, slow=True),
    "resnet101": Net(64, {}, slow=True),
    "resnet152": Net(64, {}, slow=True),
    "vgg16": Net(64, {}, slow=True),
    "inceptionv3": Net(64, {}, slow=True),
    "deit-tiny": Net(64, {}, slow=True),
    "deit-small": Net(64, {}, slow=True),
    "deit-base": Net(64, {}, slow=True),
    "apvit": Net(112, {}, slow=True),
}

DEEPER = {"resnet34", "resnet101", "resnet152", "deit-small", "deit-base"}
"""They have more of the same blocks than resnet18, resnet50 and deit-tiny: trained with every method, but read by no further one."""

METHOD_OPTIONS = {"scorecam": {"channels": 8}}
"""ScoreCAM runs the network once a channel: 2048 times for ResNet-50."""

REFUSED = {
    ("adl", "timm:test_resnet"): "is not made of blocks that a method can act between",
    ("adl", "timm:convnext_atto"): "is not made of blocks that a method can act between",
    ("adl", "timm:swin_tiny_patch4_window7_224"): "is not made of blocks that a method can act between",
}
"""Pairs of fitting kinds that cannot be all the same, and what the user is told."""

UNREADABLE = {("prm", "timm:swin_tiny_patch4_window7_224", "paper"): "peak back-propagation has no rule for 'linear'"}
"""Cells that can be trained, and whose map then cannot be had: the paper's read-out is for convolutions."""

CELLS = [
    # Cells of one training stand together, so that one step serves them all.
    (backbone, trained, variant, method)
    for backbone in NETS
    for trained in METHODS.names()
    if METHODS.get(trained).info.kind == "trained" and (trained, backbone) not in REFUSED
    for variant in METHODS.get(trained).info.variants
    for method in METHODS.names()
    if (METHODS.get(method).info.trains_as or method) == trained and BACKBONES.get(backbone).info.kind in METHODS.get(method).info.backbones
    if (method, backbone, variant) not in UNREADABLE
    if method == trained or backbone not in DEEPER
]
QUICK = slow_beyond_pairs([cell for cell in CELLS if not NETS[cell[0]].slow])
SLOW = [pytest.param(*cell, marks=pytest.mark.slow) for cell in pairwise([cell for cell in CELLS if NETS[cell[0]].slow])]


def make(name, variant):
    target = METHODS.get(name).target
    return target(target.Options(**METHOD_OPTIONS.get(name, {})), variant=variant)


def classifier_of(backbone, method):
    target, net = BACKBONES.get(backbone).target, NETS[backbone]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return method.classifier(target.build(target.Options(**net.options), image_size=net.size), num_classes=7)


def batch_of(size):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        positions=torch.arange(2),
        seeds=torch.tensor([3, 4]),
        images=torch.randn(2, 3, size, size, generator=generator),
        labels=torch.tensor([1, 5]),
        au_maps=torch.rand(2, 28, 28, generator=generator),
        au_valid=torch.tensor([True, True]),
    )


def read(classifier, method, *, size):
    images = batch_of(size).images
    with contextlib.nullcontext() if method.needs_grad else torch.inference_mode():
        output = classifier(images)
        output.images = images
        return output, method.maps(classifier, output, torch.tensor([0, 6]))


@functools.lru_cache(maxsize=1)
def trained_one_step(backbone, trained, variant):
    method = make(trained, variant)
    classifier = classifier_of(backbone, method)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=4.0, layers=BACKBONES.get(backbone).info.guided_layers)).train()
    batch = method.mix(batch_of(NETS[backbone].size))
    optimiser = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=1e-3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        losses = task(batch, guided_share(2, parts=1))
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in classifier.named_parameters() if p.requires_grad}
    optimiser.step()
    return classifier.eval(), losses, gradients


@pytest.mark.parametrize(("backbone", "trained", "variant", "method"), QUICK + SLOW)
def test_a_guided_step_and_a_map(backbone, trained, variant, method):
    classifier, losses, gradients = trained_one_step(backbone, trained, variant)
    assert losses["loss"].isfinite()
    assert losses["guidance"] > 0
    # A distributed step waits for the gradient of every parameter that may change.
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())

    output, maps = read(classifier, make(method, variant), size=NETS[backbone].size)
    assert output.logits.shape == (2, 7)
    assert maps.ndim == 3
    assert len(maps) == 2
    assert maps.isfinite().all()
    assert not classifier.training


@pytest.mark.parametrize(("method", "backbone"), REFUSED)
def test_a_pair_that_cannot_be_is_refused_when_it_is_built(method, backbone):
    with pytest.raises(ValueError, match=REFUSED[method, backbone]), torch.device("meta"):
        classifier_of(backbone, make(method, "paper"))


@pytest.mark.parametrize(("method", "backbone", "variant"), UNREADABLE)
def test_a_map_that_cannot_be_had_is_an_error_and_not_a_wrong_map(method, backbone, variant):
    reader = make(method, variant)
    with pytest.raises(NotImplementedError, match=UNREADABLE[method, backbone, variant]):
        read(classifier_of(backbone, reader).eval(), reader, size=NETS[backbone].size)


def test_every_backbone_of_the_project_is_tried():
    ours = {entry.name for entry in BACKBONES if entry.target.__module__.startswith("bench.backbones.")}
    assert ours - NETS.keys() == set()


def plan(project, monkeypatch, **run):
    monkeypatch.chdir(project)
    flags = {f"run.{key}": value for key, value in run.items()} | {"run.guidance": ("none",), "images.size": 64}
    return make_plan(load_settings(environ={}, flags=flags))


@pytest.mark.parametrize(
    ("methods", "backbones", "message"),
    [
        (("tscam",), ("mini",), r"method 'tscam' can take none of the backbones mini; it can take: .*deit-small.*mini-vit"),
        (
            ("gradcam",),
            ("mini-vit",),
            r"method 'gradcam' can take none of the backbones mini-vit; it can take: .*mini, .*resnet50.*timm:NAME",
        ),
        (("cam", "tscam"), ("mini",), r"method 'tscam' can take none of the backbones mini"),
        (("cam",), ("mini", "mini-vit"), r"backbone 'mini-vit' serves none of the methods cam; it serves: .*tscam"),
        (("cam",), ("timm:test_vit",), r"method 'cam' can take none of the backbones timm:test_vit"),
    ],
)
def test_an_impossible_pair_is_an_error_that_lists_the_possible_ones(project, monkeypatch, methods, backbones, message):
    with pytest.raises(ConfigError, match=message):
        plan(project, monkeypatch, methods=methods, backbones=backbones)


def test_each_method_is_planned_on_those_backbones_it_can_take(project, monkeypatch):
    made = plan(project, monkeypatch, methods=("cam", "layercam", "tscam"), backbones=("mini", "mini-vit", "timm:test_vit"))
    assert [(cell.method, cell.training.backbone) for cell in made.matrix.cells] == [
        ("cam", "mini"),
        ("layercam", "mini"),
        ("tscam", "mini-vit"),
        ("tscam", "timm:test_vit"),
    ]
