"""``bench plan``: what a run would do, and where every setting comes from. Makes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import table_console
from bench.cli.options import Nnodes, Nproc, ProcsPerTraining, SettingsFlags, expanded
from bench.io import duration

if TYPE_CHECKING:
    from bench.sweep.estimate import Forecast, History
    from bench.sweep.plan import Plan


@expanded
def plan(
    flags: SettingsFlags,
    origins: Annotated[bool, typer.Option("--origins", help="Show every setting and where it comes from.")] = False,
    nproc: Nproc = None,
    nnodes: Nnodes = 1,
    procs_per_training: ProcsPerTraining = None,
    on: Annotated[
        str | None, typer.Option(help="Estimate for this device, as records name it (default: this machine's).", metavar="DEVICE")
    ] = None,
) -> None:
    """Check everything and show the cells and trainings of a run, without making anything.

    Time and GPU-hours are estimated from finished trainings of the same kind in the results folder: same trained method, guidance,
    backbone, image size, precision and device, in proportion to epochs x pictures / processes.
    """
    from bench.sweep.plan import make_plan

    settings = flags.settings()
    processes, groups = _split(nproc, nnodes, procs_per_training)
    made = make_plan(settings, world_size=processes)
    if origins:
        show_origins(made)
    show_plan(made, processes=processes, groups=groups, on=on)


def _split(nproc: int | None, nnodes: int, procs_per_training: int | None) -> tuple[int, int]:
    """Processes of a training, and trainings at once, as ``bench run`` would have it with these flags on such nodes."""
    from bench.launch import devices
    from bench.launch.choice import choose
    from bench.launch.request import Processes

    wanted = Processes(
        launcher="torchrun",
        nproc=nproc,
        nnodes=nnodes,
        procs_per_training=procs_per_training,
        rdzv_endpoint=None if procs_per_training else "any:1",
    )
    launch = choose(wanted, devices=devices.count() if nproc is None else 0, world=None)  # the nodes may be others than this one
    return (launch.world_size, launch.groups * nnodes) if procs_per_training else (launch.world_size, 1)


def show_plan(plan: Plan, *, processes: int = 1, groups: int = 1, on: str | None = None) -> None:
    """Print trainings, the cells they serve, what is done, and what the rest will take.

    Args:
        plan: what to do.
        processes: of each training.
        groups: trainings at once.
        on: device to estimate for; None = this machine's.

    Raises:
        ValueError: no record is of the device ``on``.
    """
    from rich.markup import escape
    from rich.table import Table

    from bench.sweep.estimate import forecast, read_history, this_device

    history = read_history(plan.settings.config.run.results)
    if on is not None and on not in history.devices:
        raise ValueError(f"--on {on}: no record is of this device; there are: {', '.join(history.devices) or 'none'}")
    device = on or this_device()
    estimable = device in history.devices and bool(plan.to_do)
    predicted = forecast(plan, history, device=device, processes=processes, groups=groups) if estimable else None

    console = table_console()
    extra = (["estimate", "group"] if groups > 1 else ["estimate"]) if predicted else []
    table = Table("dataset", "backbone", "trains as", "guidance", "seed", "read out by", "training", *extra)
    for training, cells in plan.matrix.trainings:
        names = ", ".join(f"[green]{c.method}[/]" if c.key in plan.done else c.method for c in cells)
        columns = [training.dataset.shown, training.backbone, training.trains_as, training.guidance, str(training.seed), names]
        table.add_row(*columns, training.key[:10], *(_estimate_columns(predicted, training.key) if predicted else ()))
    console.print(table)
    brought = {f"{key} for {source}" for training, _ in plan.matrix.trainings for key, source in training.brought.items()}
    for line in sorted(brought):
        console.print(f"set by an entry: {line}", highlight=False, markup=False)
    foreign = {name: sha256 for cell in plan.matrix.cells for name, sha256 in {**cell.training.code, **cell.code}.items()}
    for name, sha256 in sorted(foreign.items()):
        console.print(f"{name} is code of yours ({sha256[:8]}): changed, its cells are done again", highlight=False, markup=False)
    for line in _twin_lines(plan):
        console.print(line, highlight=False, markup=False)
    for source in plan.sources.values():
        if source.index is None:
            console.print(f"dataset [bold]{escape(source.name)}[/] will be prepared in {escape(str(source.folder))}", highlight=False)
    total, done = len(plan.matrix.cells), len(plan.done)
    console.print(
        f"{total} cells from {len(plan.matrix.trainings)} trainings; {done} cells done, {total - done} to do in {len(plan.to_do)} "
        f"trainings. Results: {plan.settings.config.run.results}",
        highlight=False,
        markup=False,
    )
    if plan.to_do:
        for line in _forecast_lines(predicted, history, device):
            console.print(line, highlight=False, markup=False)


def _twin_lines(plan: Plan) -> list[str]:
    """Which folder is which, of datasets that have the same name."""
    labels = {training.dataset.fingerprint: training.dataset.label for training, _ in plan.matrix.trainings if training.dataset.label}
    sources = [source for source in plan.sources.values() if source.reference().fingerprint in labels]
    return [f"{labels[source.reference().fingerprint]} is {source.folder}" for source in sources]


def _estimate_columns(predicted: Forecast, key: str) -> list[str]:
    estimate = predicted.estimates.get(key)
    time = "done" if key not in predicted.estimates else "no records" if estimate is None else duration(estimate.seconds)
    return [time, str(predicted.group.get(key, "")) if predicted.groups > 1 else ""][: 1 + (predicted.groups > 1)]


def _forecast_lines(predicted: Forecast | None, history: History, device: str) -> list[str]:
    if predicted is None:
        if not history.devices:
            return ["no estimate of time: no records of any kind in this results folder yet"]
        known_devices = ", ".join(f"{name!r} ({number} trainings)" for name, number in history.devices.items())
        return [f"no estimate of time for {device!r}: the records are of {known_devices}. --on DEVICE estimates for one of these"]
    known, total = len(predicted.known), len(predicted.estimates)
    lines = []
    if known:
        each = "1 process" if predicted.processes == 1 else f"{predicted.processes} processes"
        hours = f"{predicted.device_hours:.3g} {'GPU' if predicted.gpu else 'device'}-hours"
        lines.append(
            f"estimate for {predicted.device}: {known} of {total} trainings take {duration(predicted.seconds)} with {each}, {hours}; "
            f"each from {_range([estimate.trainings for estimate in predicted.known])} finished of its kind"
        )
    if known < total:
        first = "; they are begun first" if predicted.groups > 1 else ""
        lines.append(f"no estimate for {total - known} of {total} trainings: no records of their kind yet{first}")
    if known and predicted.groups > 1:
        lines.append(
            f"placement on {predicted.groups} groups of {predicted.processes}, longest first: "
            f"{'those with an estimate end' if known < total else 'all end'} after {duration(predicted.wall_seconds)}"
        )
    return lines


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def show_origins(plan: Plan) -> None:
    """Print every setting, its value, its origin."""
    from rich.markup import escape
    from rich.table import Table

    from bench.config import walk

    table = Table("setting", "value", "from")
    for key, value in walk(plan.settings.config.model_dump(mode="json")):
        origin = plan.settings.origin(key)
        style = "dim" if origin.layer == "default" else ""
        table.add_row(key, escape(str(value)), escape(origin.text), style=style)
    table_console().print(table)
