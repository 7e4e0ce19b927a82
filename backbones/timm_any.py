"""Any network of timm by its name: ``timm:convnext_tiny``, ``timm:resnet50.a1_in1k``, ``timm:vit_tiny_patch16_224``.

Networks of several stages give one layer per stage through timm's feature interface. Plain vision transformers with a class
token, and perhaps registers or a distillation token, are read like DeiT. Others, whose maps are all of one size, are refused.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import timm
import torch
from pydantic import Field
from timm.layers.format import Format
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from bench.backbone import BACKBONES, Backbone, BackboneOptions, Features, traced
from bench.backbones.deit import TimmViT
from bench.config import join_key
from bench.registry import Member, UnknownEntryError
from bench.weights import State, load_weights


class TimmOptions(BackboneOptions):
    """Options of all timm networks. ``weights = "imagenet"`` takes timm's published weights of the name, with its tag."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth rate, of networks that have it."""


@BACKBONES.register_family(
    "timm",
    title="any network of timm",
    paper="R. Wightman, PyTorch Image Models",
    year=2019,
    doi="10.5281/zenodo.4414861",
    url="https://github.com/huggingface/pytorch-image-models",
    kind="cnn",
)
class TimmFeatures(Backbone):
    """A timm network of several stages: layer l is its l-th feature, finest first; the last one feeds the classifier."""

    timm_name: ClassVar[str]
    published: ClassVar[str | None]
    """The name with the tag of its weights, None if timm has none."""

    class Options(TimmOptions):
        """Accepted keys of ``[backbones."timm:NAME"]``."""

        output_stride: Literal[8, 16, 32] = 32
        """Side of the picture over side of the last map; below 32 the last stages are dilated, in networks that allow it."""

    @classmethod
    def member(cls, name: str) -> Member[Backbone]:
        """The entry of a timm name, with or without pretrained tag.

        Raises:
            UnknownEntryError: timm has no such network, or no such tag; proposes the nearest.
            ValueError: the network has no maps of several sizes and is no plain vision transformer.
        """
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise UnknownEntryError(f"timm has no network {architecture!r}.{_nearest(architecture, timm.list_models())}")
        tags = sorted(full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True))
        if tag and tag not in tags:
            known = ", ".join(f"timm:{architecture}.{t}" for t in tags) or "none"
            raise UnknownEntryError(f"timm has no pretrained tag {tag!r} of {architecture}; those there are: {known}")
        cfg = timm.get_pretrained_cfg(architecture)
        own = tag or (cfg.tag if cfg else "")
        fields = {"timm_name": name, "published": f"{architecture}.{own}" if own in tags else None}
        title = f"{name} (timm)"
        with torch.device("meta"):
            unlike = _unlike_plain_vit(timm.create_model(architecture, num_classes=0))
            if unlike is None:
                info = {"title": title, "kind": "vit", "guided_layers": (1,)}
                return Member(target=type("TimmPlainViT", (TimmPlainViT,), fields), info=info)
            reductions = _reductions(architecture)
        if len(set(reductions)) < 2:
            raise ValueError(
                f"timm network {name!r} has no maps of several sizes for methods to read, and cannot be read as a plain vision "
                f"transformer: {unlike}; take a convolutional network or a transformer with stages ("
                f"timm:convnext_tiny, timm:swin_tiny_patch4_window7_224), or as a vision transformer deit-tiny, deit-small, "
                f"deit-base"
            )
        return Member(target=type("TimmFeatures", (cls,), fields), info={"title": title, "guided_layers": (len(reductions),)})

    def __init__(self, net: nn.Module, *, channels: dict[int, int], channels_last: bool) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self._channels_last = channels_last

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> TimmFeatures:
        """See `Backbone.build`; the maps are checked on a network without memory before a real one is made.

        Parameters that the last layer does not depend on (branches of HRNet) stay as they are: a distributed step wants a
        gradient for each that may change.
        """
        assert isinstance(options, cls.Options)
        arguments = _arguments(cls.timm_name, options, image_size=image_size)
        if options.output_stride != 32:
            arguments["output_stride"] = options.output_stride
        architecture = cls.timm_name.partition(".")[0]
        with torch.device("meta"), torch.enable_grad():
            try:
                trial: Any = timm.create_model(architecture, features_only=True, **arguments).eval()
                maps = trial(torch.empty(2, 3, image_size, image_size))
                maps[-1].sum().backward()
            except Exception as error:
                changed = {key: value for key, value in arguments.items() if key != "img_size"}
                raise ValueError(
                    f"images.size = {image_size}: timm network {cls.timm_name!r} cannot be built for or run on such pictures"
                    f"{f' with {changed}' if changed else ''}: {type(error).__name__}: {error}"
                ) from error
        channels_last = getattr(trial, "output_fmt", Format.NCHW) == Format.NHWC
        channels = dict(enumerate(trial.feature_info.channels(), start=1))
        shapes = [tuple(m.shape) for m in maps]
        if len(shapes) != len(channels) or any(
            len(shape) != 4 or shape[-1 if channels_last else 1] != width for shape, width in zip(shapes, channels.values(), strict=True)
        ):
            raise ValueError(f"timm network {cls.timm_name!r} has no spatial maps at its layers: its features are {shapes}")
        net = timm.create_model(architecture, features_only=True, **arguments)
        for parameter, tried in zip(net.parameters(), trial.parameters(), strict=True):
            parameter.requires_grad_(tried.grad is not None)
        load_weights(
            net,
            options.weights,
            timm_name=cls.published,
            rename=_renaming(net, architecture=architecture, arguments=arguments),
            timm_options={key: value for key, value in arguments.items() if key == "img_size"},
            key=_key(cls.timm_name),
        )
        backbone = cls(net, channels=channels, channels_last=channels_last)
        backbone.mean, backbone.std = _normalization(cls.timm_name)
        backbone.pretrained = options.weights != "random"
        return backbone

    def forward(self, images: Tensor) -> Features:
        """See `Backbone.forward`."""
        maps = self.net(images)
        if not self._channels_last:
            return Features(layers=dict(zip(self.channels, maps, strict=True)))
        layers = {layer: m.permute(0, 3, 1, 2).contiguous() for layer, m in zip(self.channels, maps, strict=True)}
        return Features(layers=layers, extras={traced(layer): m for layer, m in zip(self.channels, maps, strict=True)})


class TimmPlainViT(TimmViT):
    """A plain vision transformer of timm."""

    timm_name: ClassVar[str]
    published: ClassVar[str | None]

    class Options(TimmOptions):
        """Accepted keys of ``[backbones."timm:NAME"]``."""

    @classmethod
    def build(cls, options: Backbone.Options, *, image_size: int) -> TimmPlainViT:
        """See `Backbone.build`. Published weights are resampled to the size of the pictures, those of a file are not."""
        assert isinstance(options, cls.Options)
        arguments = _arguments(cls.timm_name, options, image_size=image_size)
        try:
            net = timm.create_model(cls.timm_name.partition(".")[0], num_classes=0, **arguments)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"images.size = {image_size}: timm network {cls.timm_name!r} cannot be built for it: {error}") from error
        assert isinstance(net, VisionTransformer)
        side: int = net.patch_embed.patch_size[0]
        if image_size % side:
            nearest = max(side, round(image_size / side) * side)
            raise ValueError(f"images.size = {image_size} is not a multiple of the patch side {side}; --set images.size={nearest}")
        load_weights(net, options.weights, timm_name=cls.published, timm_options={"img_size": image_size}, key=_key(cls.timm_name))
        backbone = cls(net, pretrained=options.weights != "random")
        backbone.mean, backbone.std = _normalization(cls.timm_name)
        return backbone


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(f'timm:{c}') for c in close)}?" if close else ""
    return f"{hint} It has {len(known)}; python -c \"import timm; print(timm.list_models('*resnet*'))\" lists those with resnet in the name"


def _unlike_plain_vit(net: nn.Module) -> str | None:
    """Why `TimmViT` does not compute what the network does, None if it does."""
    if type(net) not in (VisionTransformer, VisionTransformerDistilled):
        return f"it is a {type(net).__name__}, with a forward pass of its own"
    assert isinstance(net, VisionTransformer)
    if net.cls_token is None:
        return "it has no class token, whose attention methods read"
    if isinstance(net.norm, nn.Identity):
        return "it has no norm after its last block"
    kinds = {type(block).__name__ for block in net.blocks if type(block) is not Block}
    if kinds:
        return f"its blocks are of another kind ({', '.join(sorted(kinds))})"
    parts = ("q_norm", "k_norm", "norm")
    norms = [n for n in parts if any(not isinstance(getattr(block.attn, n, nn.Identity()), nn.Identity) for block in net.blocks)]
    return f"its attention has norms of its own ({', '.join(norms)})" if norms else None


def _reductions(architecture: str) -> list[int]:
    try:
        net: Any = timm.create_model(architecture, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError):  # what timm raises where a network has no feature interface
        return []
    return list(net.feature_info.reduction())


def _normalization(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        return Backbone.mean, Backbone.std
    (r, g, b), (sr, sg, sb) = cfg.mean, cfg.std
    return (r, g, b), (sr, sg, sb)


def _arguments(name: str, options: TimmOptions, *, image_size: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model``; only what differs from its defaults, since not all networks know each of them."""
    cfg = timm.get_pretrained_cfg(name)
    arguments: dict[str, Any] = {}
    if cfg and cfg.fixed_input_size:
        arguments["img_size"] = image_size
    if options.drop_path:
        arguments["drop_path_rate"] = options.drop_path
    return arguments


def _key(name: str) -> str:
    return join_key("backbones", f"timm:{name}", "weights")


def _renaming(net: nn.Module, *, architecture: str, arguments: dict[str, Any]) -> Callable[[State], State]:
    """From names of a whole timm network to those of its feature network, which renames (``stages.0`` -> ``stages_0``) and prunes.

    What the whole network has and the feature network lacks is dropped: its classifier, whatever timm calls it, and pruned stages.
    """

    @functools.cache
    def pruned() -> frozenset[str]:
        with torch.device("meta"):
            whole = timm.create_model(architecture, num_classes=2, **arguments).state_dict().keys()
        return frozenset(name for name in whole if _flat(name) not in ours)

    def renamed(state: State) -> State:
        return {ours.get(_flat(name), name): tensor for name, tensor in state.items() if name not in pruned()}

    # Networks without stages as modules are wrapped whole, and keep all names below that of the wrapper's part.
    wrapped = {FeatureHookNet: "body.", FeatureGetterNet: "model."}.get(type(net), "")
    ours = {_flat(name.removeprefix(wrapped)): name for name in net.state_dict()}
    return renamed


def _flat(name: str) -> str:
    return name.replace(".", "_")
