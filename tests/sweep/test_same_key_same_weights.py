"""The same key, the same weights: whatever else the plan holds, however samples are read, whoever runs it, wherever it was stopped."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.config import load_settings
from bench.prepare.pack import prepare
from bench.runtime.engine import Engine
from bench.runtime.interruption import StoppedError, StopRequest
from bench.runtime.observer import LogObserver
from bench.sweep.plan import make_plan
from bench.sweep.run import run_plan
from bench.sweep.store import read_records
from tests.conftest import TINY

METHODS = ("cam", "cutmix", "adl")


class StopAfter(LogObserver):
    """Asks for a stop after so many steps."""

    def __init__(self, request: StopRequest, steps: int) -> None:
        self.request = request
        self.left = steps

    def advance(self, *_args, steps, **_facts):
        self.left -= steps
        if self.left <= 0:
            self.request.reason = "the test"


@dataclasses.dataclass
class Laboratory:
    """A folder with two datasets of one name and one size, and other pictures."""

    folder: Path

    @property
    def datasets(self) -> tuple[str, str]:
        return (str(self.folder / "a" / "faces"), str(self.folder / "b" / "faces"))

    def run(self, results: Path, *, stop: int | None = None, **flags: object) -> dict[str, str]:
        """Carry out a plan until it is done, stopped once after ``stop`` steps; training key -> hash of its weights."""
        given = {"run.results": results, **{key.replace("__", "."): value for key, value in flags.items()}}
        chosen = load_settings(file=self.folder / "bench.toml", environ={}, flags=given)
        for steps in [stop, None] if stop else [None]:
            request = StopRequest()
            observer = StopAfter(request, steps) if steps else LogObserver()
            try:
                outcome = run_plan(
                    make_plan(chosen), engine=Engine(train=chosen.config.train, device="cpu", stop=request), observer=observer
                )
                assert not outcome.failed
            except StoppedError:
                continue
        return weights(results)


def weights(results: Path) -> dict[str, str]:
    keys: dict[str, set[str]] = {}
    for _, record in read_records(results):
        keys.setdefault(record.training_key, set()).add(record.weights_sha256)
    assert all(len(hashes) == 1 for hashes in keys.values())
    return {key: hashes.pop() for key, hashes in keys.items()}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    folder = tmp_path_factory.mktemp("laboratory")
    (folder / "bench.toml").write_text(TINY.format(data=folder / "data").replace("epochs = 2", "epochs = 1"))
    for seed, name in enumerate("ab"):
        options = {"size": 36, "train": 48, "val": 14, "test": 27, "seed": seed}
        prepare("synthetic", name="faces", options=options, raw=None, out=folder / name / "faces", workers=1)
    return Laboratory(folder)


@pytest.fixture(scope="module")
def alone(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Training key -> weights, of each training carried out by itself."""
    hashes: dict[str, str] = {}
    for number, (method, dataset) in enumerate(itertools.product(METHODS, laboratory.datasets)):
        results = tmp_path_factory.mktemp(f"alone{number}")
        hashes |= laboratory.run(results, run__methods=[method], run__datasets=[dataset], run__guidance=["au"])
    return hashes


def test_other_pictures_or_another_method_is_another_key_and_other_weights(alone):
    assert len(alone) == len(set(alone.values())) == 2 * len(METHODS)


@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_company_order_loader_and_interruption_do_not_change_weights(laboratory, alone, tmp_path_factory, data):
    methods = data.draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=2, unique=True), label="methods")
    datasets = data.draw(st.permutations(laboratory.datasets), label="datasets")
    hashes = laboratory.run(
        tmp_path_factory.mktemp("together"),
        stop=data.draw(st.none() | st.integers(1, 9), label="stop after steps"),
        run__methods=methods,
        run__datasets=datasets,
        run__guidance=["au"],
        loader__workers=data.draw(st.sampled_from([0, 2]), label="workers"),
        loader__cache_gib=data.draw(st.sampled_from([0.0, 1.0]), label="cache"),
        loader__verify=data.draw(st.booleans(), label="verify"),
    )
    assert len(hashes) == len(methods) * len(datasets)
    assert hashes == {key: alone[key] for key in hashes}


@pytest.mark.dist
@pytest.mark.parametrize(
    "launcher",
    [
        ("--launcher", "torchrun", "--nproc", "2", "--procs-per-training", "1"),
        ("--launcher", "slurm", "--set", "slurm.cluster=local", "--set", "slurm.parallel=2"),
    ],
    ids=["groups", "local jobs"],
)
def test_launchers_do_not_change_weights(laboratory, alone, run_bench, tmp_path, launcher):
    datasets = ",".join(laboratory.datasets)
    common = ("--methods", ",".join(METHODS), "--datasets", datasets, "--guidance", "au", "--results", tmp_path / "r", "--device", "cpu")
    done = run_bench("run", *common, *launcher, cwd=laboratory.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(tmp_path / "r") == alone
