"""CutMix: a box of every training picture comes from another one, and so does its share of the label."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bench.keyed import keyed_seeds, keyed_uniform
from bench.method import METHODS, Batch, Default, Output
from bench.methods.cam import CAM
from bench.registry import EntryOptions

_STREAM = 1 << 20
"""Purpose of the random numbers drawn here, far from those of `bench.data.transforms`; renumbering changes every training."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixedBatch(Batch):
    """A batch of mixed pictures: ``labels`` are those of the picture outside of the box.

    Shapes: ``labels_b`` (B,) int64, of the picture in the box; ``weight`` () float32, share of the picture outside of it.
    """

    labels_b: Tensor
    weight: Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box in pixels, one for a whole batch: rows [top, bottom), columns [left, right); each () int64 on the device."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def share(self, size: int) -> Tensor:
        """Share of a square picture of this side that the box covers, () float64."""
        return (self.bottom - self.top).double() * (self.right - self.left) / size**2

    def coverage(self, *, size: int, grid: int) -> Tensor:
        """Share of each cell of a grid over a picture of this side that the box covers, (grid, grid) float64."""
        ticks = torch.arange(grid, device=self.top.device)
        rows, columns = (
            # In units of 1 / (size * grid) of the picture all edges are integers.
            (torch.minimum((ticks + 1) * size, end * grid) - torch.maximum(ticks * size, start * grid)).clamp(min=0).double() / size
            for start, end in ((self.top, self.bottom), (self.left, self.right))
        )
        return rows[:, None] * columns


def symmetric_beta(u: Tensor, v: Tensor, *, beta: float) -> Tensor:
    """Two independent uniform numbers on [0, 1) -> one that is Beta(beta, beta) distributed, of the same shape.

    L. Devroye, "Random variate generation in one line of code" (WSC 1996), from the polar method for the t distribution of
    R. Bailey (1994): no rejection, so nothing has to wait for the device.
    """
    w = u ** (1 / beta)
    c = torch.cos(2 * math.pi * v)
    return (0.5 + 0.5 * c * (1 - w).sqrt() / (w + (1 - w) * c**2).sqrt()).clamp(0, 1)


def random_box(seed: Tensor, *, size: int, beta: float, probability: float) -> Box:
    """The box of the published code: side sqrt(1 - lambda) of the picture's, centre uniform, cut off at the border.

    Args:
        seed: (1,) int64.
        size: side of the pictures.
        beta: lambda is Beta(beta, beta) distributed (S. Yun et al., ICCV 2019).
        probability: of a box at all; else it is empty.
    """
    mixed, u, v, *centre = keyed_uniform(seed, stream=_STREAM, count=5)[0].unbind()
    kept = torch.where(mixed < probability, symmetric_beta(u, v, beta=beta), 1.0)
    half = ((1 - kept).sqrt() * size).long() // 2
    row, column = ((place * size).long() for place in centre)
    edges = (row - half, row + half, column - half, column + half)
    top, bottom, left, right = (edge.clamp(0, size) for edge in edges)
    return Box(top=top, bottom=bottom, left=left, right=right)


@METHODS.register(
    "cutmix",
    title="CutMix",
    paper="Yun et al., ICCV 2019, CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
    year=2019,
    doi="10.1109/ICCV.2019.00612",
    kind="trained",
    defaults=(
        Default(
            "guidance.layers",
            (4,),
            None,
            "layer that the published FER code falls back to in the evaluation of CutMix, 5 for other methods; that its "
            "training aligned layer 4 is inferred from that",
            "official",
        ),
    ),
)
class CutMix(CAM):
    """CAM of a network trained on pictures that are mixed in pairs within each batch.

    AU maps are mixed by the same box, cell by cell of their grid in proportion to the covered area. What a picture without AU
    map contributes to one is where the variants differ; the CutMix paper knows no AU maps.

    ``paper``: it contributes zeros, as no action unit is known in its box. A sample is guided if its own face has an AU map
    of which something is left to see; so the guided samples are those of the unmixed batch, as for every other method.

    ``official``: absent maps are infinite, and infinity is contagious: a sample is guided only if both of its pictures have
    an AU map (or the one without has no pixel in it). Fewer samples are guided.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.cutmix]``."""

        beta: float = Field(default=1.0, gt=0)
        """Share of the kept picture ~ Beta(beta, beta); 1 in the published FER code."""
        probability: float = Field(default=1.0, ge=0, le=1)
        """Of mixing a batch; 1 in the published FER code."""

    def mix(self, batch: Batch) -> MixedBatch:
        """See `Method.mix`. One box a batch; partners are a random permutation of its samples.

        Everything is a function of the seeds of the samples and of their order, which is the epoch plan's.
        """
        assert isinstance(self.options, self.Options)
        own = keyed_seeds(batch.seeds, _STREAM)
        size, grid = batch.images.shape[-1], batch.au_maps.shape[-1]
        partner = keyed_uniform(own, stream=_STREAM, count=1)[:, 0].argsort(stable=True)
        # A sum of well mixed words modulo 2**64 is a well mixed word, which every sample of the batch has a say in.
        box = random_box(keyed_seeds(own.sum(dim=0, keepdim=True)), size=size, beta=self.options.beta, probability=self.options.probability)
        inside = box.coverage(size=size, grid=size) > 0
        covered = box.coverage(size=size, grid=grid).to(batch.au_maps.dtype)
        maps = batch.au_maps.masked_fill(~batch.au_valid[:, None, None], 0.0)
        maps = maps * (1 - covered) + maps[partner] * covered
        if self.variant == "official":
            share = box.share(size)
            valid = (batch.au_valid | (share == 1)) & (batch.au_valid[partner] | (share == 0))
        else:
            valid = batch.au_valid & (maps.flatten(1).amax(dim=1) > 0)
        return MixedBatch(
            positions=batch.positions,
            seeds=batch.seeds,
            images=torch.where(inside, batch.images[partner], batch.images),
            labels=batch.labels,
            au_maps=maps.masked_fill(~valid[:, None, None], 0.0),
            au_valid=valid,
            labels_b=batch.labels[partner],
            weight=(1 - box.share(size)).float(),
        )

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """See `Method.loss`: the cross entropies with both labels, weighted by the shares of the pictures."""
        assert isinstance(batch, MixedBatch)
        first, second = F.cross_entropy(output.logits, batch.labels), F.cross_entropy(output.logits, batch.labels_b)
        return batch.weight * first + (1 - batch.weight) * second
