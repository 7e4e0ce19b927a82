"""``bench verify``: can these records be believed?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from bench.audit.rerun import Rerun
    from bench.audit.verify import Report


def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="A record.json, a cell's folder, or any folder above: results.")],
    *,
    data: Annotated[Path | None, typer.Option(help="Prepared datasets, or one of them: compare keys and labels.", file_okay=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="With --data: data that is not at hand is a problem.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="With --data: evaluate the trained weights again and compare every row.")] = False,
    trainings: Annotated[
        Path | None,
        typer.Option(help="With --rerun: folder of the trainings. Default: that of the results folder each record is in.", file_okay=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="With --rerun: largest difference, of logits over the largest; 0: every bit. Default: 1e-4."),
    ] = None,
    device: Annotated[str, typer.Option(help="With --rerun: auto, or cpu to leave accelerators alone.")] = "auto",
    stamp: Annotated[
        bool, typer.Option("--stamp", help="With --rerun: write VERIFIED.json beside each record that was found again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: counts and every problem.")] = False,
    plugins: options.Plugins = None,
) -> None:
    """Check records: hashes, keys, seeds, settings, every figure from its rows, one record against the others; name whatever is wrong.

    Exit status 0: all is well, 1: problems, 2: nothing could be looked at.
    """
    from rich.console import Console

    from bench.audit.verify import verify as verify_records
    from bench.cli.data import progress
    from bench.registry import load_plugin

    given = {"--trainings": trainings is not None, "--stamp": stamp, "--tolerance": tolerance is not None}
    for name in (name for name, used in given.items() if used and not rerun):
        raise ValueError(f"{name} goes with --rerun")
    if data is None and (rerun or strict):
        raise ValueError(f"{'--rerun' if rerun else '--strict'} needs the prepared datasets: --data DIR")
    chosen = options.parse_device(device)
    for plugin in plugins or ():
        load_plugin(plugin)
    console = Console(stderr=as_json)
    with progress(console, "verifying", unit="records") as tell:
        report = verify_records(paths, data=data, strict=strict, on_progress=lambda done, total: tell(done, total, 0, ""))
    reruns = _rerun(report, data, trainings=trainings, tolerance=tolerance, device=chosen) if rerun and data is not None else ()
    sound = [result for result in reruns if not result.problems and result.folder not in report.unsound]
    if stamp:
        _stamp(report, sound)
    if as_json:
        typer.echo(json.dumps(_tree(report, reruns, stamped=len(sound) if stamp else 0), indent=2, ensure_ascii=False))
    else:
        _print(console, report, reruns, stamped=len(sound) if stamp else 0)
    if report.problems or any(result.problems for result in reruns):
        raise typer.Exit(1)


def _rerun(
    report: Report, data: Path, *, trainings: Path | None, tolerance: float | None, device: Literal["auto", "cpu"]
) -> tuple[Rerun, ...]:
    from bench.audit.rerun import TOLERANCE, rerun
    from bench.audit.verify import find_indexes
    from bench.runtime.engine import Engine
    from bench.runtime.observer import LogObserver

    return tuple(
        rerun(
            [fact.folder for fact in report.facts if fact.prints is not None],
            trainings=trainings,
            data=find_indexes(data),
            engine=Engine(device=device),
            observer=LogObserver(),
            tolerance=TOLERANCE if tolerance is None else tolerance,
        )
    )


def _stamp(report: Report, sound: list[Rerun]) -> None:
    from bench.audit.stamp import write_stamp

    weights = {fact.folder: fact.weights_sha256 for fact in report.facts}
    for result in sound:
        write_stamp(result.folder, weights_sha256=weights[result.folder], largest_difference=result.largest)


def _tree(report: Report, reruns: tuple[Rerun, ...], *, stamped: int) -> dict[str, Any]:
    problems = [*report.problems, *(problem for result in reruns for problem in result.problems)]
    return {
        "records": len(report.folders),
        "with_problems": len(report.unsound | {result.folder for result in reruns if result.problems}),
        "samples": sum(fact.samples for fact in report.facts),
        "unknown_data": dict(report.unknown_data),
        "notes": list(report.notes),
        "rerun": {str(result.folder): result.largest for result in reruns if not result.problems},
        "stamped": stamped,
        "problems": [
            {
                "file": str(problem.file),
                "what": problem.what,
                "recorded": problem.recorded,
                "found": problem.actual,
                "meaning": problem.meaning,
                "text": str(problem),
            }
            for problem in problems
        ],
    }


def _print(console: Console, report: Report, reruns: tuple[Rerun, ...], *, stamped: int) -> None:
    from bench.audit.verify_record import printable, shown

    def say(text: str, style: str) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    problems = [*report.problems, *(problem for result in reruns for problem in result.problems)]
    for problem in problems:
        say(str(problem), "red")
    for note in report.notes:
        say(printable(note), "yellow")
    for fingerprint, count in report.unknown_data.items():
        say(
            f"{count} records are of data {shown(fingerprint[:16])}, which is not at hand: their keys and labels were not compared with it",
            "yellow",
        )
    unsound = report.unsound | {result.folder for result in reruns if result.problems}
    samples = sum(fact.samples for fact in report.facts)
    if problems:
        say(f"{len(problems)} problems in {len(unsound)} of {len(report.folders)} records", "bold red")
    else:
        say(f"{len(report.folders)} records ({samples} rows) are what their hashes, rows, settings and each other say", "green")
    again = [result for result in reruns if not result.problems]
    if again:
        words = f"{len(again)} records evaluated again from their weights: largest difference {max(result.largest for result in again):.2g}"
        if ties := sum(result.ties for result in again):
            words += (
                f", and {ties} of single samples where rounding decided a tie; no mean moves by more than {max(o.shift for o in again):.1g}"
            )
        say(words, "green")
    if stamped:
        say(f"{stamped} records stamped", "green")
