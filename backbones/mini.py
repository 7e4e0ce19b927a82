"""A ResNet small enough for two CPU cores, for the ``quick`` profile and for tests."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field
from timm.layers.norm_act import GroupNormAct
from timm.models.resnet import BasicBlock
from timm.models.resnet import ResNet as TimmNet
from torch import nn

from bench.backbone import BACKBONES, Backbone
from bench.backbones.resnet import TimmResNet, remove_last_strides
from bench.weights import load_weights


@BACKBONES.register(
    "mini",
    title="ResNet-mini",
    paper="He et al., CVPR 2016, with one block a stage and few channels",
    year=2016,
    doi="10.1109/CVPR.2016.90",
    kind="cnn",
)
class MiniResNet(TimmResNet):
    """One basic block a stage; with ``large_maps`` the maps have an eighth of the input's side, as in the large networks."""

    class Options(Backbone.Options):
        """Accepted keys of ``[backbones.mini]``."""

        width: int = Field(default=16, ge=8, multiple_of=8)
        """Channels of the stem, a multiple of 8; the stages have 1, 2, 4, 8 times as many."""
        norm: Literal["batch", "group"] = "batch"
        """``group`` has no batch statistics: results do not depend on how a batch is spread over processes."""
        large_maps: bool = True

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> MiniResNet:  # noqa: ARG003 - any size will do
        """See `Backbone.build`."""
        assert isinstance(options, cls.Options)
        w = options.width
        net = TimmNet(
            BasicBlock,  # type: ignore[arg-type]  # timm's annotation means the class
            layers=(1, 1, 1, 1),
            channels=(w, 2 * w, 4 * w, 8 * w),
            stem_type="deep",  # three 3 x 3 convolutions, the first with stride 2
            stem_width=w // 2,
            num_classes=0,
            global_pool="",
            # timm starts every residual branch at zero; one block a stage then learns nothing for the first epochs.
            zero_init_last=False,
            norm_layer=nn.BatchNorm2d if options.norm == "batch" else partial(GroupNormAct, group_size=4, apply_act=False),
        )
        load_weights(net, options.weights, timm_name=None)
        if options.large_maps:
            remove_last_strides(net)
        return cls(net, pretrained=options.weights != "random")
