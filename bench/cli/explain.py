"""``bench explain``: prediction and maps of any picture."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.cli import options


def explain(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Picture files, or folders of them.")],
    *,
    checkpoint: Annotated[
        Path,
        typer.Option(help="Folder of a training, <results>/trainings/<hash>, or of a cell, <results>/cells/.../seed0-<hash>."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: new, or empty.", file_okay=False)] = Path("explanations"),
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, comma-separated. Default: all that can read the training, slow ones such as scorecam too."),
    ] = None,
    classes: Annotated[list[str] | None, typer.Option("--class", help="Maps of this class besides the predicted one; repeatable.")] = None,
    landmarks: Annotated[
        str,
        typer.Option(
            metavar="FILE.csv|face-alignment|dlib|none", help="Where landmarks come from. none: the picture is a face crop; no AU map."
        ),
    ] = "none",
    landmark_weights: Annotated[
        Path | None, typer.Option(help="Folder of the files that find landmarks. Default: where their package keeps them.", file_okay=False)
    ] = None,
    align: Annotated[
        bool | None,
        typer.Option(
            "--align/--no-align",
            help="Turn and cut the face by its landmarks, or keep the whole picture. Default: as the training's pictures were; where "
            "that is not known, align where the face is searched for.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prepared dataset of the training. Needed only where an older version trained: newer ones keep the preparation. "
            "Default: looked for in data.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
    plugins: options.Plugins = None,
) -> None:
    """Show what a trained network sees in pictures: prediction, overlays of all maps, and explanation.json with the figures.

    Exit status 0: all is done, 1: some pictures or maps could not be explained, 2: nothing could be.
    """
    from rich.console import Console

    from bench.launch.request import parse_device
    from bench.registry import load_plugin
    from bench.reporting.pictures.explain import (
        REPORT,
        Failed,
        LandmarkSource,
        choose_readers,
        find_pictures,
        open_training,
        with_preparation,
    )
    from bench.reporting.pictures.explain import explain as explain_pictures
    from bench.runtime.engine import Engine

    for plugin in plugins or ():
        load_plugin(plugin)
    restored = open_training(checkpoint)
    if data is not None:
        restored = with_preparation(restored, data)
    else:
        with contextlib.suppress(FileNotFoundError):
            restored = with_preparation(restored, Path("data"))
    readers = choose_readers(restored.training, [name.strip() for name in (methods or "").split(",") if name.strip()])
    source = LandmarkSource(landmarks, weights=landmark_weights)
    if align and landmarks == "none":
        raise ValueError("--align needs landmarks: give --landmarks FILE.csv, face-alignment or dlib")
    sources, failed = find_pictures(pictures)
    console = Console()

    def tell(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    for lost in failed:
        tell(f"{lost.path}: {lost.reason}", "red")
    explained, unseen, spoiled = 0, 0, 0
    deviations: Counter[str] = Counter()
    for result in explain_pictures(
        sources,
        restored,
        methods=readers,
        classes=classes or (),
        landmarks=source,
        align=align,
        device=Engine(device=parse_device(device)).device,
        out=out,
        failed=failed,
    ):
        if isinstance(result, Failed):
            failed.append(result)
            tell(f"{result.path}: {result.reason}", "red")
            continue
        explained += 1
        unseen += not result.facts["landmarks"]
        deviations.update([result.facts["deviation"]] if result.facts["deviation"] else [])
        likely = sorted(result.facts["probabilities"].items(), key=lambda item: -item[1])[:3]
        tell(f"{result.source.path}: {', '.join(f'{name} {share:.1%}' for name, share in likely)}; {out / result.source.name}")
        for entry in result.facts["maps"]:
            if "error" in entry:
                spoiled += 1
                tell(f"{result.source.path}: {entry['method']}, class {entry['class']}: {entry['error']}", "red")
    if not explained:
        tell("no picture could be explained; nothing is written", "red")
        raise typer.Exit(2)
    if unseen:
        tell(f"without landmarks: {unseen}, taken whole as a face crop; no AU map can be drawn", "yellow")
    for deviation, count in deviations.items():
        tell(f"not prepared as in training: {count} of {explained}: {deviation}", "yellow")
    tell(f"wrote {out / REPORT}: {', '.join(readers)}", "green")
    if failed or spoiled:
        raise typer.Exit(1)
