"""Fixtures shared by the tests of trust: verify, stamp, submit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.config import load_settings
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import make_plan
from bench.sweep.run import run_plan
from bench.training.engine import Engine
from bench.training.observer import LogObserver

HONEST = """
[run]
methods = ["cam", "gradcam"]
backbones = ["mini"]
guidance = ["none"]
seeds = [0, 1]
results = "results"
data = "{data}"
[images]
size = 32
[backbones.mini]
width = 8
norm = "group"
[datasets.synthetic]
size = 36
train = 48
val = 14
test = 27
[train]
epochs = 1
batch_size = 12
optimizer = "adamw"
lr = 0.003
schedule = "constant"
[loader]
workers = 0
[slurm]
partition = "department-of-faces"
"""
"""Two trainings, each read out by two methods."""


@pytest.fixture(scope="session")
def honest_project(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A finished tiny run. Not to be changed: see `honest`."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "bench.toml").write_text(HONEST.format(data=data_root))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = load_settings(environ={})
        prepare_missing(make_plan(settings).sources.values(), observer=LogObserver(), plugins=())
        outcome = run_plan(make_plan(settings), engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver())
    assert len(outcome.ran) == 4
    return folder


@pytest.fixture
def honest(honest_project: Path, tmp_path: Path) -> Path:
    """A copy of its results, to tamper with."""
    return Path(shutil.copytree(honest_project / "results", tmp_path / "results"))
