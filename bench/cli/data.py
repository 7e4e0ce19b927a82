"""``bench data``: prepare, verify, stats, show, landmarks."""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.io import duration

if TYPE_CHECKING:
    from bench.data.index import Index
    from bench.prepare.landmark_check import Agreement

app = typer.Typer(
    name="data",
    help="Prepare datasets, check them, count them, look at them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

_SHOWN_BAD = 20
_SHOWN_WORST = 10
_LOG_SECONDS = 5.0

RootOption = Annotated[Path, typer.Option("--root", help="Folder that holds the prepared datasets.", file_okay=False)]
PluginOption = Annotated[list[str] | None, typer.Option("--plugin", help="Module or file.py that registers more datasets; repeatable.")]
DatasetArgument = Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Prepared dataset: its folder, or its name below --root.")]


@app.command(epilog="Example: bench data prepare mine --raw ~/pictures --option identity_pattern='^(.+)_[0-9]+\\.'")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the dataset will be called: folder name and word in tables.")],
    *,
    entry: Annotated[str | None, typer.Option(help="Registered dataset that reads it. Default: NAME if there is one, else folder.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Folder of your download. Not for embedded datasets.", file_okay=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: below --root.", file_okay=False)] = None,
    root: RootOption = Path("data"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that read, scale and encode. The result does not depend on it.")] = 1,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Option of the entry; repeatable.")
    ] = None,
    folds: Annotated[
        Path | None, typer.Option(help="Folder of the published folds: their splits, classes and landmarks replace the dataset's.")
    ] = None,
    landmarks: Annotated[
        str | None,
        typer.Option(metavar="shipped|face-alignment|dlib|none", help="Where the 68 landmarks come from. Same as --option landmarks=..."),
    ] = None,
    landmark_weights: Annotated[
        Path | None,
        typer.Option(help="Folder of the files that find landmarks. Default: where their package keeps them.", file_okay=False),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go on although pictures are missing; the index and every table say so.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Turn pictures into checked shards. Run it again to go on after an interruption."""
    from bench.dataset import DATASETS
    from bench.prepare.pack import Progress, prepared_folder
    from bench.prepare.pack import prepare as prepare_dataset
    from bench.registry import did_you_mean, load_plugin

    _check_name(name)
    for target in plugin or ():
        load_plugin(target)
    if entry is None and name not in DATASETS and raw is None:
        raise ValueError(f"{name!r} is no registered dataset.{did_you_mean(name, DATASETS.names())} For your own pictures give --raw DIR")
    entry = entry or (name if name in DATASETS else "folder")
    options = parse_options(option or ())
    _add_option(options, "folds", str(folds) if folds else None)
    _add_option(options, "landmarks", landmarks)
    folder = out or prepared_folder(root, name=name, entry_name=entry, options=options)
    console = Console()
    reused = False

    with progress(console, f"preparing {name}", unit="pictures") as tell:

        def on_progress(now: Progress) -> None:
            nonlocal reused
            reused = now.reused == now.total
            tell(now.done, now.total, now.reused, f"{now.bad} bad" if now.bad else "")

        index = prepare_dataset(
            entry,
            name=name,
            options=options,
            raw=raw,
            out=folder,
            workers=workers,
            overwrite=overwrite,
            allow_partial=allow_partial,
            landmark_weights=landmark_weights,
            plugins=tuple(plugin or ()),
            on_progress=on_progress,
        )
    _print_findings(console, index, folder)
    samples = sum(split.samples for split in index.splits.values())
    size = sum(shard.bytes for split in index.splits.values() for shard in split.shards)
    counts = ", ".join(f"{name} {split.samples}" for name, split in index.splits.items())
    verb = "already prepared" if reused else "prepared"
    console.print(f"{verb}: {folder} ({samples} pictures: {counts}; {_megabytes(size)})", style="green", markup=False, soft_wrap=True)


@app.command()
def verify(
    dataset: DatasetArgument,
    *,
    root: RootOption = Path("data"),
    quick: Annotated[bool, typer.Option("--quick", help="Only names, sizes and the index; read no shard.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Compare every byte of a prepared dataset with its index. Exit status 1 if something differs."""
    from bench.data.index import load_index
    from bench.data.verify import verify as verify_dataset

    folder = find_prepared(dataset, root=root)
    console = Console()
    with progress(console, f"verifying {folder}", unit="pictures") as tell:
        problems = verify_dataset(folder, deep=not quick, workers=workers, on_progress=lambda done, total: tell(done, total, 0, ""))
    for problem in problems:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
    if problems:
        console.print(
            f"{folder}: {len(problems)} problems. Copy it again, or prepare it again with --overwrite", markup=False, soft_wrap=True
        )
        raise typer.Exit(1)
    splits = load_index(folder).splits.values()
    pictures, shards = sum(split.samples for split in splits), sum(len(split.shards) for split in splits)
    how = "names and sizes are as declared" if quick else "every byte is as declared"
    console.print(f"{folder}: {pictures} pictures in {shards} shards, {how}", style="green", markup=False, soft_wrap=True)


@app.command()
def stats(dataset: DatasetArgument, *, root: RootOption = Path("data")) -> None:
    """Count the pictures of a prepared dataset per split and class, and list what was left out."""
    from bench.data.index import load_index

    folder = find_prepared(dataset, root=root)
    index = load_index(folder)
    console = Console()
    table = Table(title=escape(f"{index.name} ({folder})"), title_justify="left")
    table.add_column("class")
    for split in index.splits:
        table.add_column(split, justify="right")
    for label in index.classes:
        table.add_row(escape(label), *(str(split.class_counts[label]) for split in index.splits.values()))
    table.add_section()
    bad = [sum(picture.split == split for picture in index.bad_pictures) for split in index.splits]
    without = index.provenance.get("samples_without_landmarks", {})
    table.add_row("all", *(str(split.samples) for split in index.splits.values()))
    table.add_row("without landmarks", *(str(without.get(split, "?")) for split in index.splits))
    table.add_row("bad, left out", *map(str, bad))
    table.add_row("shards", *(str(len(split.shards)) for split in index.splits.values()))
    table.add_row("size", *(_megabytes(sum(shard.bytes for shard in split.shards)) for split in index.splits.values()))
    console.print(table)
    options = ", ".join(f"{key}={value!r}" for key, value in index.options.items())
    console.print(f"entry {index.entry}; {options}", markup=False, soft_wrap=True)
    console.print(f"licence: {index.license}", markup=False, soft_wrap=True)
    console.print(f"fingerprint: {index.fingerprint}", markup=False, soft_wrap=True)
    _print_findings(console, index, folder)


@app.command()
def show(
    dataset: DatasetArgument,
    *,
    root: RootOption = Path("data"),
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    out: Annotated[Path | None, typer.Option(help="PNG to write. Default: NAME-SPLIT.png here.", dir_okay=False)] = None,
    per_class: Annotated[int, typer.Option(min=1, max=50, help="Pictures per class.")] = 3,
    cell: Annotated[int, typer.Option(min=16, max=1024, help="Side of a drawn picture in pixels.")] = 128,
) -> None:
    """Draw a contact sheet: per class some faces, their landmarks and their AU maps."""
    import io

    from bench.io import write_bytes_atomic
    from bench.reporting.pictures.sheet import contact_sheet

    folder = find_prepared(dataset, root=root)
    sheet = contact_sheet(folder, split=split, per_class=per_class, cell=cell)
    path = out or Path(f"{folder.resolve().name}-{split}.png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())
    Console().print(f"wrote {path} ({sheet.width} x {sheet.height})", style="green", markup=False, soft_wrap=True)


@app.command(epilog="Example: bench data landmarks mine --against dlib --sheet landmarks.png")
def landmarks(
    dataset: DatasetArgument,
    *,
    against: Annotated[str, typer.Option(metavar="face-alignment|dlib", help="The source to compare with.")],
    first: Annotated[
        str, typer.Option(metavar="stored|face-alignment|dlib", help="The other source; errors are in units of its eye distance.")
    ] = "stored",
    root: RootOption = Path("data"),
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "--landmark-weights",
            help="Folder of the files that find landmarks. Default: where their package keeps them.",
            file_okay=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test; all for every split.")] = "test",
    samples: Annotated[int, typer.Option(min=1, help="Pictures to compare, at most; always the same ones.")] = 200,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write, with the faces that agree worst.", dir_okay=False)] = None,
) -> None:
    """Compare two sources of landmarks on a sample of a prepared dataset: normalised mean error, per face part, and the worst faces."""
    import io

    from bench.io import write_bytes_atomic
    from bench.prepare.landmark_check import check_landmarks, draw_agreement

    folder = find_prepared(dataset, root=root)
    if sheet is not None and not sheet.parent.is_dir():
        raise FileNotFoundError(f"--sheet {sheet}: there is no folder {sheet.parent}")
    console = Console()
    with progress(console, f"finding landmarks in {folder}", unit="pictures") as tell:
        agreement = check_landmarks(
            folder,
            first=first,
            second=against,
            weights=weights,
            split=split,
            samples=samples,
            on_progress=lambda done, total: tell(done, total, 0, ""),
        )
    _print_agreement(console, agreement, title=f"{first} and {against}: {folder}, {split}")
    if sheet is not None:
        buffer = io.BytesIO()
        picture = draw_agreement(folder, agreement)
        picture.save(buffer, "PNG")
        write_bytes_atomic(sheet, buffer.getvalue())
        console.print(f"wrote {sheet} ({picture.width} x {picture.height})", style="green", markup=False, soft_wrap=True)


def _print_agreement(console: Console, agreement: Agreement, *, title: str) -> None:
    total, compared = len(agreement.faces), len(agreement.errors)
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_row("pictures", str(total))
    for source, missing in zip(agreement.sources, agreement.missing, strict=True):
        table.add_row(f"none by {escape(source)}", f"{missing} ({_percent(missing / total)})")
    if agreement.incomparable:
        table.add_row("eyes in one place", str(agreement.incomparable))
    table.add_row("compared", str(compared))
    table.add_section()
    for number, (name, error) in enumerate(agreement.summary().items()):
        if number == 3:
            table.add_section()
        table.add_row(f"normalised mean error, {name}" if number < 3 else name, _percent(error))
    console.print(table)
    if not compared:
        console.print("no face has landmarks from both sources: nothing to compare", style="yellow", markup=False, soft_wrap=True)
        return
    console.print("error: mean distance of the points over that of the outer eye corners; the worst:", markup=False, soft_wrap=True)
    for face in agreement.faces[:_SHOWN_WORST]:
        if face.error is not None:
            console.print(f"  {_percent(face.error):>8}  {face.split}: {face.source}", markup=False, highlight=False, soft_wrap=True)


def parse_options(pairs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Read ``key=value`` words. The entry's model decides on types; lists and tables are written as in TOML.

    Raises:
        ValueError: no ``=``, a key given twice, or a list or table that is not TOML.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--option {pair!r}: write KEY=VALUE, such as --option size=128")
        if key in options:
            raise ValueError(f"--option {key} is given twice: {options[key]!r} and {value!r}")
        options[key] = value
        if value.startswith(("[", "{")):
            try:
                options[key] = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"--option {pair!r}: {error}") from error
    return options


def _add_option(options: dict[str, Any], key: str, value: str | None) -> None:
    """Take over a flag that stands for an option of the entry."""
    if value is None:
        return
    if key in options:
        raise ValueError(f"--{key} {value} and --option {key}={options[key]} say the same thing twice; keep one")
    options[key] = value


def find_prepared(dataset: str, *, root: Path) -> Path:
    """The folder of a prepared dataset, given itself or its name below ``root``.

    An embedded dataset lies in ``NAME-xxxxxxxx``; its name is enough while there is one of them.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: several sets of options of that name.
    """
    from bench.data.index import INDEX_NAME
    from bench.registry import did_you_mean

    for folder in (Path(dataset), root / dataset):
        if (folder / INDEX_NAME).is_file():
            return folder
    prepared = sorted(path.parent for path in root.glob(f"*/{INDEX_NAME}"))
    matching = [folder for folder in prepared if re.fullmatch(re.escape(dataset) + r"-[0-9a-f]{8}", folder.name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        newest_first = sorted(matching, key=lambda folder: (folder / INDEX_NAME).stat().st_mtime, reverse=True)
        listed = ", ".join(str(folder) for folder in newest_first)
        raise ValueError(f"{dataset!r} was prepared with several sets of options; give one of the folders (newest first): {listed}")
    if Path(dataset).is_dir():
        raise FileNotFoundError(f"{dataset} has no {INDEX_NAME}: it is not a prepared dataset, or its preparation was interrupted")
    raise FileNotFoundError(
        f"no prepared dataset {dataset!r} in {root}.{did_you_mean(dataset, (folder.name for folder in prepared))} "
        f"Make it with: bench data prepare {dataset} --raw DIR"
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name {name!r}: use letters, digits, dot, dash and underscore, and begin with a letter or digit")


@contextmanager
def progress(console: Console, what: str, *, unit: str) -> Iterator[Callable[[int, int, int, str], None]]:
    """A progress bar with rate and time left on a terminal, a line every few seconds elsewhere.

    Yields:
        A function of (done, total, how many of these were done before, further words).
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    began = time.monotonic()

    def pace(done: int, total: int, before: int) -> str:
        rate = (done - before) / max(time.monotonic() - began, 1e-9)
        return f"{rate:.0f} {unit}/s, {duration((total - done) / rate)} left" if rate > 0 else ""

    if not console.is_terminal:
        last = 0.0

        def log(done: int, total: int, before: int, words: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _LOG_SECONDS and done < total:
                last = time.monotonic()
                line = ", ".join(part for part in (f"{what}: {done}/{total} {unit}", pace(done, total, before), words) if part)
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield log
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, words="")

        def draw(done: int, total: int, before: int, words: str) -> None:
            bar.update(task, completed=done, total=total, words=", ".join(part for part in (pace(done, total, before), words) if part))

        yield draw


def _print_findings(console: Console, index: Index, folder: Path) -> None:
    from bench.data.index import partial_words

    partial = partial_words(index.provenance)
    if partial:
        console.print(f"partial data, not the published pictures: {partial}", style="bold yellow", markup=False, soft_wrap=True)
    for note in index.provenance.get("notes", ()):
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for picture in index.bad_pictures[:_SHOWN_BAD]:
        console.print(
            f"bad picture, left out of {picture.split}: {picture.source}: {picture.reason}", style="yellow", markup=False, soft_wrap=True
        )
    if len(index.bad_pictures) > _SHOWN_BAD:
        rest = len(index.bad_pictures) - _SHOWN_BAD
        console.print(f"... and {rest} more bad pictures, listed in {folder / 'report.json'}", style="yellow", markup=False, soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
