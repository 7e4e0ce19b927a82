"""``bench status``: the state of every cell. Writes nothing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import table_console
from bench.cli.options import SettingsFlags, expanded

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bench.config import Settings
    from bench.sweep.status import CellStatus

WATCH_SECONDS = 2.0
_STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "waiting": "dim"}


@expanded
def status(
    flags: SettingsFlags,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds; Ctrl-C ends it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: all that is known of every cell, and totals.")] = False,
) -> None:
    """Show every cell of the matrix: done, running (where, since, step), failed (why), interrupted (at which step), or waiting."""
    from bench.sweep.status import count_states

    if watch and as_json:
        raise ValueError("--watch is for people and --json for programs: leave one of them out")
    settings = flags.settings()
    statuses = _look(settings)
    if as_json:
        import dataclasses

        content = {"cells": [dataclasses.asdict(cell) for cell in statuses], "totals": count_states(statuses)}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    elif watch:
        _watch(settings, statuses)
    else:
        table_console().print(_drawn(settings, statuses))


def _look(settings: Settings) -> list[CellStatus]:
    from bench.sweep.plan import read_matrix
    from bench.sweep.status import survey

    # The matrix is read each time: the keys of cells are unknown until their dataset is prepared.
    _, matrix = read_matrix(settings)
    return survey(matrix, settings.config.run.results, config=settings.config.sweep)


def _watch(settings: Settings, statuses: Sequence[CellStatus]) -> None:
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(_drawn(settings, statuses), console=table_console(), auto_refresh=False) as live:
        while True:
            live.update(_drawn(settings, _look(settings)), refresh=True)
            time.sleep(WATCH_SECONDS)


def _drawn(settings: Settings, statuses: Sequence[CellStatus]) -> RenderableType:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from bench.sweep.status import count_states

    table = Table("dataset", "backbone", "method", "guidance", "seed", "state", "")
    for cell in statuses:
        state = f"[{_STYLES[cell.state]}]{cell.state}[/]"
        table.add_row(cell.dataset, cell.backbone, cell.method, cell.guidance, str(cell.seed), state, escape(_details(cell)))
    counts = count_states(statuses)
    totals = ", ".join(f"[{_STYLES[state]}]{count} {state}[/]" for state, count in counts.items() if count)
    trainings = len({cell.training for cell in statuses})
    return Group(table, f"{len(statuses)} cells of {trainings} trainings: {totals}. Results: {escape(str(settings.config.run.results))}")


def _details(cell: CellStatus) -> str:
    from bench.io import duration
    from bench.sweep.status import elapsed

    if cell.state == "failed":
        return f"{cell.reason} ({elapsed(cell.since)} ago)" if cell.since else str(cell.reason)
    if cell.state == "interrupted":
        return f"at step {cell.step} of {cell.steps}; the next run continues from this step"
    if cell.state != "running":
        return ""
    parts = [f"{cell.where} for {elapsed(cell.since)}" if cell.since else str(cell.where)]
    if cell.phase is not None and cell.step is not None and cell.steps is not None:
        unit = "sample" if cell.phase == "evaluating" else "step"
        parts.append(f"{cell.phase}, {unit} {cell.step} of {cell.steps}")
        if cell.rate:
            parts.append(f"{cell.rate:.3g} {unit}s/s, {duration((cell.steps - cell.step) / cell.rate)} left")
    if cell.loss is not None:
        parts.append(f"loss {cell.loss:.4g} in epoch {cell.epoch}")
    if cell.silent_seconds is not None:
        parts.append(f"last sign of life {duration(cell.silent_seconds)} ago")
    return "; ".join(parts)
