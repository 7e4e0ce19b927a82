"""A method that nobody needs: the absolute value of CAM. Trains as CAM, reads out its own map."""

from __future__ import annotations

from torch import Tensor

from bench.method import METHODS, Classifier, Output
from bench.methods.cam import CAM


@METHODS.register("edge-cam", title="EdgeCAM", paper="Nobody, 2026", kind="posthoc", trains_as="cam")
class EdgeCAM(CAM):
    """|CAM|."""

    def maps(self, classifier: Classifier, output: Output, classes: Tensor) -> Tensor:
        """See `Method.maps`."""
        return super().maps(classifier, output, classes).abs()
