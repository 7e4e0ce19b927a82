"""``bench run``: carry out the matrix."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import Device, ProcessFlags, SettingsFlags, expanded, parse_device, split_list

if TYPE_CHECKING:
    from bench.launch.choice import Launch
    from bench.launch.request import RunRequest
    from bench.runtime.engine import Engine
    from bench.runtime.interruption import StopRequest
    from bench.runtime.observer import Observer
    from bench.sweep.plan import Plan

NOT_FOR_CHILDREN = frozenset({*ProcessFlags.__dataclass_fields__, "dry_run", "only", "wait"})
"""Options that are no part of `RunRequest.command`."""


Wait = Annotated[
    bool | None,
    typer.Option(
        help="Wait at the end for trainings that other runs work on (default), or for Slurm jobs (default: do not wait).",
        show_default=False,
    ),
]


@expanded
def run(
    context: typer.Context,
    flags: SettingsFlags,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan only.")] = False,
    engine_name: Annotated[str | None, typer.Option("--engine", help="ddp or deepspeed: short for --set train.engine=.")] = None,
    track: Annotated[str | None, typer.Option(help="Trackers: tensorboard, wandb (comma-separated).")] = None,
    device: Device = "auto",
    timeout: Annotated[int, typer.Option(help="Seconds after which a lost process makes the remaining ones fail.")] = 1800,
    wait: Wait = None,
    only: Annotated[str | None, typer.Option(help="Keys of trainings as bench plan shows them, comma-separated: run only these.")] = None,
    *,
    processes: ProcessFlags,
) -> None:
    """Train and evaluate every cell that is not done, then print the leaderboard.

    Run it again to go on after an interruption: finished cells are skipped, a training goes on from its last checkpoint.
    Several runs may share a results folder, on several hosts too: each training is done by one of them.
    Under torchrun or accelerate launch all processes work on each training together.

    SIGTERM, SIGUSR1 or Ctrl-C: the step at hand is finished and saved, and the run ends with status 75, which asks to be started again. A
    second signal ends the run at once. Statuses: 0 all done, 1 some cells failed, 2 the request cannot be carried out.
    """
    import dataclasses

    from bench.launch.request import Processes, RunRequest
    from bench.runtime.interruption import REQUEUE, StopRequest

    settings = flags.settings(train__engine=engine_name)
    request = RunRequest(
        settings=settings,
        plugins=tuple(flags.plugins or ()),
        only=tuple(only.split(",") if only else ()),
        device=parse_device(device),
        trackers=tuple(split_list(track) or ()),
        timeout_s=timeout,
        wait=wait,
        processes=Processes(**dataclasses.asdict(processes)),
        command=tuple(child_command(context, without=NOT_FOR_CHILDREN)),
    )
    if request.processes.launcher == "slurm":
        from bench.cli.slurm import run_by_slurm

        run_by_slurm(request, dry_run=dry_run)
        return
    stop = StopRequest()
    with stop.on_signals():  # from here on: what is imported for the plan takes seconds
        from bench.launch.report import wanted
        from bench.launch.start import choose_launch

        launch = choose_launch(request)
        plan = request.plan(world_size=launch.world_size, trial=not wanted())  # a run that started this one has tried everything
    if stop.reason is not None:
        _say(f"stopped by {stop.reason} before anything was begun.")
        raise typer.Exit(REQUEUE)
    if dry_run:
        _show(plan, launch, timeout_s=timeout)
    elif launch.kind in ("torchrun", "groups"):
        raise typer.Exit(_spawn(request, launch, plan, stop))
    else:
        raise typer.Exit(_work(request, plan, stop))


def _show(plan: Plan, launch: Launch, *, timeout_s: int) -> None:
    from rich.console import Console

    from bench.cli.plan import show_plan
    from bench.launch.start import describe

    show_plan(plan, processes=launch.world_size, groups=launch.groups)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"Launch: {describe(launch, timeout_s=timeout_s)}.")


def _work(request: RunRequest, plan: Plan, stop: StopRequest) -> int:
    """Work on the plan in this process, with the processes of its world; returns the exit status."""
    from bench.cli.summary import summary
    from bench.launch.report import wanted
    from bench.launch.start import exit_status, report_of, run_here, stopped_report
    from bench.runtime.interruption import BrokenWorldError, EverywhereError, StoppedError

    try:
        plan, outcome, main = run_here(request, plan, display=_display, stop=stop)
    except StoppedError as error:
        if not wanted():
            _say(f"stopped {error}. The same command goes on from here.")
        return exit_status(stopped_report(str(error)))
    except EverywhereError as error:
        _say(f"error: {error}")
        return exit_status(stopped_report(str(error), status=2))
    except BrokenWorldError as error:
        _say(f"failed {error}. The other processes cannot go on without this one. The same command tries again.")
        return 1
    if main and not wanted():
        summary(plan, outcome)
    return exit_status(report_of(outcome))


def _spawn(request: RunRequest, launch: Launch, plan: Plan, stop: StopRequest) -> int:
    """Start processes, wait for them, and say how it went; returns the exit status."""
    import dataclasses

    from bench.cli.summary import summary
    from bench.launch.report import wanted
    from bench.launch.start import exit_status, outcome_of, spawn
    from bench.runtime.interruption import REQUEUE

    started = time.monotonic()
    before, ended = spawn(request, launch, plan, emit=functools.partial(typer.echo, err=True), stop=stop)
    now = request.plan(world_size=launch.world_size, trial=False)
    ended = dataclasses.replace(ended, status=0 if len(now.done) == len(now.matrix.cells) else ended.status)
    if ended.message:
        _say(f"{ended.message}." + (" The same command goes on from here." if ended.status in (1, REQUEUE) else ""))
    if ended.status in (0, 1) and ended.rank == 0 and not wanted():
        summary(now, outcome_of(before, now, ended, seconds=time.monotonic() - started))
    return exit_status(ended)


def child_command(context: typer.Context, *, without: Container[str]) -> list[str]:
    """This command again, for a process that it starts: program, verb and all flags that were given, but those of ``without``."""
    verbose = ["--verbose"] if context.parent is not None and context.parent.params.get("verbose") else []
    words = [sys.executable, "-P", "-m", "bench", *verbose, "run"]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in without or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for part in value if isinstance(value, list | tuple) else (value,):
                words += [parameter.opts[0], str(part)]
    return words


@contextmanager
def _display(engine: Engine) -> Iterator[Observer]:
    """Bars on the terminal of the main process; log lines elsewhere."""
    from bench.cli.display import RichObserver
    from bench.runtime.observer import LogObserver

    if not (engine.is_main and sys.stderr.isatty()):
        yield LogObserver()
        return
    observer = RichObserver()
    try:
        yield observer
    finally:
        observer.stop()


def _say(text: str) -> None:
    """A line on stderr, its first word in a colour that says how grave it is."""
    from rich.console import Console
    from rich.text import Text

    first, space, rest = text.partition(" ")
    style = {"stopped": "yellow", "failed": "red", "error:": "bold red"}.get(first, "")
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble((first, style), space, rest))
