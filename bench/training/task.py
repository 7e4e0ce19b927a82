"""The training task: one module around classifier and losses, so that one call of it is one step (timm's TrainingTask shape)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from bench.method import Batch, Classifier, Method
from bench.training.guidance import layer_attention, misalignment


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceTerm:
    """The guidance loss: ``weight`` * mean over ``layers`` and valid samples of 1 - cosine(attention, AU map)."""

    weight: float
    layers: tuple[int, ...]


class TrainingTask(nn.Module):
    """Classifier, classification loss of the method, guidance term; what DDP wraps."""

    def __init__(self, classifier: Classifier, method: Method, guidance: GuidanceTerm | None) -> None:
        super().__init__()
        self.classifier = classifier
        self._method = method
        self._guidance = guidance

    def forward(self, batch: Batch, guided_share: Tensor) -> dict[str, Tensor]:
        """Losses of one micro-batch.

        Args:
            batch: mixed, on the device.
            guided_share: scalar; the weight of one valid sample of this micro-batch such that the mean over all processes
                and micro-batches of a step is the mean over the valid samples of the global batch.

        Returns:
            ``loss`` (scalar, with graph), ``classification`` and ``guidance`` (scalars, detached).
        """
        output = self.classifier(batch.images, batch.labels)
        classification = self._method.loss(output, batch)
        guidance = torch.zeros((), device=batch.images.device)
        if self._guidance is not None:
            attentions = [layer_attention(self._layer(output.layers, number)) for number in self._guidance.layers]
            terms = [misalignment(attention, batch.au_maps, batch.au_valid) for attention in attentions]
            guidance = self._guidance.weight * guided_share * torch.stack(terms).mean(dim=0).sum()
        return {"loss": classification + guidance, "classification": classification.detach(), "guidance": guidance.detach()}

    @staticmethod
    def _layer(layers: dict[int, Tensor], number: int) -> Tensor:
        if number not in layers:
            raise ValueError(f"guidance.layers names layer {number}; this network has the layers {', '.join(map(str, sorted(layers)))}")
        return layers[number]


def guided_share(valid_in_step: int | Tensor, *, parts: int) -> Tensor:
    """`TrainingTask.forward`'s ``guided_share`` for a step of ``parts`` = processes x micro-batches with so many valid samples in all."""
    return parts / torch.as_tensor(valid_in_step).clamp(min=1).double()
