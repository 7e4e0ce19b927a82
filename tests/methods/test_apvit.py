"""APViT against the published code's figures, and the rules of the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.backbone import BACKBONES
from bench.evaluation.maps import attention_cosines, map_cosines, min_max
from bench.method import METHODS, Batch, Classifier, Method
from bench.training.guidance import layer_attention
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import pictures, tensor_for

GOLDEN = Path(__file__).parents[1] / "golden"


def build(variant: str, backbone: str = "mini-apvit", *, size: int = 32, **options: object) -> tuple[Method, Classifier]:
    torch.manual_seed(3)
    network, method = BACKBONES.get(backbone).target, METHODS.get("apvit").target
    apvit = method(method.Options(), variant=variant)
    return apvit, apvit.classifier(network.build(network.Options.model_validate(options), image_size=size), num_classes=7).eval()


def published_tensor(name: str, shape: tuple[int, ...], *, gain: float) -> torch.Tensor:
    """A tensor of our classifier from the published names: the position embedding is one tensor here, two there."""
    name = name.removeprefix("backbone.").replace("vit.patch_embed.proj.", "vit.projs.0.").replace("head.", "classification_head.fc.")
    if name == "vit.pos_embed":
        own, rest = (1, 1, shape[2]), (1, shape[1] - 1, shape[2])
        parts = [tensor_for("vit.cls_pos_embed", own, gain=gain), tensor_for("vit.patch_pos_embed", rest, gain=gain)]
        return torch.cat(parts, dim=1)
    return tensor_for(name, shape, gain=gain)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """The weights behind both files."""
    _, classifier = build("official", "apvit", size=112)
    return {name: published_tensor(name, tuple(value.shape), gain=0.6) for name, value in classifier.state_dict().items()}


@pytest.fixture(
    scope="module", params=[("APVIT", {}), ("APVIT_variant", {"keep_patches": 120, "keep_rate": 0.7})], ids=["default", "variant"]
)
def golden(request, published):
    name, options = request.param
    figures = dict(np.load(GOLDEN / f"official_{name}.npz", allow_pickle=False))
    assert float(figures["gain"]) == 0.6
    method, classifier = build("official", "apvit", size=112, **options)
    classifier.load_state_dict(published)
    tokens: list[int] = []
    for block in classifier.backbone.vit.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    images = pictures("images", count=3, size=112)
    assert [images.double().sum().item(), images.double().abs().sum().item()] == pytest.approx(figures["image_digest"].tolist(), rel=1e-9)
    with torch.inference_mode():
        output = classifier(images)
    return figures, method, classifier, output, tokens


def agree(value: torch.Tensor, expected: np.ndarray, *, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(value, torch.from_numpy(expected), rtol=rtol, atol=atol)


def test_logits_and_maps_are_the_published_codes(golden):
    figures, method, classifier, output, _ = golden
    maps = method.maps(classifier, output, torch.from_numpy(figures["labels"]))
    agree(output.logits, figures["logits"], atol=1e-4)
    agree(maps, figures["maps_raw"], atol=1e-4, rtol=1e-5)
    agree(min_max(maps), figures["maps"], atol=1e-4)


def test_as_many_tokens_are_left_after_each_block_as_in_the_published_code(golden):
    figures, _, _, _, tokens = golden
    assert tokens == figures["tokens_after_block"].tolist()


def test_published_token_counts_are_those_of_the_paper():
    figures = np.load(GOLDEN / "official_APVIT.npz", allow_pickle=False)
    assert figures["tokens_after_block"].tolist() == [161, 161, 161, 161, 145, 130, 117, 105]


def test_cosines_and_layer_attention_are_the_published_codes(golden):
    figures, method, classifier, output, _ = golden
    if "attention_layer1" in figures:
        agree(layer_attention(output.layers[1]), figures["attention_layer1"], atol=1e-5)
    au = np.load(GOLDEN / "au_maps.npz", allow_pickle=False)
    columns = [str(name) for name in au["expressions"]]
    chosen = [au["maps_224"][i, columns.index(str(e))] for i, e in zip(figures["au_index"], figures["au_expression"], strict=True)]
    au_maps = torch.from_numpy(np.stack(chosen).astype(np.float32)[:, ::2, ::2].copy())
    of_layer = attention_cosines(layer_attention(output.layers[1]), au_maps)
    of_map = map_cosines(method.maps(classifier, output, torch.from_numpy(figures["labels"])), au_maps)
    agree(torch.stack([of_layer, of_map], dim=1), figures["cosines"], atol=1e-4)


def test_the_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        _, classifier = build("official", "apvit", size=112)
    assert sum(p.numel() for p in classifier.parameters()) == 65_209_543
    # 389 published tensors: the two position embeddings are one here.
    assert len(classifier.state_dict()) == 388


def test_only_the_papers_classifier_starts_at_zero():
    _, paper = build("paper")
    _, official = build("official")
    assert not paper.head.weight.any()
    assert not paper.head.bias.any()
    assert official.head.weight.abs().min() > 0


def test_map_is_the_sum_of_absolute_projected_features_whatever_the_class():
    method, classifier = build("official", size=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        output = classifier(images)
        projected = classifier.backbone.vit.patch_embed.proj(classifier.backbone.extractor(images))
        maps = method.maps(classifier, output, torch.tensor([0, 6]))
        assert torch.equal(maps, method.maps(classifier, output, torch.tensor([3, 1])))
    expected = torch.zeros(2, 8, 8)
    for channel in range(projected.shape[1]):
        expected += projected[:, channel].abs()
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


def test_logits_and_maps_do_not_depend_on_the_batch():
    method, classifier = build("official")
    images, classes = torch.randn(14, 3, 32, 32), torch.arange(14) % 7  # 14 tokens enter the first pruning block
    with torch.inference_mode():
        together = classifier(images)
        for i in range(14):
            alone = classifier(images[i : i + 1])
            torch.testing.assert_close(together.logits[i : i + 1], alone.logits, rtol=0, atol=1e-5)
            expected = method.maps(classifier, alone, classes[i : i + 1])
            torch.testing.assert_close(method.maps(classifier, together, classes)[i : i + 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("layer", [1, 2])
def test_one_guided_step_trains_the_classifier_and_leaves_a_map(variant, layer):
    method, classifier = build(variant, width=8, dim=32)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(layer,))).train()
    batch = Batch(
        positions=torch.arange(4),
        seeds=torch.arange(4),
        images=torch.randn(4, 3, 32, 32),
        labels=torch.tensor([4, 0, 2, 6]),
        au_maps=torch.rand(4, 28, 28),
        au_valid=torch.tensor([True, False, True, True]),
    )
    optimiser = torch.optim.SGD(task.parameters(), lr=0.01)
    first = task(method.mix(batch), guided_share(3, parts=1))
    first["loss"].backward()
    assert first["guidance"] > 0
    assert all(p.grad is not None for p in task.parameters())
    assert classifier.head.weight.grad.abs().max() > 0
    assert classifier.backbone.extractor.input_layer[0].weight.grad.abs().max() > 0  # by the guidance, also below a zero head
    optimiser.step()
    gradients = [p.grad.clone() for p in task.parameters()]
    with torch.inference_mode():
        maps = method.maps(classifier, classifier(batch.images), batch.labels)
    assert maps.shape == (4, 4, 4)
    assert maps.isfinite().all()
    assert classifier.training
    assert all(torch.equal(p.grad, g) for p, g in zip(task.parameters(), gradients, strict=True))
