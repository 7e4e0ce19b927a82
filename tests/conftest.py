"""Fixtures shared by all rooms."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

from bench.cli.main import main
from bench.config import Settings, load_settings
from bench.runtime.engine import Engine
from bench.runtime.observer import LogObserver
from bench.sweep.plan import make_plan, ready_plan
from bench.sweep.run import Outcome, run_plan

# A busy machine is no error of a test: nothing depends on how long an example takes. What fails in CI fails again there.
hypothesis.settings.register_profile(
    "bench",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("bench")


def pytest_collection_finish() -> None:
    """Each training collects garbage, a second's work among all that the tests have imported: take that out of sight."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What stays frozen to the end is reported as leaked by Triton's bindings, a screen full below the summary."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The workers share the cores: more threads than cores only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's own reaches a test."""
    for name in [n for n in os.environ if n.startswith("BENCH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a fresh interpreter, away from the checkout; returns what it printed."""

    def run(code: str, *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            cwd=cwd or Path("/"),
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_bench() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a fresh process; the result is not checked."""

    def run(
        *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 500
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "bench", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd or Path("/"),
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(env or {})},
            timeout=timeout,
            check=False,
        )

    return run


class Finished(NamedTuple):
    """What a command in this process left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def bench_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run the command line in this process, which saves the seconds of a start; not for commands that register a plugin."""

    def run(*arguments: object, cwd: Path) -> Finished:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Finished(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


SMALL = """
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
[loader]
workers = 0
[train]
batch_size = 12
optimizer = "adamw"
lr = 0.003
schedule = "constant"
"""
"""Settings of a training of seconds; what follows belongs to ``[train]``."""
TINY = f"""
[run]
methods = ["cam"]
backbones = ["mini"]
data = "{{data}}"
{SMALL}
epochs = 2
"""


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared datasets, shared by all tests: preparing is deterministic, so sharing changes nothing."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def project(tmp_path: Path, data_root: Path) -> Path:
    """An empty folder with a bench.toml that makes a run of seconds."""
    (tmp_path / "bench.toml").write_text(TINY.format(data=data_root))
    return tmp_path


def carry_out(settings: Settings) -> Outcome:
    """Prepare the data and do all that settings ask for, in this process."""
    plan = ready_plan(make_plan(settings), observer=LogObserver())
    return run_plan(plan, engine=Engine(train=settings.config.train, device="cpu"), observer=LogObserver())


@pytest.fixture
def go(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Carry out a run in this process, from settings given as dotted keys."""
    monkeypatch.chdir(project)

    def run(**flags: object) -> Outcome:
        settings = load_settings(environ={}, flags={key.replace("__", "."): value for key, value in flags.items()})
        return carry_out(settings)

    return run


HONEST = f"""
[run]
methods = ["cam", "gradcam"]
backbones = ["mini"]
guidance = ["none"]
seeds = [0, 1]
results = "results"
data = "{{data}}"
{SMALL}
epochs = 1
[slurm]
partition = "department-of-faces"
"""
"""Two trainings, each read out by two methods."""


def finish(folder: Path, settings_file: str) -> Path:
    """Carry out all that a bench.toml asks for; returns the folder, with the results in it."""
    (folder / "bench.toml").write_text(settings_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = carry_out(load_settings(environ={}))
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
