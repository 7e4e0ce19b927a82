"""``bench status``: what became of every cell so far. Makes and touches nothing."""

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

        content = {"cells": [dataclasses.asdict(one) for one in statuses], "totals": count_states(statuses)}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    elif watch:
        _watch(settings, statuses)
    else:
        table_console().print(_drawn(settings, statuses))


def _look(settings: Settings) -> list[CellStatus]:
    from bench.sweep.plan import read_matrix
    from bench.sweep.status import survey

    # The matrix anew each time: until a dataset is prepared, nobody knows the keys of its cells.
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
    for one in statuses:
        style = _STYLES[one.state]
        table.add_row(one.dataset, one.backbone, one.method, one.guidance, str(one.seed), f"[{style}]{one.state}[/]", escape(_told(one)))
    counts = count_states(statuses)
    totals = ", ".join(f"[{_STYLES[state]}]{count} {state}[/]" for state, count in counts.items() if count)
    trainings = len({one.training for one in statuses})
    return Group(table, f"{len(statuses)} cells of {trainings} trainings: {totals}. Results: {escape(str(settings.config.run.results))}")


def _told(one: CellStatus) -> str:
    from bench.io import duration
    from bench.sweep.status import elapsed

    if one.state == "failed":
        return f"{one.reason} ({elapsed(one.since)} ago)" if one.since else str(one.reason)
    if one.state == "interrupted":
        return f"at step {one.step} of {one.steps}; the next run goes on from there"
    if one.state != "running":
        return ""
    parts = [f"{one.where} for {elapsed(one.since)}" if one.since else str(one.where)]
    if one.phase is not None and one.step is not None and one.steps is not None:
        unit = "sample" if one.phase == "evaluating" else "step"
        parts.append(f"{one.phase}, {unit} {one.step} of {one.steps}")
        if one.rate:
            parts.append(f"{one.rate:.3g} {unit}s/s, {duration((one.steps - one.step) / one.rate)} left")
    if one.loss is not None:
        parts.append(f"loss {one.loss:.4g} in epoch {one.epoch}")
    if one.silent_seconds is not None:
        parts.append(f"last sign of life {duration(one.silent_seconds)} ago")
    return "; ".join(parts)
