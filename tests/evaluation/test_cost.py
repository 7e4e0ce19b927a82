"""What an evaluation says of its cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from bench.evaluation.evaluator import Stopwatch, count_macs
from bench.methods.cam import CAM
from bench.sweep.record import device_name, hardware_facts
from bench.sweep.store import read_records
from bench.training.trainer import peak_memory, reset_peak_memory


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
    for name in ("macs", "map_seconds_per_image", "evaluation_images_per_second"):
        assert record.cost[name] > 0
    assert record.cost["evaluation_cells"] == 1


def test_memory_that_cannot_be_measured_for_a_training_alone_is_left_out(go, project):
    go(run__guidance=["none"])
    ((_, record),) = read_records(project / "results")
    assert record.hardware["device"] == "cpu"
    assert (record.cost["training_peak_memory_bytes"], record.cost["evaluation_peak_memory_bytes"]) == (None, None)


@pytest.mark.gpu
def test_memory_of_a_training_does_not_count_what_the_process_held_before():
    device = torch.device("cuda")
    torch.empty(64 << 20, dtype=torch.uint8, device=device)
    reset_peak_memory(device)
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    assert len(kept) <= peak_memory(device) < 64 << 20


def test_a_processor_is_recorded_by_its_model_and_threads():
    facts = hardware_facts(torch.device("cpu"), world_size=1)
    assert facts["name"] not in ("x86_64", "aarch64", "")
    assert device_name(facts) == f"{facts['name']}, {facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'}"
    assert device_name({"device": "cuda", "name": "NVIDIA H100", "threads": 4}) == "NVIDIA H100"


def test_a_stopwatch_adds_up_by_name():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.timing("long"):
            time.sleep(0.02)
    with watch.timing("short"):
        pass
    assert watch.seconds()["long"] >= 0.04 > watch.seconds()["short"]
