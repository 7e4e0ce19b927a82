"""The closed forms against plain autograd in double precision, one sample at a time, as the papers write them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.backbone import BACKBONES
from bench.evaluation.maps import min_max
from bench.methods.cam import GAPClassifier
from bench.methods.gradcampp import channel_weights
from tests.methods import posthoc

nets = st.fixed_dictionaries(
    {"seed": st.integers(0, 10**6), "channels": st.integers(1, 9), "classes": st.integers(2, 7), "count": st.integers(1, 4)}
)
checked = settings(max_examples=20)


def case(net, **more):
    classifier = posthoc.tiny(net["seed"], channels=net["channels"], classes=net["classes"], **more)
    return classifier, *posthoc.draw(net["seed"], count=net["count"], classes=net["classes"])


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


FORMULAS = [
    ("gradcam", "paper", posthoc.gradcam),
    ("gradcam", "official", posthoc.gradcam),
    ("gradcampp", "paper", posthoc.gradcampp),
    ("gradcampp", "official", posthoc.gradcampp_official),
    ("layercam", "paper", posthoc.layercam),
    ("layercam", "official", posthoc.layercam),
    ("hirescam", "paper", posthoc.cam),
    ("xgradcam", "paper", posthoc.xgradcam),
]


@pytest.mark.parametrize(("name", "variant", "formula"), FORMULAS)
@checked
@given(net=nets)
def test_closed_form_is_autograd(name, variant, formula, net):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method(name, variant), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):
        same(actual, formula(*posthoc.pull(classifier, image, label)))


@pytest.mark.parametrize(("name", "formula"), [("gradcam", posthoc.gradcam), ("layercam", posthoc.layercam), ("hirescam", posthoc.cam)])
@checked
@given(net=nets)
def test_closed_form_is_autograd_without_a_last_relu(name, formula, net):
    classifier, images, labels = case(net, rectified=False)
    maps = posthoc.read(posthoc.method(name), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):
        same(actual, formula(*posthoc.pull(classifier, image, label)))


@checked
@given(net=nets)
def test_ablationcam_is_the_drop_of_the_logit_when_each_channel_is_zeroed(net):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method("ablationcam"), classifier, images, labels)
    with torch.no_grad():
        for image, label, actual in zip(images, labels, maps, strict=True):
            whole = classifier(image[None])
            logit, last = whole.logits[0, label], whole.layers[4][0]
            expected = torch.zeros_like(last[0])
            for k in range(net["channels"]):

                def ablate(module, inputs, features, k=k):
                    features.layers[4] = features.layers[4].index_fill(1, torch.tensor([k]), 0)
                    return features

                handle = classifier.backbone.register_forward_hook(ablate)
                without = classifier(image[None]).logits[0, label]
                handle.remove()
                expected += (logit - without) / logit * last[k]
            same(actual, expected.relu())


def test_ablationcam_of_a_logit_of_zero_is_zero():
    classifier = posthoc.tiny(0)
    torch.nn.init.zeros_(classifier.head.bias)
    torch.nn.init.zeros_(classifier.head.weight)
    images, labels = posthoc.draw(0, count=2, classes=4)
    assert not posthoc.read(posthoc.method("ablationcam"), classifier, images, labels).any()


@checked
@given(net=nets, gamma=st.floats(0, 2), references=st.integers(1, 6))
def test_finercam_is_gradcam_of_the_logit_minus_those_nearest_to_it(net, gamma, references):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method("finercam", gamma=gamma, references=references), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):

        def score(logits, label=label):
            rivals = [c for c in range(net["classes"]) if c != label]
            nearest = sorted(rivals, key=lambda c: abs((logits[c] - logits[label]).item()))[:references]
            return logits[label] - gamma * sum(logits[c] for c in nearest) / len(nearest)

        same(actual, posthoc.gradcam(*posthoc.pull(classifier, image, label, score=score)))


@checked
@given(net=nets)
def test_finercam_has_the_published_gamma_and_three_references(net):
    classifier, images, labels = case(net)
    default, explicit = posthoc.method("finercam"), posthoc.method("finercam", gamma=0.6, references=3)
    torch.testing.assert_close(
        posthoc.read(default, classifier, images, labels), posthoc.read(explicit, classifier, images, labels), rtol=0, atol=0
    )


@pytest.mark.parametrize("centre", [False, True])
@checked
@given(net=nets, rectified=st.booleans())
def test_eigencam_is_the_first_singular_vector_with_the_sign_of_the_mean_activation(centre, net, rectified):
    for channels in (net["channels"], 30):  # fewer and more channels than the 9 pixels
        classifier = posthoc.tiny(net["seed"], channels=channels, classes=net["classes"], rectified=rectified)
        images, labels = posthoc.draw(net["seed"], count=net["count"], classes=net["classes"])
        maps = posthoc.read(posthoc.method("eigencam", centre=centre), classifier, images, labels)
        for image, actual in zip(images, maps, strict=True):
            activations = classifier(image[None]).layers[4][0].detach().flatten(1).T  # pixels x channels
            mean = activations.mean(dim=1)
            if centre:
                activations = activations - activations.mean(dim=0)
            _, singular, right = torch.linalg.svd(activations, full_matrices=False)
            if len(singular) > 1 and singular[1] > 0.999 * singular[0]:
                continue  # the first vector is not defined
            expected = activations @ right[0]
            correlation = ((expected - expected.mean()) * (mean - mean.mean())).sum()
            if correlation.abs() < 1e-9:
                continue  # neither is its sign
            torch.testing.assert_close(actual.flatten(), expected * correlation.sign(), rtol=1e-7, atol=1e-7)


def test_eigencam_of_a_sample_with_nan_leaves_the_others_alone():
    classifier = posthoc.tiny(3)
    images, labels = posthoc.draw(3, count=3, classes=4)
    broken = images.clone()
    broken[1, 0, 0, 0] = float("nan")
    whole, hurt = (posthoc.read(posthoc.method("eigencam"), classifier, x, labels) for x in (images, broken))
    torch.testing.assert_close(hurt[[0, 2]], whole[[0, 2]])
    assert hurt[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_eigencam_holds_at_any_scale_of_the_activations(scale):
    classifier = posthoc.tiny(3).float()
    images, labels = posthoc.draw(3, count=3, classes=4)
    output = classifier(images.float())
    maps = min_max(posthoc.method("eigencam").maps(classifier, output, labels))
    output.layers[4] = output.layers[4] * scale
    torch.testing.assert_close(min_max(posthoc.method("eigencam").maps(classifier, output, labels)), maps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["softmax", "increase"])
@pytest.mark.parametrize("kept", [None, 2])
@settings(max_examples=8)
@given(net=nets, chunk=st.integers(1, 9))
def test_scorecam_weighs_channels_by_the_logit_of_the_masked_picture(weights, kept, net, chunk):
    classifier, images, labels = case(net)
    method = posthoc.method("scorecam", weights=weights, channels=kept, chunk=chunk)
    maps = posthoc.read(method, classifier, images, labels)
    with torch.no_grad():
        baseline = classifier(torch.zeros(1, 3, 12, 12, dtype=torch.float64)).logits[0]
        for image, label, actual in zip(images, labels, maps, strict=True):
            last = classifier(image[None]).layers[4][0]
            chosen = sorted(range(len(last)), key=lambda k: -float(((last[k] - last[k].mean()) ** 2).mean()))[:kept]
            increases = []
            for k in chosen:
                mask = F.interpolate(last[k][None, None], size=(12, 12), mode="bilinear")[0, 0]
                span = mask.max() - mask.min()
                mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
                increases.append(classifier((image * mask)[None]).logits[0, label] - baseline[label])
            score = torch.stack(increases)
            score = score.exp() / score.exp().sum() if weights == "softmax" else score
            same(actual, sum(w * last[k] for w, k in zip(score, chosen, strict=True)).relu())


def test_scorecam_asks_the_network_once_for_true_and_predicted_classes():
    classifier = posthoc.tiny(1)
    images, labels = posthoc.draw(1, count=2, classes=4)
    method = posthoc.method("scorecam")
    with torch.inference_mode():
        output = classifier(images)
        output.images = images
        method.maps(classifier, output, labels)
        calls = []
        classifier.register_forward_hook(lambda *_: calls.append(1))
        again = method.maps(classifier, output, (labels + 1) % 4)
    assert not calls
    torch.testing.assert_close(again, posthoc.read(posthoc.method("scorecam"), classifier, images, (labels + 1) % 4), rtol=0, atol=0)


@settings(max_examples=8)
@given(net=nets, samples=st.integers(1, 3), noise=st.floats(0.01, 0.5))
def test_smoothgradcampp_is_the_mean_of_gradcampp_over_noisy_copies(net, samples, noise):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method("smoothgradcampp", samples=samples, noise=noise, seed=7), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):
        generator = torch.Generator().manual_seed(7)
        expected = torch.zeros_like(actual)
        for _ in range(samples):
            sigma = noise * (image.max() - image.min())
            noisy = image + sigma * torch.randn(3, 12, 12, generator=generator).double()
            expected += min_max(posthoc.gradcampp(*posthoc.pull(classifier, noisy, label))) / samples
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=8)
@given(net=nets)
def test_averaging_derivatives_over_noise_instead_would_be_gradcampp_itself(net):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method("gradcampp"), classifier, images, labels)
    generator = torch.Generator().manual_seed(0)
    for image, label, expected in zip(images, labels, maps, strict=True):
        clean, _ = posthoc.pull(classifier, image, label)
        noisy = [posthoc.pull(classifier, image + torch.randn(3, 12, 12, generator=generator).double(), label)[1] for _ in range(3)]
        first, second, third = (sum(g**power for g in noisy) / len(noisy) for power in (1, 2, 3))
        below = 2 * second + (clean * third).sum(dim=(1, 2), keepdim=True)
        alpha = torch.where(second > 0, second / below, 0)
        same((((alpha * first.relu()).sum(dim=(1, 2), keepdim=True)) * clean).sum(dim=0).relu(), expected)


def test_smoothgradcampp_without_noise_is_gradcampp():
    classifier = posthoc.tiny(5)
    images, labels = posthoc.draw(5, count=3, classes=4)
    smooth = posthoc.read(posthoc.method("smoothgradcampp", noise=0), classifier, images, labels)
    same(smooth, min_max(posthoc.read(posthoc.method("gradcampp"), classifier, images, labels)))


@pytest.mark.parametrize("layers", [(4,), (3,), (1,), (3, 4), (4, 1), (1, 2, 3, 4)])
@settings(max_examples=5)
@given(net=nets)
def test_layercam_fuses_layers_as_the_paper_says(layers, net):
    classifier, images, labels = case(net)
    maps = posthoc.read(posthoc.method("layercam", layers=layers), classifier, images, labels)
    for image, label, actual in zip(images, labels, maps, strict=True):
        single = {layer: posthoc.layercam(*posthoc.pull(classifier, image, label, layer)) for layer in layers}
        if len(layers) == 1:
            same(actual, single[layers[0]])
            continue
        size = max(len(m) for m in single.values())
        expected = torch.zeros(size, size, dtype=torch.float64)
        for layer, own in single.items():
            scaled = own / own.max() if own.max() > 0 else own
            if layer <= 2:
                scaled = torch.tanh(2 * scaled)
            expected = torch.maximum(expected, F.interpolate(scaled[None, None], size=(size, size), mode="bilinear")[0, 0])
        same(actual, expected)


def test_layercam_of_an_earlier_layer_of_a_network_with_channels_last_is_that_of_its_own_tensors():
    torch.manual_seed(0)
    backbone = BACKBONES.get("timm:mambaout_femto").target
    classifier = GAPClassifier(backbone.build(backbone.Options(), image_size=64), num_classes=7).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 5])
    maps = posthoc.read(posthoc.method("layercam", layers=(3,)), classifier, images, labels)
    tensors = classifier.backbone.net(images.requires_grad_())  # (B, h, w, C), as timm's network computes with them
    logits = classifier.head(tensors[-1].mean(dim=(1, 2)))
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), tensors[2])
    expected = (gradient.relu() * tensors[2]).sum(dim=3).relu()
    assert expected.amax() > 0
    torch.testing.assert_close(maps, expected.detach())


def test_layercam_of_an_unknown_layer_says_which_there_are():
    classifier = posthoc.tiny(0)
    images, labels = posthoc.draw(0, count=1, classes=4)
    with pytest.raises(ValueError, match=r"layer 5; this network has the layers 1, 2, 3, 4; --set methods\.layercam\.layers=\[4\]"):
        posthoc.read(posthoc.method("layercam", layers=(4, 5)), classifier, images, labels)


@checked
@given(
    weights=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    level=st.floats(-1e6, 1e6),
)
def test_gradcampp_weights_are_finite_and_at_most_half_of_the_heads_whatever_the_activations(weights, level):
    heads = torch.tensor([weights], dtype=torch.float64)
    actual = channel_weights(heads, torch.full((1, len(weights), 3, 3), level, dtype=torch.float64))
    assert (actual >= 0).all()
    assert (actual <= heads.relu() / 2).all()


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_gradcampp_does_not_underflow_with_small_weights(variant, scale):
    """The trap of fixed epsilons: with weights of 1e-6, g^3 is 1e-27 on 28 x 28 maps."""
    generator = torch.Generator().manual_seed(0)
    classifier = posthoc.tiny(0).float()
    images = torch.randn(2, 3, 112, 112, generator=generator)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        classifier.head.weight.mul_(scale)
    actual = min_max(posthoc.read(posthoc.method("gradcampp", variant), classifier, images, labels))
    exact = min_max(posthoc.read(posthoc.method("gradcampp", variant), classifier.double(), images.double(), labels))
    assert actual.shape[1:] == (28, 28)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5)
    assert actual.amax() == 1
