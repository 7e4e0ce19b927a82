"""Fixtures shared by the tests of this room: runs that are finished."""

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
from tests.conftest import TINY

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


def finish(folder: Path, settings_file: str) -> Path:
    """Carry out all that a bench.toml asks for; returns the folder, with the results in it."""
    (folder / "bench.toml").write_text(settings_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = load_settings(environ={})
        prepare_missing(make_plan(settings).sources.values(), observer=LogObserver(), plugins=())
        outcome = run_plan(make_plan(settings), engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver())
    assert not outcome.failed
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """Results of the run of `project` that nobody disturbs, with and without guidance. To compare with and to copy, not to be changed."""
    return finish(tmp_path_factory.mktemp("finished"), TINY.format(data=data_root)) / "results"


@pytest.fixture(scope="session")
def honest_project(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A finished tiny run. Not to be changed: see `honest`."""
    return finish(tmp_path_factory.mktemp("honest"), HONEST.format(data=data_root))


@pytest.fixture
def honest(honest_project: Path, tmp_path: Path) -> Path:
    """A copy of its results, to tamper with."""
    return Path(shutil.copytree(honest_project / "results", tmp_path / "results"))
