"""One training of the bench.toml in the working directory, in one process or several: one_training.py FOLDER [--stop] [--gpu] [KEY=VALUE].

A plugin file ``plugin.py`` of the working directory is loaded, if there is one.

Tests start it through `start` below. ``--stop`` ends it, on all processes, in the selection after its second epoch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file


class Ended(NamedTuple):
    """What `start` returns."""

    losses: torch.Tensor
    """(steps, 2): classification, guidance."""
    weights: dict[str, torch.Tensor]
    """Those that were selected from last: of the end of the last epoch, averaged with train.ema."""


class StopHereError(Exception):
    """The interruption that ``--stop`` asks for."""


def main(folder, *arguments):
    from bench.config import load_settings
    from bench.data.readers import open_reader
    from bench.evaluation.evaluator import accuracy
    from bench.registry import load_plugin
    from bench.runtime.engine import Engine
    from bench.runtime.observer import LogObserver
    from bench.sweep.plan import make_plan
    from bench.training.trainer import train

    if Path("plugin.py").is_file():
        load_plugin("plugin.py")
    settings = load_settings(environ={}, sets=[a for a in arguments if not a.startswith("--")])
    plan = make_plan(settings, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    training = plan.matrix.trainings[0].training
    engine = Engine(train=settings.config.train, device="auto" if "--gpu" in arguments else "cpu", timeout_s=120)
    data = plan.sources[training.dataset.name].folder
    how = {"workers": 0, "cache_bytes": 2**30, "verify": False, "balance": "none"}
    readers = {split: open_reader(data, split, **how) for split in ("train", "val")}
    selections = 0

    def select(classifier):
        nonlocal selections
        selections += 1
        if engine.is_main:
            save_file({k: v.detach().contiguous() for k, v in classifier.state_dict().items()}, f"{folder}.safetensors")
        if "--stop" in arguments and selections == 2:
            raise StopHereError
        return accuracy(classifier, readers["val"], size=training.settings["images"]["size"], batch_size=7, engine=engine)

    try:
        train(
            training,
            folder=Path(folder),
            reader=readers["train"],
            select=select,
            engine=engine,
            observer=LogObserver(),
            checkpoint_minutes=10,
        )
    except StopHereError:
        pass
    finally:
        engine.release()
        engine.close()


def start(project, folder, *sets, processes=1, stop=False):
    """Run `main` in ``processes`` processes and wait; returns the losses and the last weights (None if stopped)."""
    from bench.training.trainer import read_trained

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher = [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    command = [sys.executable, "-P", *launcher, __file__, str(folder), *(["--stop"] if stop else []), *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if stop:
        assert not (project / folder / "trained.json").exists()
        return None
    return Ended(torch.tensor(read_trained(project / folder)["losses"]), load_file(project / f"{folder}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
