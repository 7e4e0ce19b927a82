"""``bench gallery``: look at the maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import SettingsFlags, expanded


@expanded
def gallery(
    flags: SettingsFlags,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("gallery.png"),
    skip: Annotated[int, typer.Option(min=0, help="Number of faces of each expression to skip.")] = 0,
    cell: Annotated[int, typer.Option(min=24, help="Side of each picture in the gallery, in pixels.")] = 72,
) -> None:
    """Draw one test face per expression, its AU map and the map of every method, of the first dataset and seed of a run.

    Use the options of bench run: the same settings find the same trained weights.
    """
    from rich.console import Console

    from bench.data.readers import open_reader
    from bench.reporting.pictures.gallery import choose_faces, draw_gallery
    from bench.sweep.plan import make_plan

    settings = flags.settings()
    plan = make_plan(settings, trial=False)
    name, seed = settings.config.run.datasets[0], settings.config.run.seeds[0]
    source = plan.sources[name]
    if source.index is None:
        raise ValueError(f"dataset {name!r} is not prepared, so nothing is trained on it; run bench run first")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: the gallery is a PNG; name it {out.with_suffix('.png')}")
    reader = open_reader(source.folder, "test")
    picture = draw_gallery(plan, choose_faces(reader, skip=skip), reader, fingerprint=source.index.fingerprint, seed=seed, cell=cell)
    picture.quantize(256).save(out, optimize=True)  # a third of the bytes, without a visible difference
    Console().print(f"{out}: {source.name}, seed {seed}", highlight=False, markup=False)
