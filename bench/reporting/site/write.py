"""From records to the files of a site."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from shutil import copytree

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import bench
from bench.evaluation.class_maps import SIDE, AverageMaps, Bytes
from bench.evaluation.statistics import LEVEL
from bench.reporting.site import pages
from bench.reporting.site.class_maps import maps_of
from bench.reporting.site.faces import Prepared, load_faces
from bench.reporting.site.figures import CURVES, SCALE, Picture, draw_curves, draw_faces, draw_strip, tile_size
from bench.reporting.site.folder import check_site_folder, fresh_site
from bench.reporting.tables.evidence import METRICS, Metric, Run, load_runs
from bench.reporting.tables.leaderboard import GUIDANCE, GUIDANCE_TITLES, TITLES, Row, Stat, Table, build_tables, figure
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.references import Reference, beside
from bench.reporting.tables.render import caption, grids, render, show
from bench.sweep.record import Record

DOWNLOADS = (
    ("leaderboard.csv", "CSV", "csv"),
    ("leaderboard.json", "JSON", "json"),
    ("leaderboard.md", "Markdown", "md"),
    ("leaderboard.tex", "LaTeX", "latex"),
)
_TILE = tile_size(SIDE)


def write_site(results: Path, out: Path, *, data: Path, faces: bool = False, reference: Reference | None = None) -> int:
    """Make a site of all finished records below a folder.

    Args:
        results: the folder.
        out: folder of the site: new, empty, or with a site that this function made.
        data: folder of prepared datasets, for the faces of the gallery.
        faces: also show faces that the project did not draw itself.
        reference: published figures to put beside ours, in a table of their own and in the files to download.

    Returns:
        Number of pages.

    Raises:
        ValueError: there is no record, a record cannot be read or was changed, or ``out`` holds foreign files.
        OSError: ``out`` cannot be written.
    """
    check_site_folder(out)
    runs = list(load_runs(results))
    if not runs:
        raise ValueError(f"no finished cells in {results} yet; first: bench run --results {results}")
    site = _Site(runs, build_tables(runs), prepared=Prepared(data), faces=faces, reference=reference)
    with fresh_site(out) as folder:
        return site.write(folder)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """A run with its average maps."""

    run: Run
    maps: AverageMaps | None

    @property
    def record(self) -> Record:
        return self.run.record


class _Site:
    def __init__(
        self,
        runs: Sequence[Run],
        tables: Sequence[Table],
        *,
        prepared: Prepared,
        faces: bool,
        reference: Reference | None,
    ) -> None:
        self._cells: dict[str, _Cell] = {}
        for run in runs:
            key = run.record.key
            if key in self._cells:
                raise ValueError(f"{run.folder} and {self._cells[key].run.folder} hold the same cell: move one of them away")
            assert run.folder is not None
            self._cells[key] = _Cell(run=run, maps=maps_of(run.folder, run.record))
        self._tables = tables
        self._prepared = prepared
        self._faces = faces
        self._reference = reference
        self._templates = Environment(
            loader=PackageLoader("bench.reporting.site"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters["marks"] = _marks
        self._courses: dict[str, list[Picture]] = {}
        self._pages = 0

    def write(self, folder: Path) -> int:
        with as_file(files("bench.reporting.site") / "static") as static:
            copytree(static, folder / "static")
        for name in ("cells", "maps", "figures"):
            (folder / name).mkdir()
        rankings = rank(self._tables)
        for file, _, fmt in DOWNLOADS:
            text = render(self._tables, fmt, rankings=rankings, reference=self._reference, columns="all")
            (folder / file).write_text(f"{text}\n", encoding="utf-8")
        boards, written = [], set()
        for number, table in enumerate(self._tables, start=1):
            maps = pages.maps_page(number, table)
            has_maps = self._write_maps(folder, table, maps)
            compared, *further = grids([table], [], reference=self._reference, columns="all", style=pages.STYLE)
            published = None if self._reference is None else beside(table, self._reference)
            if self._reference is not None and published is not None and published.figures:
                further.insert(0, dataclasses.replace(compared, title=f"{compared.title}: beside {self._reference.title}"))
            boards.append(
                {
                    "title": table.title,
                    "maps": maps if has_maps else None,
                    "caption": caption(table, style=pages.STYLE) + (f" {published.words}." if published and not published.figures else ""),
                    "heads": pages.board_heads(),
                    "methods": list(dict.fromkeys(row.title for row in table.rows)),
                    "backbones": table.backbones,
                    "further": further,
                    "rows": [pages.board_row(row, {key: self._cells[key].record for key in row.keys}) for row in table.rows],
                }
            )
            for row in table.rows:
                for key in row.keys:
                    if key not in written:
                        written.add(key)
                        self._write_cell(folder, row, self._cells[key])
        ranked = list(grids([], rankings, reference=None, columns="all", style=pages.STYLE))
        self._page(
            folder,
            "index.html",
            "index.html",
            level=f"{LEVEL:.0%}",
            boards=boards,
            ranked=ranked,
            downloads=[(file, words) for file, words, _ in DOWNLOADS],
        )
        return self._pages

    def _page(self, folder: Path, template: str, file: str, **values: object) -> None:
        text = self._templates.get_template(template).render(root="../" * file.count("/"), version=bench.__version__, **values)
        (folder / file).write_text(text, encoding="utf-8")
        self._pages += 1

    def _write_cell(self, folder: Path, row: Row, cell: _Cell) -> None:
        try:
            values = self._cell_values(folder, row, cell)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{cell.run.folder}/record.json lacks a field that its page shows, or was changed: {error!r}") from error
        self._page(folder, "cell.html", pages.cell_page(cell.record), **values)

    def _cell_values(self, folder: Path, row: Row, cell: _Cell) -> dict[str, object]:
        record = cell.record
        guidance = GUIDANCE_TITLES[record.cell.guidance]
        members = sorted(
            (self._cells[key] for key in row.keys),
            key=lambda cell: (GUIDANCE.index(cell.record.cell.guidance), cell.record.cell.seed),
        )
        siblings = [
            pages.Link(
                href=pages.cell_page(member.record),
                text=f"{GUIDANCE_TITLES[member.record.cell.guidance]}, seed {member.record.cell.seed}",
                full=f"{row.title}, {GUIDANCE_TITLES[member.record.cell.guidance]}, seed {member.record.cell.seed}",
                current=member is cell,
            )
            for member in members
        ]
        same_seed = [member for member in members if member.record.cell.seed == record.cell.seed]
        values = {metric: figure(record, metric) for metric in METRICS}
        chosen = record.selection
        return {
            "title": f"{row.title}, {guidance}, {record.cell.backbone}, {record.cell.dataset}, seed {record.cell.seed}",
            "summary": f"Protocol {record.protocol}, variant {record.variant}, {record.data.samples} test samples. "
            + ("Verified: evaluated again from its weights." if cell.run.verified else "Self-reported."),
            "siblings": siblings,
            "headline": [(TITLES[metric], _figure(metric, value)) for metric, value in values.items()],
            "maps": self._own_maps(folder, same_seed),
            "cosines": pages.layer_cosines(record),
            "per_class": pages.per_class(record),
            "confusion": pages.confusion(record),
            "selection": f"The checkpoint of epoch {chosen['epoch']} was taken: accuracy {chosen['accuracy']:.3f} on the "
            f"{'test' if record.protocol == 'test-selected' else 'validation'} split.",
            "curves": self._curves(folder, record),
            "invariance": pages.invariance(record),
            "provenance": pages.provenance(record),
            "data_provenance": json.dumps(record.data.provenance, indent=2, ensure_ascii=False),
            "settings": pages.settings(record),
        }

    def _curves(self, folder: Path, record: Record) -> list[Picture]:
        # Post-hoc methods share the training, and its course.
        if record.training_key not in self._courses:
            pictures = self._courses[record.training_key] = []
            for kind, names in (("loss", ("classification", "guidance")), ("accuracy", ("accuracy",))):
                content, alt = draw_curves(record.epochs, names=names, label=kind)
                file = f"figures/{kind}-{_name(record)}.svg"
                (folder / file).write_bytes(content)
                pictures.append(Picture(file=file, alt=alt, width=CURVES[0], height=CURVES[1]))
        return self._courses[record.training_key]

    def _own_maps(self, folder: Path, cells: Sequence[_Cell]) -> pages.Strips | None:
        """The maps of one seed without and with guidance, beside the AU maps."""
        shown = [(cell, cell.maps) for cell in cells if cell.maps is not None]
        if not shown:
            return None
        record, first = shown[0][0].record, shown[0][1]
        rows = [("AU map", self._au_strip(folder, record, first))]
        for cell, maps in shown:
            words = GUIDANCE_TITLES[cell.record.cell.guidance]
            rows.append((f"Map, {words}", self._strip(folder, cell.record, maps, "map")))
            rows.append((f"Layer {cell.record.attention_layer} attention, {words}", self._strip(folder, cell.record, maps, "attention")))
        return pages.Strips(
            caption="Mean over the test samples of a class: AU map, map of the true class, attention of the layer. Dark is 0, yellow is 1.",
            heads=record.data.classes,
            rows=tuple(rows),
        )

    def _write_maps(self, folder: Path, table: Table, file: str) -> bool:
        """The page of all maps of a table; False if no record of it has any."""
        lines: list[tuple[str, _Cell, AverageMaps]] = []
        for row in table.rows:
            for guidance in GUIDANCE:
                of_row = (self._cells[key] for key in row.keys)
                seeds = sorted((c for c in of_row if c.record.cell.guidance == guidance), key=lambda cell: cell.record.cell.seed)
                first = next(((cell, cell.maps) for cell in seeds if cell.maps is not None), None)
                if first is not None:
                    name = row.title if len(table.backbones) == 1 else f"{row.title}, {row.backbone}"
                    lines.append((f"{name}, {GUIDANCE_TITLES[guidance]}", *first))
        if not lines:
            return False
        _, cell, maps = lines[0]
        au = ("AU map", self._au_strip(folder, cell.record, maps))
        parts = []
        for heading, id_, kind, words in (
            ("Average maps", "average-maps", "map", "Mean over the test samples of a class of the map of the true class."),
            ("Average attention", "average-attention", "attention", "The same of the layer attention that ATT-COS is about."),
        ):
            strips = pages.Strips(
                caption=f"{heading} per class, beside the mean map of the action units.",
                heads=cell.record.data.classes,
                rows=(au, *((name, self._strip(folder, c.record, m, kind)) for name, c, m in lines)),
            )
            parts.append((heading, id_, strips, words))
        parts.append(self._examples(folder, lines))
        self._page(folder, "maps.html", file, title=table.title, parts=parts)
        return True

    def _examples(self, folder: Path, lines: Sequence[tuple[str, _Cell, AverageMaps]]) -> tuple[str, str, pages.Strips, str]:
        _, cell, maps = lines[0]
        record, positions = cell.record, maps.example_position
        assert cell.run.samples is not None
        heads = tuple(record.data.classes[label] for label in cell.run.samples.labels[positions].tolist())
        rows: list[tuple[str, Picture]] = []
        loaded = load_faces(self._prepared, record, positions.tolist(), allow=self._faces)
        words = "The first test samples of each class."
        if isinstance(loaded, str):
            words += f" {loaded}"
        else:
            name, listed = _name(record), ", ".join(heads)
            file = f"figures/faces-{name}.jpg"
            (folder / file).write_bytes(draw_faces(loaded.pictures, side=SIDE * SCALE))
            rows.append(("Face", Picture(file=file, alt=f"Faces: {listed}.", width=len(heads) * _TILE, height=_TILE)))
            au_alt = f"AU maps of the faces: {listed}."
            rows.append(("AU map", self._tiles(folder, f"au-of-faces-{name}", loaded.au_maps, shown=loaded.has_au_map, alt=au_alt)))
        for title, of_line, average in lines:
            # Maps made with another release of the data may be of other samples. They do not belong below these faces.
            if np.array_equal(average.example_position, positions):
                alt = f"{title}: maps of the true class of the faces: {', '.join(heads)}."
                rows.append((title, self._tiles(folder, f"examples-{_name(of_line.record)}", average.example_map, shown=None, alt=alt)))
        strips = pages.Strips(caption="Maps of the true class of single samples.", heads=heads, rows=tuple(rows))
        return "Examples", "examples", strips, words

    def _au_strip(self, folder: Path, record: Record, maps: AverageMaps) -> Picture:
        shown = [bool(au_map.any()) for au_map in maps.au_map]
        named = [name for name, has_map in zip(record.data.classes, shown, strict=True) if has_map]
        return self._tiles(
            folder, f"au-{_name(record)}", maps.au_map, shown=shown, alt=f"Mean maps of the action units of {', '.join(named)}."
        )

    def _strip(self, folder: Path, record: Record, maps: AverageMaps, kind: str) -> Picture:
        layer = record.attention_layer
        summary = record.metrics["cam_cos"]["true"] if kind == "map" else record.metrics["att_cos"][str(layer)]
        cosines = ", ".join(f"{name} {entry['mean']:.2f}" for name, entry in summary["per_class"].items() if entry["mean"] is not None)
        kinds = "Mean maps" if kind == "map" else f"Mean attention of layer {layer}"
        classes = ", ".join(record.data.classes)
        alt = f"{kinds}, {GUIDANCE_TITLES[record.cell.guidance]}, of {classes}. Mean cosine with the AU map: {cosines}."
        content: Bytes = getattr(maps, kind)
        return self._tiles(folder, f"{kind}-{_name(record)}", content, shown=[count > 0 for count in maps.count.tolist()], alt=alt)

    def _tiles(self, folder: Path, name: str, maps: Bytes, *, shown: Sequence[bool] | None, alt: str) -> Picture:
        path = folder / f"figures/{name}.png"
        if not path.exists():  # the page of the cell and that of all maps show the same
            path.write_bytes(draw_strip(maps, shown=shown))
        return Picture(file=f"figures/{name}.png", alt=alt, width=len(maps) * _TILE, height=_TILE)


def _name(record: Record) -> str:
    return Path(pages.cell_page(record)).stem


def _figure(metric: Metric, value: float | None) -> str:
    return pages.NOTHING if value is None else show(metric, Stat(values=(value,)))


def _marks(text: str) -> Markup:
    """Escape, then make the characters of `pages.STRONG` what they stand for."""
    begin, end = pages.STRONG
    return escape(text).replace(begin, Markup("<strong>")).replace(end, Markup("</strong>"))
