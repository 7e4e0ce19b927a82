"""What an evaluation says of its cost."""

from __future__ import annotations

import time

import torch
from torch import nn

from bench.evaluation.evaluator import count_macs
from bench.methods.cam import CAM
from bench.sweep.store import read_records


class Slow(CAM):
    """Takes its time over every batch."""

    def maps(self, classifier, output, classes):
        time.sleep(0.02)
        return super().maps(classifier, output, classes)


def test_each_method_is_timed_by_itself_over_one_map_a_picture(make_method, evaluated):
    method, classifier = make_method("cam")
    results = evaluated(classifier, {"slow": Slow(CAM.Options(), variant="paper"), "cam": method}, batch_size=9)
    assert results["slow"].map_seconds_per_image >= 3 * 0.02 / 27
    assert 0 < results["cam"].map_seconds_per_image < results["slow"].map_seconds_per_image


def test_macs_are_the_products_of_convolutions_and_matrices():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    assert count_macs(network, size=8, device=torch.device("cpu")) == 64 * 4 * 3 * 9 + 5 * 4 * 64


def test_a_record_tells_what_it_cost(go, project):
    go(run__guidance=["none"])
    ((_, record),) = read_records(project / "results")
    for name in ("macs", "map_seconds_per_image", "evaluation_peak_memory_bytes"):
        assert record.cost[name] > 0
