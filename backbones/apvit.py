"""APViT: three stages of an IR-50 face network, then a vision transformer that drops patches and tokens of little attention.

Xue et al., IEEE TAC 2022: attentive patch pooling (APP) keeps the patches with the strongest features, attentive token
pooling (ATP) the tokens the class token attends to. Names below ``extractor`` are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, BackboneOptions, Features
from bench.backbones.deit import check_patches, heads, merge
from bench.registry import Default
from bench.weights import State, load_weights, ms1m_weights

STRIDE = 8
"""Of the convolutional part: side of the picture over side of the grid of patches."""

PatchAttention = Literal["SUM_ABS_1", "SUM", "SUM_ABS_2", "MAX", "MAX_ABS_1", "LA"]
"""Ways of APP to weigh a patch, named as in the published code."""

_PLAIN: dict[PatchAttention, Callable[[Tensor], Tensor]] = {
    "SUM_ABS_1": lambda x: x.abs().sum(dim=1, keepdim=True),
    "SUM": lambda x: x.sum(dim=1, keepdim=True),
    "SUM_ABS_2": lambda x: x.square().sum(dim=1, keepdim=True),
    "MAX": lambda x: x.amax(dim=1, keepdim=True),
    "MAX_ABS_1": lambda x: x.abs().amax(dim=1, keepdim=True),
}
assert set(get_args(PatchAttention)) == {*_PLAIN, "LA"}


class IRUnit(nn.Module):
    """Improved residual unit of ArcFace (Deng et al., CVPR 2019, IR): no activation after the sum."""

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != width:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, width, 3, 1, 1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, width, h / stride, w / stride)."""
        y: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return y


class IRStages(nn.Module):
    """The first stages of an IR network; every stage halves the side."""

    def __init__(self, *, widths: tuple[int, ...], units: tuple[int, ...]) -> None:
        super().__init__()
        stem = widths[0]
        self.input_layer = nn.Sequential(nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.PReLU(stem))
        stages: list[nn.Module] = []
        inputs = stem
        for width, count in zip(widths, units, strict=True):
            first = IRUnit(inputs, width, stride=2)
            stages.append(nn.Sequential(first, *(IRUnit(width, width, stride=1) for _ in range(count - 1))))
            inputs = width
        self.body = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, widths[-1], S / 8, S / 8) for three stages; may be negative."""
        features: Tensor = self.body(self.input_layer(images))
        return features


class LANet(nn.Sequential):
    """Learned patch attention in (0, 1): the choice ``LA``. (B, D, g, g) -> (B, 1, g, g)."""

    def __init__(self, dim: int) -> None:
        hidden = dim // 16
        super().__init__(
            nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid()
        )


def keep_top(tokens: Tensor, scores: Tensor, *, count: int) -> Tensor:
    """The ``count`` tokens (B, N, D) with the highest scores (B, N), in their old order."""
    if count == tokens.shape[1]:
        return tokens
    kept = scores.topk(count, dim=1).indices.sort(dim=1).values
    return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))


def pooling_block(block: Block, tokens: Tensor, *, keep_rate: float) -> Tensor:
    """One transformer block that keeps int(N * keep_rate) of its N patch tokens, and the class token (token 0).

    The score of a token is the class token's attention to it before the softmax, summed over heads. Tokens go between the
    attention and the MLP. What decides whether to drop is the number of tokens: the published code compares it with the
    size of the batch, so that a batch of just as many pictures drops nothing; logits would depend on the batch.
    """
    q, k, v = heads(block.attn, block.norm1(tokens))
    tokens = tokens + block.drop_path1(block.ls1(merge(block.attn, F.scaled_dot_product_attention(q, k, v))))
    patches = tokens.shape[1] - 1
    count = max(int(patches * keep_rate), 1)
    if count < patches:
        scores = (q[:, :, :1] @ k.transpose(-2, -1)).sum(dim=1)[:, 0, 1:]
        tokens = torch.cat([tokens[:, :1], keep_top(tokens[:, 1:], scores, count=count)], dim=1)
    moved: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return moved


class APViTOptions(BackboneOptions):
    """Options of both sizes."""

    keep_rate: float = Field(default=0.9, gt=0, le=1)
    """ATP: share of the patch tokens that each block of the second half keeps (``r``)."""
    attention: PatchAttention = "SUM_ABS_1"
    """APP: how a patch is weighed, over the channels of its projected feature. ``LA`` is learned and multiplies the feature."""


class PoolingViT(Backbone):
    """The network of APViT.

    Layer 1 = output of the convolutional part (B, C, g, g), may be negative. Layer 2 = class-agnostic attention of the
    patches (B, 1, g, g), what APP decides by. ``extras["cls"]`` = normed class token (B, D), which feeds the classifier.
    """

    def __init__(
        self, extractor: IRStages, vit: VisionTransformer, *, keep_patches: int, keep_rate: float, attention: PatchAttention, width: int
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.vit = vit
        self.keep_patches = keep_patches
        half = len(vit.blocks) // 2
        self.keep_rates = [1.0] * (len(vit.blocks) - half) + [keep_rate] * half
        self.attention = attention
        if attention == "LA":
            self.attn_f = LANet(vit.embed_dim)
        self.channels = {1: width, 2: 1}

    @property
    def last(self) -> int:
        """Layer 1 feeds the transformer; layer 2 is an attention."""
        return 1

    @property
    def token_dim(self) -> int:
        """Size of the class token."""
        return self.vit.embed_dim

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        vit = self.vit
        features = self.extractor(images)
        projected = vit.patch_embed.proj(features)
        if self.attention == "LA":
            attention = self.attn_f(projected)
            projected = projected * attention
        else:
            attention = _PLAIN[self.attention](projected)
        assert vit.cls_token is not None
        assert vit.pos_embed is not None
        patches = projected.flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
        patches = keep_top(patches, attention.flatten(1), count=self.keep_patches)
        start = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([start, patches], dim=1)
        for block, keep_rate in zip(vit.blocks, self.keep_rates, strict=True):
            assert isinstance(block, Block)
            tokens = pooling_block(block, tokens, keep_rate=keep_rate)
        return Features(layers={1: features, 2: attention}, extras={"cls": vit.norm(tokens[:, 0])})


def _assemble(
    options: APViTOptions,
    kind: type[PoolingViT],
    *,
    grid: int,
    keep_patches: int,
    widths: tuple[int, ...],
    units: tuple[int, ...],
    dim: int,
    depth: int,
    heads: int,
    sources: Mapping[str, Callable[[], State]] | None = None,
) -> PoolingViT:
    vit = VisionTransformer(
        img_size=grid,
        patch_size=1,
        in_chans=widths[-1],
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=3,
        qkv_bias=False,
    )
    net = kind(
        IRStages(widths=widths, units=units),
        vit,
        keep_patches=keep_patches,
        keep_rate=options.keep_rate,
        attention=options.attention,
        width=widths[-1],
    )
    # Weights of the convolutional part alone leave the transformer as initialised.
    load_weights(net, options.weights, timm_name=None, sources=sources, fresh=("vit.", "attn_f."))
    net.pretrained = options.weights != "random"
    return net


_PAPER = {
    "paper": "Xue et al., IEEE TAC 2022, Vision Transformer with Attentive Pooling for Robust Facial Expression Recognition",
    "year": 2022,
    "doi": "10.1109/TAFFC.2022.3226473",
    "guided_layers": (1,),
}


@BACKBONES.register(
    "apvit",
    title="APViT (IR-50 + ViT)",
    kind="apvit",
    defaults=(Default("images.size", 112, None, "the only input the published network takes"),),
    **_PAPER,
)
class APViT(PoolingViT):
    """65 M parameters, 112 pixels; the network of the published APViT rows."""

    image_sizes: ClassVar[tuple[int, ...] | None] = (112,)

    class Options(APViTOptions):
        """Accepted keys of ``[backbones.apvit]``."""

        keep_patches: int = Field(default=160, ge=1, le=196)
        """APP: how many of the 196 patches go on (``k``)."""

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> PoolingViT:
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        if image_size != 112:
            raise ValueError(f"images.size = {image_size}: backbone 'apvit' takes 112 only; --set images.size=112")
        return _assemble(
            options,
            cls,
            grid=14,
            keep_patches=options.keep_patches,
            widths=(64, 128, 256),
            units=(3, 4, 14),
            dim=768,
            depth=8,
            heads=8,
            sources={"ms1m": lambda: {f"extractor.{name}": tensor for name, tensor in ms1m_weights().items()}},
        )


@BACKBONES.register("mini-apvit", title="APViT-mini", kind="apvit", **_PAPER)
class MiniAPViT(PoolingViT):
    """APViT with small numbers, for two CPU cores at 64 pixels and for tests."""

    class Options(APViTOptions):
        """Accepted keys of ``[backbones.mini-apvit]``."""

        width: int = Field(default=8, ge=4)
        """Channels of the first stage; the other two have 4 and 8 times as many."""
        dim: int = Field(default=96, ge=16)
        """Width of a token, a multiple of ``heads``."""
        depth: int = Field(default=2, ge=1)
        heads: int = Field(default=4, ge=1)
        keep_share: float = Field(default=160 / 196, gt=0, le=1)
        """APP: share of the patches that go on; the large network's k = 160 of 196 by default."""

        @model_validator(mode="after")
        def _heads_divide_dim(self) -> MiniAPViT.Options:
            if self.dim % self.heads:
                raise ValueError(f"dim = {self.dim} is not a multiple of heads = {self.heads}; try dim = {self.heads * 24}")
            return self

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> PoolingViT:
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        check_patches(image_size, STRIDE)
        grid = image_size // STRIDE
        return _assemble(
            options,
            cls,
            grid=grid,
            keep_patches=max(round(options.keep_share * grid**2), 1),
            widths=(options.width, 4 * options.width, 8 * options.width),
            units=(1, 2, 4),
            dim=options.dim,
            depth=options.depth,
            heads=options.heads,
        )
