"""``bench explain``: prediction and maps of any picture."""

from __future__ import annotations

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
        typer.Option(
            help="Folder of a training, <results>/trainings/<hash>, or of a cell, <results>/cells/.../seed0-<hash>; or a file in it."
        ),
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
            help="Turn and cut the face by its landmarks, or keep the whole picture. Default: as the training's pictures were; align where "
            "the face is searched for.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, or cpu to leave accelerators alone.")] = "auto",
    plugins: options.Plugins = None,
) -> None:
    """Show what a trained network sees in pictures: prediction, overlays of all maps, and explanation.json with the figures.

    A picture is prepared as those that the network was trained with: to the same size, with the same borders, in the same quality.
    Exit status 0: all is done, 1: some pictures or maps could not be explained, 2: nothing could be, and nothing is written.
    """
    from rich.console import Console

    from bench.registry import load_plugin
    from bench.reporting.explain import REPORT, Failed, LandmarkSource, choose_readers, find_pictures, open_training
    from bench.reporting.explain import explain as explain_pictures
    from bench.training.engine import Engine

    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: use auto or cpu")
    for plugin in plugins or ():
        load_plugin(plugin)
    restored = open_training(checkpoint)
    readers = choose_readers(restored.training, [name.strip() for name in (methods or "").split(",") if name.strip()])
    source = LandmarkSource(landmarks, weights=landmark_weights)
    if align and landmarks == "none":
        raise ValueError("--align needs landmarks: give --landmarks FILE.csv, face-alignment or dlib")
    sources, failed = find_pictures(pictures)
    console = Console()

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    for lost in failed:
        say(f"{lost.path}: {lost.reason}", "red")
    if restored.preparation is None:
        say("this training does not say how its pictures were prepared (older version): taken whole, at the usual size", "yellow")
    done, without_landmarks, spoiled = 0, 0, 0
    unlike: Counter[str] = Counter()
    for result in explain_pictures(
        sources,
        restored,
        methods=readers,
        classes=classes or (),
        landmarks=source,
        # Where a face is searched for, the picture may be a whole photograph, of which the training has seen no like.
        align=True if align is None and source.finds else align,
        device=Engine(device="cpu" if device == "cpu" else "auto").device,
        out=out,
        failed=failed,
    ):
        if isinstance(result, Failed):
            failed.append(result)
            say(f"{result.path}: {result.reason}", "red")
            continue
        done += 1
        facts = result.facts
        without_landmarks += not facts["landmarks"]
        unlike.update(filter(None, [facts["unlike_training"]]))
        likely = sorted(facts["probabilities"].items(), key=lambda item: -item[1])[:3]
        say(f"{result.source.path}: {', '.join(f'{name} {share:.1%}' for name, share in likely)}; {out / result.source.name}")
        for entry in facts["maps"]:
            if "error" in entry:
                spoiled += 1
                say(f"{result.source.path}: {entry['method']}, class {entry['class']}: {entry['error']}", "red")
    if without_landmarks:
        say(f"without landmarks: {without_landmarks}; no AU map can be drawn", "yellow")
    for words, count in unlike.items():
        say(f"not prepared as the training's pictures: {count}: {words}", "yellow")
    if not done:
        say("nothing was explained, and nothing is written", "red")
        raise typer.Exit(2)
    say(f"wrote {out / REPORT}: {', '.join(readers)}", "green")
    if failed or spoiled:
        raise typer.Exit(1)
