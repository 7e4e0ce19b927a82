"""One training in one process or several: the same weights to rounding, or a record of what makes the difference."""

from __future__ import annotations

import pytest
import torch

from bench.sweep.record import ProcessFacts
from bench.sweep.store import read_records
from bench.training.trainer import read_trained
from tests.training.one_training import start

PLUGIN = """
from torch import nn
from torch.nn import functional as F

from bench.backbone import BACKBONES
from bench.backbones.mini import MiniResNet


@BACKBONES.register("dropping", title="Dropping", kind="cnn")
class Dropping(MiniResNet):
    @classmethod
    def build(cls, options, *, image_size):
        backbone = super().build(options, image_size=image_size)
        backbone.net.layer2 = nn.Sequential(nn.Dropout(0.3), backbone.net.layer2, nn.Dropout2d(0.2))
        return backbone


class ByItself(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.3, training=self.training)


@BACKBONES.register("by-itself", title="By itself", kind="cnn")
class DroppingByItself(MiniResNet):
    @classmethod
    def build(cls, options, *, image_size):
        backbone = super().build(options, image_size=image_size)
        backbone.net.layer2 = nn.Sequential(ByItself(), backbone.net.layer2)
        return backbone
"""
SGD = ("train.optimizer=sgd", "train.lr=0.01", "run.guidance=['au']", "backbones.dropping.norm=group", "backbones.dropping.width=8")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("method", "ways"), [("cutmix", {"two": (2, 1), "three": (3, 1), "both": (2, 2)}), ("adl", {"two": (2, 1), "parts": (1, 3)})]
)
def test_with_group_norm_any_processes_and_micro_batches_give_the_same_weights(prepared, method, ways):
    (prepared / "plugin.py").write_text(PLUGIN)
    sets = (*SGD, f"run.methods=['{method}']", "run.backbones=['dropping']")
    alone = start(prepared, "alone", *sets)
    for name, (processes, parts) in ways.items():
        spread = start(prepared, name, *sets, f"train.accumulate={parts}", processes=processes)
        torch.testing.assert_close(spread.losses, alone.losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(spread.weights, alone.weights, rtol=1e-5, atol=1e-5)
        trained = read_trained(prepared / name)
        assert (trained["process_counts"], trained["process_dependent"]) == ([processes], [])


@pytest.mark.slow
def test_a_network_that_draws_by_itself_is_written_down_as_such(prepared):
    (prepared / "plugin.py").write_text(PLUGIN)
    sets = ("run.backbones=['by-itself']", "backbones.by-itself.norm=group", "backbones.by-itself.width=8", "train.epochs=1")
    start(prepared, "one", *sets)
    assert read_trained(prepared / "one")["process_dependent"] == ["random numbers of each process"]


@pytest.mark.parametrize(("norm", "causes"), [("batch", ("batch statistics",)), ("group", ())])
def test_a_record_tells_whether_the_number_of_processes_matters(go, project, norm, causes):
    assert not go(run__guidance=["none"], train__epochs=1, backbones__mini__norm=norm).failed
    ((_, record),) = read_records(project / "results")
    assert record.processes == ProcessFacts(counts=(1,), dependent=causes)
