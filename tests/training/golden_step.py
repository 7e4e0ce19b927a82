"""One optimisation step of ResNet-50 with a method and guidance at layer 5, as in tests/golden/train_step.npz, in double precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.backbone import BACKBONES
from bench.config import TrainConfig
from bench.method import Batch, Classifier, Method
from bench.training.build import head_parameters
from bench.training.optimiser import build_optimiser, set_learning_rate
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from tests.golden_weights import fill, pictures

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did. Parameters and buffers go by their names in our classifier."""

    golden: Callable[[str], Any]
    """Key of train_step.npz without method and ``_f64`` -> figure of the published code."""
    published: Callable[[str], str]
    """Our name of a tensor -> the published one."""
    published_norms: dict[str, float]
    """Published name of a parameter -> norm of its gradient, for some."""
    losses: dict[str, float]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    update: float
    """Norm of the change of all parameters."""
    second: float
    """Loss of the same batch after the step."""

    def assert_agrees(self, *, head_bias: str) -> None:
        """Compare everything that every method has; ``head_bias`` is our name of the parameter behind ``grad_head_bias``."""
        golden = self.golden
        assert self.losses["classification"] == pytest.approx(float(golden("loss_ce")), rel=1e-8)
        assert self.losses["guidance"] == pytest.approx(float(golden("loss_align")), rel=1e-6)
        assert self.losses["loss"] == pytest.approx(float(golden("loss")), rel=1e-6)
        total = torch.sqrt(sum((g**2).sum() for g in self.gradients.values()))
        assert total.item() == pytest.approx(float(golden("grad_norm_total")), rel=1e-6)
        bn1, head = self.gradients["backbone.net.bn1.weight"], self.gradients[head_bias]
        torch.testing.assert_close(bn1, torch.from_numpy(golden("grad_bn1_weight")), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(head, torch.from_numpy(golden("grad_head_bias")), rtol=1e-6, atol=1e-10)
        norms = {self.published(name).replace("/", "."): g.norm().item() for name, g in self.gradients.items()}
        for name, norm in self.published_norms.items():
            assert norms[name] == pytest.approx(norm, rel=1e-6), name
        mean = self.buffers["backbone.net.bn1.running_mean"]
        torch.testing.assert_close(mean, torch.from_numpy(golden("bn1_running_mean")), rtol=1e-8, atol=1e-10)
        assert self.update == pytest.approx(float(golden("update_norm_total")), rel=1e-6)
        assert self.second == pytest.approx(float(golden("loss_second_step")), rel=1e-5)


def golden_batch() -> Batch:
    """The batch of four of train_step.npz: pictures, labels and AU maps in double precision."""
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
    return Batch(
        positions=torch.arange(4), seeds=torch.zeros(4, dtype=torch.int64), images=images, labels=labels, au_maps=maps, au_valid=labels != 0
    )


def take_step(method: Method, *, key: str, published_head: Callable[[str], str]) -> Step:
    """Take the step.

    Args:
        method: in the variant ``official``, with the options of the published run.
        key: of the method in train_step.npz.
        published_head: our name of a head's tensor -> the published one.
    """
    golden = np.load(GOLDEN / "train_step.npz", allow_pickle=False)
    batch = golden_batch()
    entry = BACKBONES.get("resnet50").target
    backbone = entry.build(entry.Options(large_maps=True), image_size=224)
    classifier: Classifier = method.classifier(backbone, num_classes=7)

    def published(name: str) -> str:
        return name.replace("backbone.net.", "encoder/") if name.startswith("backbone.") else f"classification_head/{published_head(name)}"

    fill(classifier, published, gain=float(golden["gain"]))
    task = TrainingTask(classifier.double(), method, GuidanceTerm(weight=9.0, layers=(5,))).train()
    config = TrainConfig(lr=0.002, momentum=0.9, weight_decay=5e-4, optimizer="sgd")
    optimiser = build_optimiser(backbone, head_parameters(classifier), config)
    set_learning_rate(optimiser, config.lr)
    share = guided_share(int(batch.au_valid.sum()), parts=1)
    before = [p.detach().clone() for p in classifier.parameters()]
    result = task(batch, share)
    result["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in classifier.named_parameters()}
    buffers = {name: b.clone() for name, b in classifier.named_buffers()}
    optimiser.step()
    update = torch.sqrt(sum(((p.detach() - b) ** 2).sum() for p, b in zip(classifier.parameters(), before, strict=True)))
    with torch.no_grad():
        second = task(batch, share)["loss"]
    return Step(
        golden=lambda name: golden[f"{key}_{name}_f64"],
        published=published,
        published_norms={str(n): float(v) for n, v in zip(golden[f"{key}_grad_names"], golden[f"{key}_grad_norm_f64"], strict=True)},
        losses={name: value.item() for name, value in result.items()},
        gradients=gradients,
        buffers=buffers,
        update=update.item(),
        second=second.item(),
    )
