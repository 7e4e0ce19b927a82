"""The invariance check: right results pass it, and what looks at the rest of the batch is caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.evaluation import evaluator
from bench.evaluation.invariance import TOLERANCE, UNLIKE, logit_difference, map_difference
from bench.method import METHODS
from bench.methods.cam import CAM
from bench.sweep.store import read_records

READ_OUTS: dict[str, list[str]] = {}
"""What trains -> what reads it out."""
for entry in METHODS:
    if entry.target.__module__.startswith("bench.methods"):
        READ_OUTS.setdefault(entry.info.trains_as or entry.name, []).append(entry.name)


@pytest.mark.parametrize("trains_as", READ_OUTS)
def test_every_method_passes(trains_as, make_method, evaluated):
    _, classifier = make_method(trains_as)
    for name, result in evaluated(classifier, {name: make_method(name)[0] for name in READ_OUTS[trains_as]}).items():
        assert result.invariance["holds"], (name, result.invariance)
        assert result.invariance["samples"] == 27


class GradientCAM(CAM):
    """Grad-CAM without its closed form."""

    needs_grad = True

    def maps(self, classifier, output, classes):
        features = output.layers[classifier.backbone.last]
        (gradient,) = torch.autograd.grad(output.logits.gather(1, classes[:, None]).sum(), features, retain_graph=True)
        return (gradient.mean((2, 3), keepdim=True) * features).sum(1)


def test_a_method_that_differentiates_passes(make_method, evaluated):
    method = GradientCAM(CAM.Options(), variant="paper")
    assert evaluated(make_method("cam")[1], {"gradient": method})["gradient"].invariance["holds"]


def failing(result, part):
    return {name for name, value in result.invariance[part].items() if value > TOLERANCE}


def test_a_head_that_normalises_over_the_batch_is_caught_in_logits(make_method, evaluated):
    method, classifier = make_method("cam")

    def over_the_batch(module, inputs, output):
        output.logits = output.logits - output.logits.mean(0)

    classifier.register_forward_hook(over_the_batch)
    result = evaluated(classifier, {"cam": method})["cam"]
    assert failing(result, "logits") == {"batch_1", "batch_64", "shuffled"}
    assert not failing(result, "maps")
    assert not result.invariance["holds"]


def test_batch_statistics_of_a_layer_left_in_training_mode_are_caught_in_logits_and_maps(make_method, evaluated):
    method, classifier = make_method("cam")
    next(m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)).train()
    result = evaluated(classifier, {"cam": method})["cam"]
    assert failing(result, "logits")
    assert failing(result, "maps")


class OverBatchMaximum(CAM):
    """Scales by the largest value of the batch."""

    def maps(self, classifier, output, classes):
        maps = super().maps(classifier, output, classes)
        return maps / maps.abs().amax()


class ByPlace(CAM):
    """Looks at where in the batch a sample stands."""

    def maps(self, classifier, output, classes):
        maps = super().maps(classifier, output, classes)
        return torch.stack([m.roll(i % 4, dims=0) for i, m in enumerate(maps)])


@pytest.mark.parametrize("broken", [OverBatchMaximum, ByPlace])
def test_a_read_out_that_looks_at_the_batch_is_caught_in_its_maps_alone(broken, make_method, evaluated):
    method, classifier = make_method("cam")
    results = evaluated(classifier, {"broken": broken(CAM.Options(), variant="paper"), "cam": method})
    assert failing(results["broken"], "maps") == {"batch_1", "batch_64", "shuffled"}
    assert not failing(results["broken"], "logits")
    assert results["cam"].invariance["holds"]


class AfterLargeBatches(CAM):
    """Is right but in batches of 64."""

    def maps(self, classifier, output, classes):
        maps = super().maps(classifier, output, classes)
        return maps if len(maps) < 20 else maps.flip(1)


def test_each_pass_is_told_apart(make_method, evaluated):
    result = evaluated(make_method("cam")[1], {"broken": AfterLargeBatches(CAM.Options(), variant="paper")})["broken"]
    assert failing(result, "maps") == {"batch_64"}


def test_logits_that_are_no_numbers_for_a_single_picture_do_not_hold(make_method, evaluated):
    method, classifier = make_method("cam")

    def over_the_range_of_the_batch(module, inputs, output):
        output.logits = output.logits / (output.logits.amax(0) - output.logits.amin(0))  # of one picture: 0

    classifier.register_forward_hook(over_the_range_of_the_batch)
    result = evaluated(classifier, {"cam": method})["cam"]
    assert result.invariance["logits"]["batch_1"] == UNLIKE
    assert not result.invariance["holds"]


def test_the_check_leaves_no_trace(make_method, evaluated, monkeypatch):
    method, classifier = make_method("cam")
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    with_check = evaluated(classifier, {"cam": method})["cam"]
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not classifier.training
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "check_invariance", lambda *_, **__: {"cam": {}})
        without = evaluated(classifier, {"cam": method})["cam"]
    for name in ("rows", "maps"):
        for field in dataclasses.fields(getattr(without, name)):
            checked, unchecked = (repr(getattr(getattr(result, name), field.name)) for result in (with_check, without))
            assert checked == unchecked, field.name


def test_where_64_pictures_are_too_many_for_the_memory_the_batch_size_of_the_evaluation_is_taken(make_method, evaluated):
    method, classifier = make_method("cam")
    sizes = []

    def small(module, inputs):
        sizes.append(len(inputs[0]))
        if sizes[-1] > 9:
            raise torch.OutOfMemoryError("too many")

    classifier.register_forward_pre_hook(small)
    assert evaluated(classifier, {"cam": method}, batch_size=9)["cam"].invariance["holds"]
    assert sizes[3 + 27 :][:4] == [27, 9, 9, 9]


def test_an_error_of_the_check_says_where_it_arose(make_method, evaluated):
    method, classifier = make_method("cam")

    def never_alone(module, inputs):
        if len(inputs[0]) == 1:
            raise ValueError("more than one, please")

    classifier.register_forward_pre_hook(never_alone)
    with pytest.raises(ValueError, match="more than one") as raised:
        evaluated(classifier, {"cam": method})
    assert raised.value.__notes__ == ["in the invariance check, in batches of 1"]


def test_a_cell_that_fails_the_check_is_recorded_and_says_so(go, project):
    METHODS.register("over-batch-test", title="OverBatch", kind="posthoc", trains_as="cam")(OverBatchMaximum)
    try:
        outcome = go(run__methods=["cam", "over-batch-test"], run__guidance=["none"])
        records = {record.cell.method: record for _, record in read_records(project / "results")}
    finally:
        METHODS._entries.pop("over-batch-test")
    assert (len(outcome.ran), outcome.failed) == (2, {})
    assert records["cam"].invariance["holds"]
    assert not records["over-batch-test"].invariance["holds"]


def test_differences_know_no_scale():
    logits, maps = torch.randn(5, 3), torch.rand(5, 4, 4)
    changed_logits, changed_maps = logits + 0.01 * torch.randn(5, 3), maps + 0.01 * torch.rand(5, 4, 4)
    assert logit_difference(changed_logits * 8, logits * 8) == pytest.approx(logit_difference(changed_logits, logits))
    assert map_difference(changed_maps * 8, maps * 8) == pytest.approx(map_difference(changed_maps, maps), rel=1e-5)
    assert (logit_difference(logits, logits), map_difference(maps, maps)) == (0, 0)


def test_maps_that_vanish_in_both_are_alike_and_in_one_are_not():
    blank, maps = torch.zeros(3, 4, 4), torch.rand(3, 4, 4)
    assert map_difference(blank, blank) == 0
    assert map_difference(torch.cat([blank[:2], maps[2:]]), maps) == 1


def test_a_single_map_may_be_one_of_a_tie_that_rounding_decides():
    maps = torch.rand(9, 4, 4)
    changed = maps.clone()
    changed[4] = torch.rand(4, 4)
    assert map_difference(changed, maps) < TOLERANCE
    changed[7] = torch.rand(4, 4)
    assert map_difference(changed, maps) > TOLERANCE


def test_the_only_map_must_agree():
    maps = torch.rand(1, 4, 4)
    assert map_difference(maps.flip(1), maps) > TOLERANCE


def test_the_range_of_a_single_map_may_be_one_of_rounding():
    maps = torch.rand(9, 4, 4)
    scale = torch.ones(9, 1, 1)
    scale[4] = 1.5
    assert map_difference(maps * scale, maps) < 1e-6
    assert map_difference(maps * 1.5, maps) == pytest.approx(1 / 3)
