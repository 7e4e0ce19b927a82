"""DeepSpeed against DDP: the same losses and weights, checkpoints of our own, and what it refuses. On CPUs, with gloo."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from bench.config import ConfigError, load_settings
from bench.sweep.plan import make_plan
from bench.sweep.store import read_records
from tests.training.one_training import start

BASE = ("run.guidance=['au']", "train.epochs=3")  # twelve steps
SGD = ("train.optimizer=sgd", "train.lr=0.05")
CLIP, ACCUMULATE = "train.clip_norm=0.5", "train.accumulate=2"
RUNS = {}


def zero(stage):
    return ("train.engine=deepspeed", f"train.zero_stage={stage}")


def run_once(project, *sets, processes):
    """The same run serves all tests that compare with it."""
    if (sets, processes) not in RUNS:
        RUNS[sets, processes] = start(project, "reference", *BASE, *sets, processes=processes)
    return RUNS[sets, processes]


def assert_close(a, b):
    assert len(a.losses) == 12
    torch.testing.assert_close(a.losses, b.losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-6)


def assert_equal(a, b):
    assert torch.equal(a.losses, b.losses)
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [(2, 1), (0, 2), (1, 2), (2, 2)])
def test_zero_gives_the_losses_and_weights_of_ddp(prepared, stage, processes):
    assert_close(run_once(prepared, *zero(stage), processes=processes), run_once(prepared, processes=processes))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "switches"),
    [(0, (CLIP, ACCUMULATE)), (1, (CLIP, ACCUMULATE)), (2, (CLIP, ACCUMULATE)), (1, (ACCUMULATE,)), (2, (CLIP,))],
    ids=["0-both", "1-both", "2-both", "1-accumulated", "2-clipped"],
)
def test_sgd_clipped_and_accumulated_is_that_of_ddp(prepared, stage, switches):
    ours = run_once(prepared, *SGD, *switches, processes=2)
    assert_close(start(prepared, "zero", *BASE, *SGD, *switches, *zero(stage), processes=2), ours)
    if CLIP in switches:
        loose = run_once(prepared, *SGD, *(switch for switch in switches if switch != CLIP), processes=2)
        assert (ours.losses - loose.losses).abs().max() > 1e-3, "the norm is never above the bound: this test compares nothing"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("sets", [zero(0), zero(2), (*zero(1), *SGD, CLIP)], ids=["0", "2", "1-sgd"])
def test_resumed_it_ends_as_if_undisturbed_to_the_last_bit(prepared, sets):
    assert start(prepared, "stopped", *BASE, *sets, processes=2, stop=True) is None
    assert sorted(p.name for p in (prepared / "stopped" / "checkpoints").iterdir()) == ["00000004"]
    assert_equal(start(prepared, "stopped", *BASE, *sets, processes=2), run_once(prepared, *sets, processes=2))


@pytest.mark.dist
@pytest.mark.slow
def test_the_checkpoint_of_two_processes_is_whole_and_goes_on_in_one(prepared):
    start(prepared, "stopped", *BASE, *zero(2), processes=2, stop=True)
    (folder,) = (prepared / "stopped" / "checkpoints").iterdir()
    model, optimiser = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimiser"))
    shapes = sorted(tuple(t.shape) for name, t in optimiser.items() if name.endswith(".exp_avg"))
    assert shapes == sorted(tuple(t.shape) for t in model.values())  # this network has no buffers
    assert_close(start(prepared, "stopped", *BASE, *zero(2), processes=1), run_once(prepared, processes=1))


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["train.precision=bf16", "train.ema=0.9"])
def test_a_switch_does_under_deepspeed_what_it_does_under_ddp(prepared, switch):
    assert_close(start(prepared, "zero", *BASE, *zero(2), switch), start(prepared, "ddp", *BASE, switch))


@pytest.mark.slow
def test_a_run_trains_one_network_after_the_other_with_deepspeed_and_says_so(project, run_bench):
    """Two trainings: the first engine must leave room for the second."""
    done = run_bench("run", "--engine", "deepspeed", "--set", "train.zero_stage=1", "--device", "cpu", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cells done" in done.stdout
    assert "Reduce bucket size" not in done.stdout, "DeepSpeed's log is on standard output"
    for _, record in read_records(project / "results"):
        assert (record.settings["train"]["engine"], record.settings["train"]["zero_stage"]) == ("deepspeed", 1)
        assert record.origins["train.engine"] == "--engine"


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_a_package_that_is_not_installed_is_named_in_the_plan_with_the_command(project, monkeypatch, package):
    monkeypatch.chdir(project)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ConfigError, match=rf"{package} is not installed; pip install 'deepspeed>=.*' 'transformers>="):
        make_plan(load_settings(environ={}, sets=["train.engine=deepspeed"]))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.zero_stage=1"], "zero_stage = 1 is DeepSpeed's; it needs engine = deepspeed"),
        (["train.engine=deepspeed", "train.precision=fp16"], "precision = fp16 does not go with engine = deepspeed"),
        (["train.engine=deepspeed", "train.compile=true"], "compile = true does not go with engine = deepspeed"),
        (["train.engine=deepspeed", "train.channels_last=true"], "channels_last = true does not go with engine = deepspeed"),
        (["train.engine=deepspeed", "train.zero_stage=3"], "train.zero_stage = 3"),
    ],
)
def test_what_does_not_go_together_is_refused(project, monkeypatch, sets, message):
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError) as refused:
        load_settings(environ={}, sets=sets)
    assert message in str(refused.value)


def test_every_number_in_deepspeeds_configuration_is_one():
    from bench.runtime.deepspeed_strategy import _deepspeed_config

    text = json.dumps(_deepspeed_config(2))
    assert "auto" not in text
    assert _deepspeed_config(2)["gradient_clipping"] == 0
