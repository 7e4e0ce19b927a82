"""``bench run --launcher slurm``: show, submit, wait."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from bench.launch.request import RunRequest
    from bench.launch.slurm import Shape, TrainingJob
    from bench.sweep.plan import Plan

NOT_HERE = ("procs_per_training", "rdzv_endpoint", "rdzv_id", "rdzv_timeout", "max_restarts", "share_devices")
"""Flags of the other launchers."""


def run_by_slurm(request: RunRequest, *, dry_run: bool) -> None:
    """Submit a job for each training still to do; with ``slurm.cluster = 'local'`` run them here. The jobs get the flags of this command.

    Raises:
        ValueError: whatever cannot be, before anything is submitted.
        typer.Exit: 1 if cells are missing at the end of a wait.
    """
    from bench.launch import slurm
    from bench.launch.request import Processes
    from bench.runtime.observer import LogObserver
    from bench.sweep.estimate import order
    from bench.sweep.plan import ready_plan

    settings, processes = request.settings, request.processes
    for name in NOT_HERE:
        if getattr(processes, name) != getattr(Processes(), name):
            raise ValueError(
                f"--launcher slurm: --{name.replace('_', '-')} has no meaning for it; each job is one training, over --nnodes x --nproc"
            )
    slurm.check_submitit()
    config, results = settings.config.slurm, settings.config.run.results
    shape = slurm.job_shape(settings, nodes=processes.nnodes, processes=processes.nproc, device=request.device)

    def jobs(made: Plan) -> list[TrainingJob]:
        return slurm.make_jobs(order(made), arguments=_words(request), config=config, world_size=shape.world_size)

    made = request.plan(world_size=shape.world_size)
    if dry_run:
        _show(made, jobs(made), shape)
        return
    using = slurm.executor(config, shape, results=results)
    made = ready_plan(made, observer=LogObserver(), plugins=request.plugins)
    todo = jobs(made)
    book = slurm.Book(results)
    here = config.cluster == "local"
    living = {} if here else book.living(job.key for job in todo)
    todo = [job for job in todo if job.key not in living]
    for key, (number, state) in living.items():
        typer.echo(f"job {number} ({state.lower()}) is there already for training {key[:10]}")
    if any(state == "UNKNOWN" for _, state in living.values()):
        typer.echo(f"sacct does not know some of them. If they are gone, remove {book.path} and type the command again")
    if here:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the jobs are ended too
        # That is done by SIGINT, which processes in the background of a script inherit as ignored, and their children from them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        slurm.run_here(todo, using, parallel=config.parallel or 1, started=_say)
    elif todo:
        submitted = slurm.submit(todo, using)
        numbers = {job.job_id: todo[place] for place, job in enumerate(submitted)}
        book.add(numbers)
        for number, job in numbers.items():
            _say(job, number)
        typer.echo(f"{len(numbers)} jobs submitted. Logs: {results / slurm.FOLDER}. See: bench status --results {results}")
    if request.wait and not here:
        slurm.wait_for([*(submitted if todo else ()), *(slurm.job_of(number, results) for number, _ in living.values())])
    if request.wait or here:
        _summary(request.plan(world_size=shape.world_size, trial=False), len(todo))


def _words(request: RunRequest) -> list[str]:
    """Arguments of ``bench`` for the jobs: those of the running command, without what is about launching."""
    words = list(request.command)
    words = words[words.index("bench") + 1 :]
    ours = [place for place, word in enumerate(words[:-1]) if word == "--set" and words[place + 1].strip().startswith("slurm.")]
    return [word for place, word in enumerate(words) if place not in ours and place - 1 not in ours]


def _say(job: TrainingJob, number: str) -> None:
    typer.echo(f"job {number}: {job.label} ({job.key[:10]})")


def _show(plan: Plan, jobs: Sequence[TrainingJob], shape: Shape) -> None:
    from bench.cli.plan import show_plan
    from bench.launch.slurm import submission_text

    show_plan(plan, processes=shape.world_size, groups=plan.settings.config.slurm.parallel or max(1, len(jobs)))
    if not jobs:
        typer.echo("nothing to submit")
        return
    config, results = plan.settings.config.slurm, plan.settings.config.run.results
    typer.echo(f"{len(jobs)} jobs{' as one array' if len(jobs) > 1 else ''}; sbatch would get:\n")
    typer.echo(submission_text(config, shape, results=results, jobs=len(jobs)))
    typer.echo(f"The first of them runs in {jobs[0].folder}:\n  bench {' '.join(jobs[0].arguments)}")


def _summary(plan: Plan, ended: int) -> None:
    from bench.cli.leaderboard import show_tables
    from bench.launch.slurm import FOLDER

    results = plan.settings.config.run.results
    missing = [cell for _, cells in plan.to_do for cell in cells]
    if len(missing) < len(plan.matrix.cells):
        show_tables(results)
    typer.echo(f"{ended} jobs ended; {len(plan.matrix.cells) - len(missing)} cells done, {len(missing)} missing.")
    for cell in missing:
        typer.echo(f"missing {cell.label}: see {results / 'failures'} and the logs in {results / FOLDER}")
    if missing:
        raise typer.Exit(1)
