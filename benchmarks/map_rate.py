"""Maps per second on one thread: the read-outs of bench beside those of grad-cam and torchcam, on the same network.

    OMP_NUM_THREADS=1 python benchmarks/map_rate.py [--seconds 3] [--batch 16] [--size 112] [--slow]

    pip install grad-cam torchcam

ResNet-18 with large maps; time is CPU time, which other programs on the machine disturb less. Every figure includes a
forward pass of the network for each map, as the libraries need it, except for the column `shared`: there the read-out starts
from an output that other read-outs use as well, which is how an evaluation of several methods gets its maps (last line).
The libraries' figures include their scaling to [0, 1], and so do ours; grad-cam also enlarges each map to the size of the
picture, so ours are enlarged too where compared with it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable

import torch
from torch import nn

from bench.backbone import BACKBONES
from bench.evaluation.maps import min_max, upsample
from bench.method import METHODS
from bench.methods.cam import GAPClassifier

try:
    import pytorch_grad_cam
    import torchcam.methods
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError:
    raise SystemExit("this benchmark compares with two libraries that are not installed: pip install grad-cam torchcam") from None

# Name here -> name in torchcam, name in grad-cam.
FAST = {
    "cam": ("CAM", None),
    "gradcam": ("GradCAM", "GradCAM"),
    "gradcampp": ("GradCAMpp", "GradCAMPlusPlus"),
    "layercam": ("LayerCAM", "LayerCAM"),
    "xgradcam": ("XGradCAM", "XGradCAM"),
    "hirescam": (None, "HiResCAM"),
    "finercam": ("FinerCAM", None),
    "eigencam": (None, "EigenCAM"),
}
SLOW = {
    "smoothgradcampp": ("SmoothGradCAMpp", None),
    "ablationcam": (None, "AblationCAM"),
    "scorecam": ("ScoreCAM", "ScoreCAM"),
}
LAYER = "classifier.backbone.net.layer4"


class Logits(nn.Module):
    """The classifier as the libraries want it."""

    def __init__(self, classifier: GAPClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.classifier(images).logits


def rate(run: Callable[[], int], seconds: float) -> float:
    """Maps per second of CPU time: median over three rounds; one call where a call takes longer than that."""
    start = time.process_time()
    done = run()
    took = time.process_time() - start
    if took > seconds:
        return done / took
    rounds = []
    for _ in range(3):
        start, done = time.process_time(), 0
        while time.process_time() - start < seconds / 3:
            done += run()
        rounds.append(done / (time.process_time() - start))
    return sorted(rounds)[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement")
    parser.add_argument("--batch", type=int, default=16, help="pictures per call")
    parser.add_argument("--size", type=int, default=112, help="side of the pictures")
    parser.add_argument("--slow", action="store_true", help="also the methods that run the network many times a map (minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    entry = BACKBONES.get("resnet18").target
    classifier = GAPClassifier(entry.build(entry.Options(weights="random"), image_size=options.size), num_classes=7).eval()
    model = Logits(classifier)

    def bench_rate(name: str, *, enlarge: bool, shared: bool, batch: int) -> float:
        target = METHODS.get(name).target
        method = target(target.Options(), variant="paper")
        images, labels = torch.randn(batch, 3, options.size, options.size), torch.arange(batch) % 7

        @torch.inference_mode()
        def forward():
            output = classifier(images)
            output.images = images
            return output

        kept = forward()

        @torch.inference_mode()
        def run() -> int:
            output = kept if shared else forward()
            maps = min_max(method.maps(classifier, output, labels))
            if enlarge:
                upsample(maps, size=options.size)
            return batch

        return rate(run, options.seconds)

    def torchcam_rate(name: str, *, batch: int) -> float:
        images, labels = torch.randn(batch, 3, options.size, options.size), (torch.arange(batch) % 7).tolist()
        more = {"fc_layer": "classifier.head"} if name == "CAM" else {"num_samples": 8} if name == "SmoothGradCAMpp" else {}
        with getattr(torchcam.methods, name)(model, LAYER, **more) as extractor:

            def run() -> int:
                extractor(labels, model(images))
                return batch

            return rate(run, options.seconds)

    def grad_cam_rate(name: str, *, batch: int) -> float:
        images = torch.randn(batch, 3, options.size, options.size)
        targets = [ClassifierOutputTarget(i % 7) for i in range(batch)]
        with getattr(pytorch_grad_cam, name)(model, [classifier.backbone.net.layer4]) as extractor:

            def run() -> int:
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    extractor(images, targets)
                return batch

            return rate(run, options.seconds)

    print(f"{'maps/s':<16}{'bench':>9}{'torchcam':>10}{'ratio':>7}  |{'bench':>9}{'grad-cam':>10}{'ratio':>7}  |{'shared':>9}")
    for name, (theirs, other) in {**FAST, **(SLOW if options.slow else {})}.items():
        batch = 1 if name == "scorecam" else options.batch
        line = f"{name:<16}"
        for peer, measure, enlarge in ((theirs, torchcam_rate, False), (other, grad_cam_rate, True)):
            if peer is None:
                line += f"{'':>26}  |"
                continue
            own, found = bench_rate(name, enlarge=enlarge, shared=False, batch=batch), measure(peer, batch=batch)
            line += f"{own:>9.1f}{found:>10.1f}{own / found:>6.1f}x  |"
        # Score-CAM keeps what it asked the network with the output, which would make a second read-out of it seem free.
        line += f"{'':>9}" if name == "scorecam" else f"{bench_rate(name, enlarge=False, shared=True, batch=batch):>9.0f}"
        print(line, flush=True)

    together = [name for name, (theirs, _) in FAST.items() if theirs is not None]
    images, labels = torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 7
    methods = [METHODS.get(name).target(METHODS.get(name).target.Options(), variant="paper") for name in together]

    @torch.inference_mode()
    def all_of_bench() -> int:
        output = classifier(images)
        for method in methods:
            min_max(method.maps(classifier, output, labels))
        return options.batch * len(methods)

    def all_of_torchcam() -> int:
        for name in together:
            theirs = FAST[name][0]
            with getattr(torchcam.methods, theirs)(
                model, LAYER, **({"fc_layer": "classifier.head"} if theirs == "CAM" else {})
            ) as extractor:
                extractor(labels.tolist(), model(images))
        return options.batch * len(methods)

    own, found = rate(all_of_bench, options.seconds), rate(all_of_torchcam, options.seconds)
    print(
        f"{len(together)} methods a picture: bench {own:.1f} maps/s from one forward pass, torchcam {found:.1f} maps/s, {own / found:.1f}x"
    )


if __name__ == "__main__":
    main()
