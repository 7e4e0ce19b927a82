"""``bench explain``: prediction and maps of any picture."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli import options

if TYPE_CHECKING:
    from bench.reporting.pictures.explain import Explanation, Failed

Pictures = Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files, or folders of them.")]
Checkpoint = Annotated[
    Path, typer.Option(help="Folder of a training, <results>/trainings/<hash>, or of a cell, <results>/cells/.../seed0-<hash>.")
]
Out = Annotated[Path, typer.Option(help="Folder to write: new, or empty.", file_okay=False)]
Methods = Annotated[
    str | None, typer.Option(help="Methods, comma-separated. Default: all that can read the training, with slow methods such as scorecam.")
]
Classes = Annotated[list[str] | None, typer.Option("--class", help="Maps of this class besides the predicted one; repeatable.")]
Landmarks = Annotated[
    str,
    typer.Option(
        metavar="FILE.csv|face-alignment|dlib|none", help="Where landmarks come from. none: the picture is a face crop; no AU map."
    ),
]
LandmarkWeights = Annotated[
    Path | None, typer.Option(help="Folder with the weights of the landmark detector. Default: that of its package.", file_okay=False)
]
Align = Annotated[
    bool | None,
    typer.Option(
        "--align/--no-align",
        help="Turn and cut the face by its landmarks, or keep the whole picture. Default: as the training's pictures were; where "
        "that is not known, align where the face is searched for.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Prepared dataset of the training. Needed only for trainings of older versions: newer ones keep the preparation. "
        "Default: the folder data.",
        file_okay=False,
        show_default=False,
    ),
]


def explain(
    pictures: Pictures,
    *,
    checkpoint: Checkpoint,
    out: Out = Path("explanations"),
    methods: Methods = None,
    classes: Classes = None,
    landmarks: Landmarks = "none",
    landmark_weights: LandmarkWeights = None,
    align: Align = None,
    data: Data = None,
    device: options.Device = "auto",
    plugins: options.Plugins = None,
) -> None:
    """Show what a trained network sees in pictures: prediction, overlays of all maps, and explanation.json with the figures.

    Exit status: 0 if all is done, 1 if some pictures or maps could not be explained, 2 if none could.
    """
    from bench.registry import load_plugin
    from bench.reporting.pictures.explain import LandmarkSource, choose_readers, find_pictures, open_training, with_preparation
    from bench.reporting.pictures.explain import explain as explain_pictures
    from bench.runtime.engine import Engine

    chosen = options.parse_device(device)
    for plugin in plugins or ():
        load_plugin(plugin)
    restored = with_preparation(open_training(checkpoint), data)
    readers = choose_readers(restored.training, [name.strip() for name in (methods or "").split(",") if name.strip()])
    source = LandmarkSource(landmarks, weights=landmark_weights)
    if align and landmarks == "none":
        raise ValueError("--align needs landmarks: give --landmarks FILE.csv, face-alignment or dlib")
    files, failed = find_pictures(pictures)
    results = explain_pictures(
        files,
        restored,
        methods=readers,
        classes=classes or (),
        landmarks=source,
        align=align,
        device=Engine(device=chosen).device,
        out=out,
        failed=failed,
    )
    _print(itertools.chain(failed, results), out=out, methods=readers)


def _print(results: Iterable[Explanation | Failed], *, out: Path, methods: Iterable[str]) -> None:
    """Print each result when it comes, then a summary.

    Raises:
        typer.Exit: with the command's status, unless all is done.
    """
    from rich.console import Console

    from bench.reporting.pictures.explain import REPORT, Failed

    console = Console()

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    explained = without_landmarks = problems = 0
    deviations: Counter[str] = Counter()
    for result in results:
        if isinstance(result, Failed):
            problems += 1
            say(f"{result.path}: {result.reason}", "red")
            continue
        facts = result.facts
        explained += 1
        without_landmarks += not facts["landmarks"]
        if facts["deviation"]:
            deviations[facts["deviation"]] += 1
        likely = sorted(facts["probabilities"].items(), key=lambda item: -item[1])[:3]
        say(f"{result.file.path}: {', '.join(f'{name} {share:.1%}' for name, share in likely)}; {out / result.file.name}")
        for entry in facts["maps"]:
            if "error" in entry:
                problems += 1
                say(f"{result.file.path}: {entry['method']}, class {entry['class']}: {entry['error']}", "red")
    if not explained:
        say("no picture could be explained; nothing is written", "red")
        raise typer.Exit(2)
    if without_landmarks:
        say(f"without landmarks: {without_landmarks}, taken whole as a face crop; no AU map can be drawn", "yellow")
    for deviation, count in deviations.items():
        say(f"not prepared as in training: {count} of {explained}: {deviation}", "yellow")
    say(f"wrote {out / REPORT}: {', '.join(methods)}", "green")
    if problems:
        raise typer.Exit(1)
