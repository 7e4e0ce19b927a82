"""One optimisation step of ResNet-50 with CAM and guidance against the published code in double precision (tests/golden/train_step.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.backbone import BACKBONES
from bench.config import TrainConfig
from bench.method import METHODS, Batch
from bench.training.build import head_parameters
from bench.training.optimiser import build_optimiser, set_learning_rate
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"
EXPRESSIONS = ("Happiness", "Surprise", "Fear", "Anger", "Disgust", "Sadness")


def _published_name(name: str) -> str:
    return name.replace("backbone.net.", "encoder/") if name.startswith("backbone.") else name.replace("head.", "classification_head/fc.")


@pytest.fixture(scope="module")
def step():
    golden = np.load(GOLDEN / "train_step.npz", allow_pickle=False)
    au = np.load(GOLDEN / "au_maps.npz", allow_pickle=False)
    names = [str(n) for n in au["expressions"]]
    labels = torch.from_numpy(golden["labels"])
    maps = torch.zeros(4, 224, 224, dtype=torch.float64)
    for i, (face, expression) in enumerate(zip(golden["au_index"], golden["au_expression"], strict=True)):
        if expression != "Neutral":
            maps[i] = torch.from_numpy(au["maps_224"][face, names.index(str(expression))].astype(np.float64))
    images = pictures("train_images", count=4, size=224).double()
    assert [images.sum().item(), images.abs().sum().item()] == pytest.approx(golden["image_digest"].tolist(), rel=1e-9)

    entry = BACKBONES.get("resnet50").target
    backbone = entry.build(entry.Options(large_maps=True), image_size=224)
    cam = METHODS.get("cam").target
    method = cam(cam.Options(), variant="official")
    classifier = method.classifier(backbone, num_classes=7)
    fill(classifier, _published_name, gain=float(golden["gain"]))
    task = TrainingTask(classifier.double(), method, GuidanceTerm(weight=9.0, layers=(5,))).train()
    config = TrainConfig(lr=0.002, momentum=0.9, weight_decay=5e-4, optimizer="sgd")
    optimiser = build_optimiser(backbone, head_parameters(classifier), config)
    set_learning_rate(optimiser, config.lr)
    batch = Batch(
        positions=torch.arange(4), seeds=torch.zeros(4, dtype=torch.int64), images=images, labels=labels, au_maps=maps, au_valid=labels != 0
    )
    before = [p.detach().clone() for p in classifier.parameters()]
    result = task(batch, guided_share(int(batch.au_valid.sum()), parts=1))
    result["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in classifier.named_parameters()}
    buffers = {name: b.clone() for name, b in classifier.named_buffers()}
    optimiser.step()
    update = torch.sqrt(sum(((p.detach() - b) ** 2).sum() for p, b in zip(classifier.parameters(), before, strict=True)))
    with torch.no_grad():
        second = task(batch, guided_share(3, parts=1))["loss"]
    return golden, result, gradients, buffers, update, second


@pytest.mark.slow
def test_losses_agree(step):
    golden, result, *_ = step
    assert result["classification"].item() == pytest.approx(float(golden["CAM_loss_ce_f64"]), rel=1e-8)
    assert result["guidance"].item() == pytest.approx(float(golden["CAM_loss_align_f64"]), rel=1e-6)
    assert result["loss"].item() == pytest.approx(float(golden["CAM_loss_f64"]), rel=1e-6)


@pytest.mark.slow
def test_gradients_agree(step):
    golden, _, gradients, *_ = step
    total = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert total.item() == pytest.approx(float(golden["CAM_grad_norm_total_f64"]), rel=1e-6)
    torch.testing.assert_close(
        gradients["backbone.net.bn1.weight"], torch.from_numpy(golden["CAM_grad_bn1_weight_f64"]), rtol=1e-5, atol=1e-8
    )
    torch.testing.assert_close(gradients["head.bias"], torch.from_numpy(golden["CAM_grad_head_bias_f64"]), rtol=1e-6, atol=1e-10)


@pytest.mark.slow
def test_batch_statistics_agree(step):
    golden, _, _, buffers, *_ = step
    torch.testing.assert_close(
        buffers["backbone.net.bn1.running_mean"], torch.from_numpy(golden["CAM_bn1_running_mean_f64"]), rtol=1e-8, atol=1e-10
    )


@pytest.mark.slow
def test_the_update_and_the_next_loss_agree(step):
    golden, *_, update, second = step
    assert update.item() == pytest.approx(float(golden["CAM_update_norm_total_f64"]), rel=1e-6)
    assert second.item() == pytest.approx(float(golden["CAM_loss_second_step_f64"]), rel=1e-5)
