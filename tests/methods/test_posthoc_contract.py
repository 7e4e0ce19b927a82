"""What every read-out of a pooled linear classifier promises, whatever its formula."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.backbone import BACKBONES
from bench.evaluation.maps import min_max
from bench.method import METHODS, Batch
from bench.sweep.store import read_records
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.methods import posthoc

READERS = [(name, {}) for name in posthoc.ALL] + [
    ("layercam", {"layers": (2, 3, 4)}),
    ("scorecam", {"channels": 3}),
    ("eigencam", {"centre": True}),
]


@pytest.fixture
def net():
    return posthoc.tiny(11, channels=7, classes=5)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_one_forward_pass_serves_all_closed_forms(net, variant):
    images, labels = posthoc.draw(0, count=3, classes=5)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    net.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        output = net(images)
        maps = {name: posthoc.method(name, variant).maps(net, output, labels) for name in posthoc.CLOSED}
    assert len(calls) == 2
    assert {m.shape for m in maps.values()} == {(3, 3, 3)}
    assert len({m.sum().item() for m in maps.values()}) >= 6, "most of them are maps of their own"


@pytest.mark.parametrize(("name", "options"), READERS)
def test_no_map_depends_on_who_else_is_in_the_batch(net, name, options):
    images, labels = posthoc.draw(1, count=5, classes=5)
    method = posthoc.method(name, **options)
    whole = posthoc.read(method, net, images, labels)
    order = torch.tensor([3, 0, 4])
    torch.testing.assert_close(posthoc.read(method, net, images[order], labels[order]), whole[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(posthoc.read(method, net, images[2:3], labels[2:3]), whole[2:3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), READERS)
def test_reading_twice_gives_the_same_bits(net, name, options):
    images, labels = posthoc.draw(2, count=2, classes=5)
    first, second = (posthoc.read(posthoc.method(name, **options), net, images, labels) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "options"), READERS)
@pytest.mark.parametrize("inference", [True, False])
def test_gradients_modes_values_and_randomness_stay_untouched(net, name, options, inference):
    images, labels = posthoc.draw(3, count=2, classes=5)
    net.head.weight.grad = torch.full_like(net.head.weight, 3.0)
    net.backbone.convs[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    with torch.inference_mode(inference):
        output = net(images)
        output.images = images
        layers = {layer: features.clone() for layer, features in output.layers.items()}
        posthoc.method(name, **options).maps(net, output, labels)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in net.modules())
    assert (net.head.weight.grad == 3).all()
    assert all(p.grad is None for p in net.parameters() if p is not net.head.weight)
    assert [p.requires_grad for p in net.backbone.convs.parameters()] == [False] + [True] * 7
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(output.layers[layer], features) for layer, features in layers.items())


@pytest.mark.parametrize("name", posthoc.CLOSED)
def test_closed_forms_need_neither_the_picture_nor_a_mode(net, name):
    images, labels = posthoc.draw(4, count=2, classes=5)
    net.train()
    with torch.inference_mode():
        maps = posthoc.method(name).maps(net, net(images), labels)
    assert all(module.training for module in net.modules())
    assert maps.isfinite().all()


@pytest.mark.parametrize(("name", "options"), READERS)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_network_that_says_nothing_has_maps_of_zeros(net, name, options, variant):
    images, labels = posthoc.draw(5, count=2, classes=5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    maps = posthoc.read(posthoc.method(name, variant, **options), net, images, labels)
    assert not min_max(maps).any()


@pytest.mark.parametrize(("name", "options"), READERS)
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("where", ["head.weight", "backbone.convs.3.weight"])
def test_nan_weights_give_maps_with_defined_values(net, name, options, variant, where):
    images, labels = posthoc.draw(6, count=2, classes=5)
    with torch.no_grad():
        net.get_parameter(where).fill_(float("nan"))
    maps = min_max(posthoc.read(posthoc.method(name, variant, **options), net, images, labels))
    assert maps.isfinite().all()
    assert ((maps >= 0) & (maps <= 1)).all()


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("name", posthoc.ALL)
def test_a_training_step_and_its_maps_on_a_network_of_the_project(name, variant):
    entry = BACKBONES.get("mini").target
    torch.manual_seed(0)
    method = posthoc.method(name, variant, **({"channels": 4} if name == "scorecam" else {}))
    classifier = method.classifier(entry.build(entry.Options(width=8), image_size=32), num_classes=7)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(5,))).train()
    zeros = torch.zeros(4, dtype=torch.int64)
    batch = Batch(positions=zeros, seeds=zeros, images=images, labels=labels, au_maps=torch.rand(4, 8, 8), au_valid=labels > 0)
    before = classifier.head.weight.detach().clone()
    task(batch, guided_share(3, parts=1))["loss"].backward()
    torch.optim.SGD(task.parameters(), lr=0.1).step()
    assert (classifier.head.weight != before).any()
    gradients = [p.grad.clone() for p in task.parameters()]
    maps = posthoc.read(method, classifier.eval(), images, labels)
    assert maps.shape == (4, 4, 4)
    assert maps.isfinite().all()
    assert all(torch.equal(p.grad, g) for p, g in zip(task.parameters(), gradients, strict=True))


def test_which_of_them_all_names():
    listed = {entry.name for entry in METHODS if entry.name in posthoc.ALL and entry.info.in_all}
    assert listed == {"cam", "gradcam", "gradcampp", "layercam"}
    assert {METHODS.get(name).info.trains_as for name in posthoc.ALL if name != "cam"} == {"cam"}
    assert all(METHODS.get(name).info.doi and METHODS.get(name).info.year for name in posthoc.ALL)


def test_a_run_of_all_read_outs_trains_once(go, project):
    outcome = go(
        run__methods=list(posthoc.ALL), run__guidance=["none"], methods__scorecam={"channels": 4}, methods__layercam={"layers": [3, 5]}
    )
    assert (len(outcome.ran), outcome.trained, outcome.failed) == (len(posthoc.ALL), 1, {})
    logits = {record.metrics["cl"]["accuracy"] for _, record in read_records(project / "results")}
    assert len(logits) == 1
