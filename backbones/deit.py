"""DeiT-Ti/S/B and a small vision transformer, with the attention of the class token kept; timm's weights load unchanged."""

from __future__ import annotations

from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, BackboneOptions, Features
from bench.backbones.mini import MiniResNet
from bench.weights import load_weights


def self_attention(attention: nn.Module, tokens: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """A timm ``Attention`` module's own forward, which also tells the attention weights.

    Args:
        attention: of a plain timm block (no query or key norm, no dropout of weights).
        tokens: (B, N, D), normed.
        whole: tell the weights of all queries, not of the class token (token 0) alone. The weights of all queries are
            part of the graph of the result: differentiating by them is what LeGrad does.

    Returns:
        The module's result (B, N, D), and the softmax weights (B, heads, N or 1, N). With ``whole`` false the result comes from
        the fused kernel, and no N x N matrix is kept for the backward pass.
    """
    module: Any = attention
    q, k, v = heads(module, tokens)
    if whole:
        weights = (q * module.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        mixed = weights @ v
    else:
        weights = (q[:, :, :1] * module.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
    return merge(module, mixed), weights


def heads(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of (B, N, D) tokens, each (B, heads, N, D / heads)."""
    module: Any = attention
    batch, count, _ = tokens.shape
    q, k, v = module.qkv(tokens).reshape(batch, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge(attention: nn.Module, mixed: Tensor) -> Tensor:
    """Output projection of the mixed values (B, heads, N, D / heads). (B, N, D)."""
    module: Any = attention
    merged: Tensor = module.proj_drop(module.proj(mixed.transpose(1, 2).flatten(2)))
    return merged


class TimmViT(Backbone):
    """A plain timm vision transformer whose first token is a class token. Registers or a distillation token may follow it.

    Layer 1 = patch tokens after the final norm (B, D, g, g). Layer 2 = class-agnostic attention (B, 1, g, g): the softmax row
    of the class token, averaged over heads, summed over blocks (Gao et al., ICCV 2021, average over blocks, which only
    scales it).
    """

    def __init__(self, net: VisionTransformer, *, pretrained: bool) -> None:
        super().__init__()
        assert net.cls_token is not None
        self.net = net
        self.prefix: int = net.num_prefix_tokens
        """Tokens before the patches: the class token, and registers or a distillation token."""
        self.pretrained = pretrained
        self.grid: tuple[int, int] = net.patch_embed.grid_size
        self.channels = {1: net.embed_dim, 2: 1}
        if not pretrained:
            # With the usual start, gain 1 and bias 0, the channel mean of layer 1 is zero up to rounding: its cosine with an AU map
            # is noise, with gradients of 1e7. Published weights have gains of all sizes.
            assert isinstance(net.norm, nn.LayerNorm)
            nn.init.normal_(net.norm.weight, mean=1.0, std=0.1)

    @property
    def last(self) -> int:
        """Layer 1 feeds the classifier; layer 2 is an attention."""
        return 1

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) images -> (B, prefix + g*g, D) tokens before the first block, class token first."""
        net: Any = self.net
        tokens: Tensor = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))  # noqa: SLF001 - timm has no other name
        return tokens

    def block(self, number: int, tokens: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Tokens after one block, and its attention weights: see `self_attention`."""
        block: Any = self.net.blocks[number]
        mixed, weights = self_attention(block.attn, block.norm1(tokens), whole=whole)
        tokens = tokens + block.drop_path1(block.ls1(mixed))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), weights

    def patches(self, tokens: Tensor) -> Tensor:
        """Normed patch tokens on their grid: (B, prefix + g*g, D) -> (B, D, g, g)."""
        normed: Tensor = self.net.norm(tokens)
        return self.on_grid(normed[:, self.prefix :].transpose(1, 2))

    def on_grid(self, values: Tensor) -> Tensor:
        """(..., g*g) -> (..., g, g)."""
        return values.reshape(*values.shape[:-1], *self.grid)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.net.blocks)

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        tokens = self.embed(images)
        rows = []
        for number in range(self.depth):
            tokens, weights = self.block(number, tokens, whole=False)
            rows.append(weights[:, :, 0, self.prefix :].mean(dim=1))
        attention = torch.stack(rows).sum(dim=0)
        return Features(layers={1: self.patches(tokens), 2: self.on_grid(attention)[:, None]})


def check_patches(image_size: int, patch: int) -> None:
    """Raise ValueError unless patches of this side tile the image."""
    if image_size % patch or image_size < patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise ValueError(f"images.size = {image_size} is not a multiple of the patch side {patch}; --set images.size={nearest}")


class DeiT(TimmViT):
    """A DeiT by name. Pretrained weights have the position embedding of 224 pixels; it is resampled for other sizes."""

    arch: ClassVar[str]

    class Options(BackboneOptions):
        """Accepted keys of ``[backbones.deit-*]``."""

        drop_path: float = Field(default=0.0, ge=0, lt=1)
        """Stochastic depth rate; 0.1 in the trainings of DeiT and TS-CAM."""

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> DeiT:
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        check_patches(image_size, 16)
        pretrained = options.weights != "random"
        net = timm.create_model(
            cls.arch, pretrained=False, num_classes=0, img_size=224 if pretrained else image_size, drop_path_rate=options.drop_path
        )
        assert isinstance(net, VisionTransformer)
        load_weights(net, options.weights, timm_name=f"{cls.arch}.fb_in1k")
        net.set_input_size(img_size=(image_size, image_size))
        return cls(net, pretrained=pretrained)


_PAPER = {
    "paper": "Touvron et al., ICML 2021, Training data-efficient image transformers & distillation through attention",
    "year": 2021,
    "doi": "10.48550/arXiv.2012.12877",
    "guided_layers": (1,),
}


@BACKBONES.register("deit-tiny", title="DeiT-Ti", kind="vit", **_PAPER)
class DeiTTiny(DeiT):
    """6 M parameters."""

    arch = "deit_tiny_patch16_224"


@BACKBONES.register("deit-small", title="DeiT-S", kind="vit", **_PAPER)
class DeiTSmall(DeiT):
    """22 M parameters; the network of the published TS-CAM rows."""

    arch = "deit_small_patch16_224"


@BACKBONES.register("deit-base", title="DeiT-B", kind="vit", **_PAPER)
class DeiTBase(DeiT):
    """86 M parameters."""

    arch = "deit_base_patch16_224"


STEM_STRIDE = 8
"""Pixels a token of ``mini-vit``."""


class _Stem(nn.Module):
    """The last layer of a convolutional backbone, in the form timm's `HybridEmbed` takes."""

    def __init__(self, net: MiniResNet) -> None:
        super().__init__()
        self.net = net
        self.num_features = net.channels[net.last]

    def forward(self, images: Tensor) -> Tensor:
        layers: dict[int, Tensor] = self.net(images).layers
        return layers[self.net.last]


@BACKBONES.register("mini-vit", title="ViT-mini", kind="vit", **_PAPER)
class MiniViT(TimmViT):
    """A vision transformer small enough for two CPU cores at 64 pixels, for the ``quick`` profile and for tests.

    Its tokens come from a small ResNet instead of from pixels (the hybrid of Dosovitskiy et al., ICLR 2021): on thousands of
    faces a plain transformer of this size does not leave chance within minutes.
    """

    class Options(BackboneOptions):
        """Accepted keys of ``[backbones.mini-vit]``."""

        width: int = Field(default=16, ge=8, multiple_of=8)
        """Of the convolutional stem, see ``[backbones.mini]``."""
        dim: int = Field(default=64, ge=8)
        """Width of a token, a multiple of ``heads``."""
        depth: int = Field(default=2, ge=1)
        heads: int = Field(default=2, ge=1)
        drop_path: float = Field(default=0.0, ge=0, lt=1)
        """Stochastic depth rate."""

        @model_validator(mode="after")
        def _heads_divide_dim(self) -> MiniViT.Options:
            if self.dim % self.heads:
                raise ValueError(f"dim = {self.dim} is not a multiple of heads = {self.heads}; try dim = {self.heads * 32}")
            return self

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> MiniViT:
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        check_patches(image_size, STEM_STRIDE)
        side = image_size // STEM_STRIDE
        net = VisionTransformer(
            img_size=image_size,
            patch_size=STEM_STRIDE,
            num_classes=0,
            embed_dim=options.dim,
            depth=options.depth,
            num_heads=options.heads,
            drop_path_rate=options.drop_path,
        )
        stem = _Stem(MiniResNet.build(MiniResNet.Options(width=options.width), image_size=image_size))
        # Put in afterwards: timm initialises all parts of a transformer, and would start the stem's residual branches at zero.
        embed: Any = HybridEmbed(stem, image_size, patch_size=1, feature_size=(side, side), embed_dim=options.dim)
        net.patch_embed = embed
        load_weights(net, options.weights, timm_name=None)
        return cls(net, pretrained=options.weights != "random")
