"""``bench run``: carry out the matrix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import options

if TYPE_CHECKING:
    from bench.sweep.plan import Plan
    from bench.sweep.run import Outcome
    from bench.training.engine import Engine
    from bench.training.observer import Observer


def run(
    context: typer.Context,
    methods: options.Methods = None,
    datasets: options.Datasets = None,
    backbones: options.Backbones = None,
    guidance: options.Guidance = None,
    seeds: options.Seeds = None,
    variant: options.Variant = None,
    protocol: options.Protocol = None,
    results: options.Results = None,
    data: options.Data = None,
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    sets: options.Sets = None,
    plugins: options.Plugins = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan only.")] = False,
    track: Annotated[str | None, typer.Option(help="Trackers: tensorboard, wandb (comma-separated).")] = None,
    device: Annotated[str, typer.Option(help="auto, or cpu to leave accelerators alone.")] = "auto",
    timeout: Annotated[int, typer.Option(help="Seconds after which a lost process makes the others fail.")] = 1800,
) -> None:
    """Train and evaluate every cell that is not done, then print the leaderboard.

    Run it again to go on after an interruption: finished cells are skipped, a training goes on from its last checkpoint.
    Under torchrun or accelerate launch all processes work on each training together.
    """
    from bench.sweep.plan import make_plan
    from bench.training.engine import Engine, world_size

    settings = options.settings_from(context)
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: use auto or cpu")
    made = make_plan(settings, world_size=world_size())
    if dry_run:
        from bench.cli.plan import show_plan

        show_plan(made)
        return
    engine = Engine(
        precision=settings.config.train.precision,
        device="cpu" if device == "cpu" else "auto",
        trackers=tuple(part for part in (track or "").split(",") if part),
        tracking_folder=settings.config.run.results / "tracking",
        timeout_s=timeout,
    )
    try:
        outcome = _carry_out(made, engine, plugins=tuple(plugins or ()))
    finally:
        engine.close()
    if outcome.failed:
        raise typer.Exit(1)


def _carry_out(plan: Plan, engine: Engine, *, plugins: tuple[str, ...]) -> Outcome:
    from bench.sweep.datasets import prepare_missing
    from bench.sweep.plan import make_plan
    from bench.sweep.run import run_plan

    observer, stop = _observer(engine)
    try:
        if any(source.index is None for source in plan.sources.values()):
            if engine.is_main:
                prepare_missing(plan.sources.values(), observer=observer, plugins=plugins)
            engine.wait()
            plan = make_plan(plan.settings, world_size=engine.world_size)
        outcome = run_plan(plan, engine=engine, observer=observer)
    finally:
        stop()
    if engine.is_main:
        _summary(plan, outcome)
    return outcome


def _observer(engine: Engine) -> tuple[Observer, Callable[[], None]]:
    from bench.cli.progress import RichObserver
    from bench.training.observer import LogObserver

    if engine.is_main and sys.stderr.isatty():
        observer = RichObserver()
        return observer, observer.stop
    return LogObserver(), lambda: None


def _summary(plan: Plan, outcome: Outcome) -> None:
    from rich.console import Console
    from rich.markup import escape

    from bench.cli.leaderboard import show_tables

    results = plan.settings.config.run.results
    show_tables(results)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{len(outcome.ran)} cells done, {len(outcome.skipped)} were done before, {len(outcome.failed)} failed; "
        f"{outcome.trained} trainings in {outcome.seconds:.0f} s."
    )
    for label, error in outcome.failed.items():
        console.print(f"[red]failed[/] {escape(label)}: {escape(error)}")
    console.print(f"Records: {results / 'cells'}. Weights: {results / 'trainings'}. Table again: bench leaderboard --results {results}")
    if outcome.failed:
        console.print(f"Errors in full: {results / 'failures'}. The same command tries the failed cells again.")
