"""From a `Training` to the objects that train it or read it out."""

from __future__ import annotations

import torch
from torch import nn

from bench.backbone import BACKBONES
from bench.matrix import Cell, Training
from bench.method import METHODS, Classifier, Method
from bench.training.random_layers import key_random_layers


def build_method(training: Training) -> Method:
    """The method that trains."""
    target = METHODS.get(training.trains_as).target
    return target(target.Options.model_validate(training.method_options), variant=training.variant)


def build_reader(cell: Cell) -> Method:
    """The method that reads the maps of a cell off the trained classifier."""
    target = METHODS.get(cell.method).target
    return target(target.Options.model_validate(cell.method_options), variant=cell.training.variant)


def build_classifier(training: Training, *, num_classes: int) -> Classifier:
    """The classifier with its initial weights: a function of the training's identity alone.

    Raises:
        ValueError: the options cannot be.
        FileNotFoundError: pretrained weights that are not there.
    """
    target = BACKBONES.get(training.backbone).target
    size = training.settings["images"]["size"]
    if target.image_sizes is not None and size not in target.image_sizes:
        sizes = " or ".join(map(str, target.image_sizes))
        raise ValueError(
            f"images.size = {size}: backbone {training.backbone!r} takes {sizes} only; --set images.size={target.image_sizes[0]}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.derived_seed("init"))
        backbone = target.build(target.Options.model_validate(training.backbone_options), image_size=size)
        classifier = build_method(training).classifier(backbone, num_classes=num_classes)
    key_random_layers(classifier)
    return classifier


def head_parameters(classifier: Classifier) -> list[nn.Parameter]:
    """The parameters of a classifier that are not its backbone's."""
    backbone = {id(p) for p in classifier.backbone.parameters()}
    return [p for p in classifier.parameters() if id(p) not in backbone]
