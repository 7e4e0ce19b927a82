"""``bench run``: carry out the matrix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bench.cli import launching, options

if TYPE_CHECKING:
    from bench.runtime.engine import Engine
    from bench.runtime.observer import Observer
    from bench.sweep.plan import Plan
    from bench.sweep.run import Outcome


def run(
    context: typer.Context,
    methods: options.Methods = None,
    datasets: options.Datasets = None,
    backbones: options.Backbones = None,
    guidance: options.Guidance = None,
    seeds: options.Seeds = None,
    variant: options.Variant = None,
    protocol: options.Protocol = None,
    metrics: options.Metrics = None,
    results: options.Results = None,
    data: options.Data = None,
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    sets: options.Sets = None,
    plugins: options.Plugins = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan only.")] = False,
    engine_name: options.Engine = None,
    track: Annotated[str | None, typer.Option(help="Trackers: tensorboard, wandb (comma-separated).")] = None,
    device: Annotated[str, typer.Option(help="auto, or cpu to leave accelerators alone.")] = "auto",
    timeout: Annotated[int, typer.Option(help="Seconds after which a lost process makes the others fail.")] = 1800,
    wait: Annotated[bool, typer.Option(help="Wait in the end for what other runs on the same results folder work on.")] = True,
    only: Annotated[str | None, typer.Option(help="Keys of trainings as bench plan shows them, comma-separated: run these alone.")] = None,
    launcher: launching.Launcher = "auto",
    nproc: launching.Nproc = None,
    nnodes: launching.Nnodes = 1,
    procs_per_training: launching.ProcsPerTraining = None,
    rdzv_endpoint: launching.RdzvEndpoint = None,
    rdzv_id: launching.RdzvId = None,
    rdzv_timeout: launching.RdzvTimeout = 600,
    max_restarts: launching.MaxRestarts = 3,
    share_devices: launching.ShareDevices = False,
) -> None:
    """Train and evaluate every cell that is not done, then print the leaderboard.

    Run it again to go on after an interruption: finished cells are skipped, a training goes on from its last checkpoint.
    Several runs may share a results folder, on several hosts too: each training is done by one of them.
    Under torchrun or accelerate launch all processes work on each training together.

    SIGTERM, SIGUSR1 or Ctrl-C: the step at hand is finished and saved, and the run ends with status 75, which asks to be started again. A
    second one ends it at once. Other statuses: 0 done, 1 some cells failed, 2 the request cannot be carried out.
    """
    from bench.runtime.interruption import REQUEUE, BrokenWorldError, EverywhereError, StoppedError, StopRequest

    settings = options.settings_from(context)
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: use auto or cpu")
    if launcher == "slurm":
        from bench.cli.slurm import run_by_slurm

        run_by_slurm(context, settings)
        return
    stop = StopRequest()
    with stop.on_signals():  # from here on: what is imported for the plan takes seconds
        from bench.runtime.engine import Engine
        from bench.sweep.plan import make_plan

        launch = launching.choose_launch(context)
        chosen = tuple(only.split(",") if only else ())
        # Who has started this process has tried everything.
        made = make_plan(settings, world_size=launch.world_size, only=chosen, trial=not launching.reports())
    if stop.reason is not None:
        _say(f"[yellow]stopped[/] by {stop.reason} before anything was begun.")
        raise typer.Exit(REQUEUE)
    if dry_run:
        from bench.cli.plan import show_plan

        show_plan(made, processes=launch.world_size, groups=launch.groups)
        launching.show_launch(context, launch)
        return
    if launch.kind in ("torchrun", "groups"):
        raise typer.Exit(launching.spawn(context, launch, made, only=chosen))
    try:
        with stop.on_signals():
            engine = Engine(
                train=settings.config.train,
                device="cpu" if device == "cpu" else "auto",
                trackers=tuple(part for part in (track or "").split(",") if part),
                tracking_folder=settings.config.run.results / "tracking",
                timeout_s=timeout,
                stop=stop,
            )
            outcome = _carry_out(made, engine, plugins=tuple(plugins or ()), wait=wait, only=chosen)
            engine.close()  # not after an error: the others may be gone, and would be waited for
    except StoppedError as error:
        if not launching.reports():
            _say(f"[yellow]stopped[/] {escape(str(error))}. The same command goes on from here.")
        raise launching.leave(REQUEUE, message=str(error)) from None
    except EverywhereError as error:
        _say(f"[bold red]error:[/] {escape(str(error))}")
        raise launching.leave(2, message=str(error)) from None
    except BrokenWorldError as error:
        _say(f"[red]failed[/] {escape(str(error))}. The other processes cannot go on without this one. The same command tries again.")
        raise typer.Exit(1) from None
    raise launching.leave(1 if outcome.failed else 0, outcome)


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def _carry_out(plan: Plan, engine: Engine, *, plugins: tuple[str, ...], wait: bool, only: tuple[str, ...]) -> Outcome:
    from bench.sweep.datasets import prepare_missing
    from bench.sweep.plan import make_plan
    from bench.sweep.run import run_plan

    observer, end_display = _observer(engine)
    try:
        if engine.any(any(source.index is None for source in plan.sources.values())):
            with engine.together():
                if engine.is_main:
                    prepare_missing(plan.sources.values(), observer=observer, plugins=plugins, stop=engine.stop)
            plan = make_plan(plan.settings, world_size=engine.world_size, only=only, trial=not launching.reports())
        outcome = run_plan(plan, engine=engine, observer=observer, wait=wait)
    finally:
        end_display()
    if engine.is_main and not launching.reports():
        from bench.cli.summary import summary

        summary(plan, outcome)
    return outcome


def _observer(engine: Engine) -> tuple[Observer, Callable[[], None]]:
    from bench.cli.display import RichObserver
    from bench.runtime.observer import LogObserver

    if engine.is_main and sys.stderr.isatty():
        observer = RichObserver()
        return observer, observer.stop
    return LogObserver(), lambda: None
