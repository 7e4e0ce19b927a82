"""PRM: peak response mapping. Scores from the peaks of class response maps; maps by following the peaks down the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from bench.backbone import Backbone, traced
from bench.method import METHODS, Classifier, Method, Output
from bench.registry import EntryOptions

# --- Peaks ---------------------------------------------------------------------------------------------------------------


def find_peaks(maps: Tensor, *, window: int) -> Tensor:
    """Positions that equal the maximum of the odd ``window`` around them, cut at the border (Zhou et al., 3.1).

    (..., h, w) -> bool of the same shape. Every position of a plateau is a peak.
    """
    flat = maps.detach().flatten(0, -3)
    return (F.max_pool2d(flat, window, stride=1, padding=window // 2) == flat).view(maps.shape)


def valid_peaks(maps: Tensor, *, window: int) -> Tensor:
    """Peaks that are not below the (lower) median of their map (..., h, w): the filter of the authors' code. Never empty."""
    median = maps.detach().flatten(-2).median(dim=-1).values[..., None, None]
    return find_peaks(maps, window=window) & (maps.detach() >= median)


def peak_stimulation(maps: Tensor, *, window: int) -> Tensor:
    """Mean over the peaks of each map (..., h, w) -> (...); the gradient reaches the peaks alone (Zhou et al., eq. 1 and 2)."""
    peaks = find_peaks(maps, window=window)
    return maps.where(peaks, 0).sum(dim=(-2, -1)) / peaks.sum(dim=(-2, -1))


# --- Peak back-propagation -----------------------------------------------------------------------------------------------

_NORMS = frozenset(("batch_norm", "group_norm", "layer_norm"))
_ACTIVATIONS = frozenset(
    ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardtanh", "hardswish", "mish", "dropout", "dropout2d", "feature_dropout")
)
_MEANS = frozenset(("avg_pool2d", "adaptive_avg_pool2d"))
_SCALINGS = frozenset(("mul", "imul", "rmul", "div", "idiv", "itruediv", "truediv"))
_SUMS = frozenset(("add", "iadd", "radd"))
# Their own gradient hands every probability on whole: to where the value came from (max pooling: to the winner).
_MOVES = frozenset(("max_pool2d", "cat", "concat", "stack", "chunk", "split", "getitem", "pad", "contiguous", "clone", "to", "float"))
_SHAPES = frozenset(("reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze"))
# A sum of contributions below this counts as none; keeps probability / sum finite in float32.
_NOTHING = 1e-30


class _Affine(Function):
    """Eq. 3 to 5 for a layer V = op(U): P(U) = U * op+^T (P(V) / op+(U)), op+ being the layer with its positive weights only."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, op: Callable[[Tensor], Tensor], positive: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(u)
        ctx.positive = positive
        return op(u)

    @staticmethod
    def backward(ctx: Any, *p: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        # Activations are not negative in the paper. Where they are (the picture), they are counted from the smallest one of
        # the sample, as in the authors' code.
        u = u.detach() - u.flatten(1).amin(dim=1).clamp(max=0).view(-1, *(1,) * (u.ndim - 1))
        with torch.enable_grad():
            total = ctx.positive(u.requires_grad_())
        share = torch.where(total > _NOTHING, p[0] / total.detach().clamp(min=_NOTHING), 0)
        (back,) = torch.autograd.grad(total, u, share)
        return u.detach() * back, None, None


class _Sum(Function):
    """V = A + B, an affine layer with weights 1: the probability is split in proportion to the positive parts, in half if none is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *p: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (part.clamp(min=0) for part in ctx.saved_tensors)
        to_a = p[0] * torch.where(a + b > _NOTHING, a / (a + b).clamp(min=_NOTHING), 0.5)
        return to_a, p[0] - to_a


class _PassOn(Function):
    """A value computed from one value: it has a single cause, which takes the whole probability."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004 - torch's
        return value

    @staticmethod
    def backward(ctx: Any, *p: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's
        return p[0], None


class PeakPropagation(TorchFunctionMode):
    """Inside this context the gradient of what torch computes is the winner-take-all probability of Zhou et al. (3.2).

    Values stay what they are; only what `torch.autograd.grad` returns changes: for outputs V with probabilities P(V), the
    probabilities P(U) that a top-down walk visits U. No module is touched and parameters must take no part in the graph.

    - convolution: eq. 3 to 5, P(U | V) proportional to U * ReLU(W), normalised for each V;
    - mean pooling, residual sums: the same with equal weights (the paper: they are affine layers too);
    - max pooling, concatenation, reshaping: to where the value came from;
    - normalisation and activation, one value to one value: passed on whole. The scale of a normalisation cancels in the
      convolution's own normalisation; a negative scale is treated like a positive one.

    The sum of the probabilities of a sample is kept by every rule, but for positions that only biases made positive.

    Raises:
        NoRuleError: by the gradient, where it meets any other operation: there is no rule for it.
    """

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one torch operation, with the rule for its kind."""
        kwargs = kwargs or {}
        tracked = [value for value in args if isinstance(value, Tensor) and value.requires_grad]
        name = str(getattr(func, "__name__", func)).strip("_")
        if tracked and torch.is_grad_enabled():
            u = tracked[0]
            if name == "conv2d":
                return self._convolution(func, args, kwargs)
            if name in _MEANS:
                mean: Callable[[Tensor], Tensor] = lambda x: func(x, *args[1:], **kwargs)  # noqa: E731
                return _Affine.apply(u, mean, mean)
            if name in _SUMS and len(tracked) == 2 and u.shape == tracked[1].shape and not kwargs:
                return _Sum.apply(*tracked)
            if name in _ACTIVATIONS | _NORMS or (name in _SUMS | _SCALINGS and len(tracked) == 1):
                # Cloned, because the operation may be in place.
                value = func(*(x.detach().clone() if x is u else x for x in args), **kwargs)
                if value.shape == u.shape:
                    return _PassOn.apply(u, value)
        result = func(*args, **kwargs)
        if name not in _MOVES | _SHAPES:
            for value in result if isinstance(result, list | tuple) else [result]:
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    value.grad_fn.register_prehook(_Refuse(name))
        return result

    @staticmethod
    def _convolution(func: Any, args: Any, kwargs: Any) -> Any:
        u, weight, *rest = args
        weight = weight.detach()
        bias = rest[0] if rest else kwargs.get("bias")
        settings = {key: value for key, value in kwargs.items() if key != "bias"}
        return _Affine.apply(
            u,
            lambda x: func(x, weight, bias, *rest[1:], **settings),
            lambda x: func(x, weight.clamp(min=0), None, *rest[1:], **settings),
        )


class NoRuleError(NotImplementedError):
    """Peak back-propagation cannot come where it is to go."""


class _Refuse:
    """Stops a gradient at an operation without a rule, rather than let it pass as something it is not."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, gradients: Any) -> None:  # noqa: ARG002 - torch's
        raise NoRuleError(f"peak back-propagation has no rule for {self._name!r}, which this backbone uses")


# --- The method ----------------------------------------------------------------------------------------------------------


class PRMClassifier(Classifier):
    """A 1 x 1 convolution to one response map a class, and a score that looks at its peaks."""

    def __init__(self, backbone: Backbone, *, num_classes: int, pool: Callable[[Tensor], Tensor]) -> None:
        """``pool``: class response maps (B, K, h, w) -> logits (B, K)."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.channels[backbone.last], num_classes, kernel_size=1)
        nn.init.xavier_uniform_(self.head.weight)  # as the published heads
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        self._pool = pool

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:  # noqa: ARG002 - the contract's
        """See `Classifier.forward`."""
        features = self.backbone(images)
        class_maps = self.head(features.layers[self.backbone.last])
        return Output(logits=self._pool(class_maps), layers=features.layers, class_maps=class_maps, extras=features.extras)

    def peak_response(self, images: Tensor, classes: Tensor, *, window: int, layer: int) -> Tensor:
        """Sum of the peak response maps of all valid peaks of a class, (B, h, w) on the grid of ``layer`` (0: the picture).

        Propagation is linear in where it starts, so all peaks of all samples go down in one pass, each with probability 1.

        Args:
            images: (B, 3, S, S).
            classes: (B,).
            window: see `find_peaks`.
            layer: where to stop.

        Raises:
            NoRuleError: see `PeakPropagation`; names the layers that it can reach.
        """
        try:
            return self._propagate(images, classes, window=window, layer=layer)
        except NoRuleError as error:
            higher = [number for number in sorted(self.backbone.channels) if number > layer]
            possible = [number for number in higher if self._reaches(images[:1], classes[:1], window=window, layer=number)]
            stop = (
                f"stop at layer {' or '.join(map(str, possible))} (--set methods.prm.response_layer={possible[0]}), or " if possible else ""
            )
            raise NoRuleError(f"{error}: {stop}take the class response map (--set run.variant=official)") from None

    def _reaches(self, images: Tensor, classes: Tensor, *, window: int, layer: int) -> bool:
        try:
            self._propagate(images, classes, window=window, layer=layer)
        except NoRuleError:
            return False
        return True

    def _propagate(self, images: Tensor, classes: Tensor, *, window: int, layer: int) -> Tensor:
        """See `peak_response`."""
        assert not self.training
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            frozen = {name: parameter.detach() for name, parameter in self.backbone.named_parameters()}
            weight, bias = (parameter.detach() for parameter in self.head.parameters())
            with PeakPropagation():
                features = functional_call(self.backbone, frozen, (images,))
                layers = features.layers
                class_maps = F.conv2d(layers[self.backbone.last], weight, bias)
            start = valid_peaks(class_maps, window=window) & F.one_hot(classes, len(weight)).bool()[:, :, None, None]
            target = images if layer == 0 else features.extras.get(traced(layer), layers[layer])
            (response,) = torch.autograd.grad(class_maps, target, start.to(class_maps.dtype), allow_unused=True)
        if response is None:
            raise NoRuleError(f"the class response maps do not depend on layer {layer}: it stands beside the last one, not before it")
        return response.sum(dim=3 if layer and traced(layer) in features.extras else 1)


@METHODS.register(
    "prm",
    title="PRM",
    paper="Zhou et al., CVPR 2018, Weakly Supervised Instance Segmentation using Class Peak Response",
    year=2018,
    doi="10.1109/CVPR.2018.00399",
    kind="trained",
)
class PRM(Method):
    """Peaks of class response maps, and what in the network made them.

    ``paper``: the score is the mean over the peaks (peak stimulation); the map is the sum of the peak response maps of the
    class, found by propagating probabilities from its peaks down to ``response_layer``. ``official``: the published FER
    code has neither; the score is the mean of the maximum-pooled (no padding) class response map, the map is that class
    response map.
    """

    class Options(EntryOptions):
        """Accepted keys of ``[methods.prm]``."""

        window: int = Field(default=3, ge=1, le=15)
        """Side of the window, odd, in which a peak is the maximum."""
        stride: int = Field(default=1, ge=1, le=15)
        """Of the maximum pooling of the variant ``official``; ``paper`` looks at every position."""
        response_layer: int = Field(default=0, ge=0)
        """Layer whose grid the maps of the variant ``paper`` have, 0 for the picture itself, as in the paper.

        Reading the maps of a batch costs as much as 4 forward passes with 0, 3.5 with 2, 1.1 with 5 (ResNet-50, 224 pixels): most
        of the way is in the stages 3 to 5, so stopping at 1 or 2 saves little.
        """

        @field_validator("window")
        @classmethod
        def _odd(cls, window: int) -> int:
            if window % 2 == 0:
                raise ValueError(f"a window has a centre, so its side is odd; nearest: {window - 1} or {window + 1}")
            return window

    def classifier(self, backbone: Backbone, *, num_classes: int) -> PRMClassifier:
        """See `Method.classifier`.

        Raises:
            ValueError: the backbone has no layer ``response_layer``.
        """
        layer = self._options.response_layer
        if self.variant == "paper" and layer != 0 and layer not in backbone.channels:
            raise ValueError(
                f"methods.prm.response_layer = {layer}: this network has the layers {', '.join(map(str, sorted(backbone.channels)))}, "
                f"and 0 for the picture; --set methods.prm.response_layer=0"
            )
        return PRMClassifier(backbone, num_classes=num_classes, pool=self._score)

    @property
    def _options(self) -> Options:
        assert isinstance(self.options, PRM.Options)
        return self.options

    def _score(self, class_maps: Tensor) -> Tensor:
        window = self._options.window
        if self.variant == "paper":
            return peak_stimulation(class_maps, window=window)
        if min(class_maps.shape[-2:]) < window:
            height, width = class_maps.shape[-2:]
            raise ValueError(
                f"methods.prm.window = {window} is larger than the class maps ({height} x {width}), and the variant 'official' does "
                f"not pad; make the maps larger (--set images.size=224) or the window smaller (--set methods.prm.window=1)"
            )
        return F.max_pool2d(class_maps, window, stride=self._options.stride).mean(dim=(2, 3))

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`. The variant ``paper`` looks at ``output.images`` again."""
        assert isinstance(classifier, PRMClassifier)
        if self.variant == "official":
            assert output.class_maps is not None
            return output.class_maps[torch.arange(len(classes), device=classes.device), classes]
        assert output.images is not None
        return classifier.peak_response(output.images, classes, window=self._options.window, layer=self._options.response_layer)
