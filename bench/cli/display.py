"""The live display of a run, on the main process of a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.runtime.observer import Work


class RichObserver:
    """Bars with a rate and the time left; a line an epoch above them."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        self._tasks: dict[Work, TaskID] = {}

    def begin(self, work: Work, *, steps: int, done: int) -> None:
        """See `bench.runtime.observer.Observer`."""
        self.end(work)
        self._tasks[work] = self._progress.add_task(str(work), total=steps, completed=done, note="")

    def advance(self, work: Work, *, steps: int, note: str) -> None:
        """See `bench.runtime.observer.Observer`."""
        self._progress.update(self._tasks[work], advance=steps, note=note)

    def end(self, work: Work) -> None:
        """See `bench.runtime.observer.Observer`."""
        if work in self._tasks:
            self._progress.remove_task(self._tasks.pop(work))

    def epoch(self, work: Work, record: Mapping[str, Any]) -> None:
        """See `bench.runtime.observer.Observer`."""
        shown = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items())
        self._progress.console.print(f"[dim]{work}[/]  {shown}", highlight=False)

    def stop(self) -> None:
        """Take the display away."""
        self._progress.stop()
