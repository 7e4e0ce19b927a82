"""What cannot be trained or read is refused by the plan."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from bench.config import ConfigError, load_settings
from bench.matrix import build_matrix
from bench.method import METHODS
from bench.methods.cam import CAM, GAPClassifier
from bench.runtime.observer import LogObserver
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import check_guidance, make_plan


@pytest.fixture
def register():
    """Register post-hoc or trained methods for one test."""
    names = []

    def run(name, target, **info):
        names.append(name)
        METHODS.register(name, title=name, paper="none", in_all=False, **{"kind": "trained"} | info)(target)
        return name

    yield run
    for name in names:
        METHODS._entries.pop(name)


@pytest.fixture
def plan(project, monkeypatch):
    """Plan cells of some methods on some backbones."""
    monkeypatch.chdir(project)

    def run(methods, backbones=("mini",), guidance=("none",), sets=(), **flags):
        flags = {"run.methods": methods, "run.backbones": backbones, "run.guidance": guidance, **flags}
        return make_plan(load_settings(environ={}, sets=sets, flags=flags))

    return run


class OneMore(GAPClassifier):
    """A class "background" that nobody asked for."""

    def __init__(self, backbone, *, num_classes):
        super().__init__(backbone, num_classes=num_classes + 1)


class WithBackground(CAM):
    def classifier(self, backbone, *, num_classes):
        return OneMore(backbone, num_classes=num_classes)


def test_a_head_with_one_output_too_many_is_refused_and_what_works_is_named(plan, register):
    name = register("background", WithBackground)
    with pytest.raises(
        ConfigError, match=r"background on mini: .*logits: shape \(2, 8\), wanted \(2, 7\)[^$]*These pairs of the plan work: cam on mini"
    ):
        plan(["cam", name])


def test_a_head_that_changes_its_form_after_training_is_refused(plan, register):
    class InTraining(GAPClassifier):
        def forward(self, images, labels=None):
            output = super().forward(images, labels)
            return output if self.training else dataclasses.replace(output, logits=output.logits[:, :6])

    class Narrow(CAM):
        def classifier(self, backbone, *, num_classes):
            return InTraining(backbone, num_classes=num_classes)

    with pytest.raises(ConfigError, match=r"narrow on mini: its maps cannot be read: logits: shape \(2, 6\), wanted \(2, 7\)"):
        plan([register("narrow", Narrow)])


def test_an_error_of_a_loss_is_told_by_the_plan(plan, register):
    class NoLoss(CAM):
        def loss(self, output, batch):
            raise RuntimeError("no such thing")

    with pytest.raises(ConfigError, match=r"noloss on mini: one step of training fails: RuntimeError: no such thing"):
        plan([register("noloss", NoLoss)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps * float("nan"), "its maps hold NaN or infinite values"),
        (lambda maps: maps[:, None], r"returned the shape \(2, 1, \d+, \d+\), wanted \(2, h, w\)"),
        (lambda maps: maps[:1], r"returned the shape \(1, "),
        (lambda maps: list(maps), "returned a list, wanted a tensor of real numbers"),
        (lambda maps: maps.to(torch.complex64), "returned a tensor of torch.complex64"),
        (lambda maps: maps.no_such_thing, "its maps cannot be read: AttributeError"),
    ],
)
def test_maps_that_are_none_are_refused(plan, register, change, message):
    class Changed(CAM):
        def maps(self, classifier, output, classes):
            return change(super().maps(classifier, output, classes))

    with pytest.raises(ConfigError, match=f"changed on mini: .*{message}"):
        plan(["cam", register("changed", Changed, kind="posthoc", trains_as="cam")])


def test_a_plan_draws_nothing_from_the_generator(plan):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plan(["cam", "cutmix"], guidance=["none", "au"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_does_not_exist_is_refused_before_the_training(plan):
    with pytest.raises(ConfigError, match=r"layercam on mini: .*names layer 9; this network has the layers 1, 2, 3, 4, 5"):
        plan(["layercam"], sets=["methods.layercam.layers=[3,9]"])


def test_layers_of_a_network_with_channels_last_can_be_fused(plan):
    plan(["layercam"], ["timm:mambaout_femto"], sets=["methods.layercam.layers=[3,4]"], **{"images.size": 64})


def test_layers_beside_the_last_are_refused_with_the_reason(plan):
    with pytest.raises(ConfigError, match=r"names layer 2, which the logit does not depend on.*side by side.*layers=\[5\]"):
        plan(["layercam"], ["timm:hrnet_w18_small"], sets=["methods.layercam.layers=[2,5]"], **{"images.size": 64})


def test_peaks_that_cannot_be_followed_down_are_refused_with_the_layers_that_can_be_reached(plan):
    names = ["timm:mobilenetv3_small_050"]
    with pytest.raises(
        ConfigError, match=r"prm on timm:mobilenetv3_small_050: .*no rule for .*stop at layer 5 \(--set methods.prm.response_layer=5\)"
    ):
        plan(["prm"], names, **{"images.size": 64})
    plan(["prm"], names, sets=["methods.prm.response_layer=5"], **{"images.size": 64})


@pytest.fixture
def guided_by(project, monkeypatch):
    """Check the guided cells of the synthetic faces, their index changed."""
    monkeypatch.chdir(project)
    settings = load_settings(environ={}, flags={"run.guidance": ["au"]})
    (source,) = prepared(settings).values()

    def run(*, names=None, without=0):
        index = source.index
        names = names or index.classes
        splits = {
            split: facts.model_copy(update={"class_counts": dict(zip(names, facts.class_counts.values(), strict=True))})
            for split, facts in index.splits.items()
        }
        facts = index.provenance | {"samples_without_landmarks": {"train": without}}
        changed = index.model_copy(update={"classes": tuple(names), "splits": splits, "provenance": facts})
        changed.__dict__.pop("fingerprint", None)  # a cached property, of the names before
        changed_source = dataclasses.replace(source, index=changed)
        check_guidance([changed_source], build_matrix(settings, {"synthetic": changed_source.reference()}))

    return run


def prepared(settings):
    plan = make_plan(settings)
    prepare_missing(plan.sources.values(), observer=LogObserver(), plugins=())
    return make_plan(settings).sources


def test_guidance_by_classes_that_are_no_expressions_is_refused(guided_by):
    with pytest.raises(
        ConfigError, match=r"dataset synthetic has no AU map.*none of its classes \(1, 2, .*is an expression.*happiness.*--guidance none"
    ):
        guided_by(names=("1", "2", "3", "4", "5", "6", "7"))


def test_guidance_without_landmarks_is_refused(guided_by):
    with pytest.raises(ConfigError, match=r"no picture of its training split has landmarks.*--guidance none"):
        guided_by(without=48)


def test_guidance_by_few_maps_is_warned_of(guided_by, caplog):
    caplog.set_level(logging.WARNING)
    guided_by(without=30)
    assert "about 38 % of its training faces have an AU map" in caplog.text


def test_guidance_by_all_maps_says_nothing(guided_by, caplog):
    caplog.set_level(logging.WARNING)
    guided_by()
    assert caplog.text == ""
