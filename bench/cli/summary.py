"""What a run prints at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from bench.sweep.plan import Plan
    from bench.sweep.run import Outcome


def summary(plan: Plan, outcome: Outcome) -> None:
    """Print the leaderboard and what a run did."""
    from rich.console import Console

    from bench.cli.leaderboard import show_tables

    results = plan.settings.config.run.results
    show_tables(results)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{len(outcome.ran)} cells done, {len(outcome.skipped)} were done before, {len(outcome.failed)} failed; "
        f"{outcome.trained} trainings in {outcome.seconds:.0f} s."
        + (f" {len(outcome.elsewhere)} cells were done by other runs meanwhile." if outcome.elsewhere else "")
    )
    for label, holder in outcome.left.items():
        console.print(f"[yellow]left[/] {escape(label)}: {escape(holder)} works on it")
    for label, error in outcome.failed.items():
        console.print(f"[red]failed[/] {escape(label)}: {escape(error)}")
    # Names of folders may hold brackets, which are no markup.
    places = f"Records: {results / 'cells'}. Weights: {results / 'trainings'}. Table again: bench leaderboard --results {results}"
    console.print(places, markup=False)
    if outcome.failed:
        console.print(f"Errors in full: {results / 'failures'}. The same command tries the failed cells again.", markup=False)
