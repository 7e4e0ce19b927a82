"""``bench plan``: what a run would do, and where every setting comes from. Makes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import options
from bench.cli.console import table_console

if TYPE_CHECKING:
    from bench.sweep.plan import Plan


def plan(
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
    origins: Annotated[bool, typer.Option("--origins", help="Show every setting and where it comes from.")] = False,
) -> None:
    """Check everything and show the cells and trainings of a run, without making anything."""
    from bench.sweep.plan import make_plan

    settings = options.settings_from(context)
    made = make_plan(settings)
    if origins:
        show_origins(made)
    show_plan(made)


def show_plan(plan: Plan) -> None:
    """Print trainings, the cells they serve, and what is done."""
    from rich.table import Table

    console = table_console()
    table = Table("dataset", "backbone", "trains as", "guidance", "seed", "read out by", "training")
    for training, cells in plan.matrix.trainings:
        names = ", ".join(f"[green]{c.method}[/]" if c.key in plan.done else c.method for c in cells)
        table.add_row(
            training.dataset.name, training.backbone, training.trains_as, training.guidance, str(training.seed), names, training.key[:10]
        )
    console.print(table)
    brought = {f"{key} for {source}" for training, _ in plan.matrix.trainings for key, source in training.brought.items()}
    for line in sorted(brought):
        console.print(f"set by an entry: {line}", highlight=False, markup=False)
    for source in plan.sources.values():
        if source.index is None:
            console.print(f"dataset [bold]{source.name}[/] will be prepared in {source.folder}", highlight=False)
    total, done = len(plan.matrix.cells), len(plan.done)
    console.print(
        f"{total} cells from {len(plan.matrix.trainings)} trainings; {done} cells done, {total - done} to do in {len(plan.to_do)} "
        f"trainings. Results: {plan.settings.config.run.results}",
        highlight=False,
    )


def show_origins(plan: Plan) -> None:
    """Print every setting, its value, its origin."""
    from rich.markup import escape
    from rich.table import Table

    from bench.config import walk

    table = Table("setting", "value", "from")
    for key, value in walk(plan.settings.config.model_dump(mode="json")):
        origin = plan.settings.origin(key)
        style = "dim" if origin == "default" else ""
        table.add_row(key, escape(str(value)), escape(origin), style=style)
    table_console().print(table)
