from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from bench.data.index import load_index
from bench.evaluation.class_maps import read_average_maps, write_average_maps
from bench.io import file_sha256
from bench.prepare.pack import prepare
from bench.reporting.site import write
from bench.reporting.site.figures import draw_strip
from bench.reporting.site.write import write_site
from bench.reporting.tables.evidence import load_runs
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.references import load_reference
from bench.reporting.tables.render import show
from bench.sweep.store import read_records
from tests.reporting.cells import CLASSES, SAMPLES, write_cell, write_matrix


class Page(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def pages(site: Path) -> dict[Path, Page]:
    site_pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert site_pages
    return site_pages


def make(results: Path, site: Path, *, data: Path | None = None, faces: bool = False) -> Path:
    write_site(results, site, data=data or results / "no-data", faces=faces)
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site")
    write_matrix(root / "results")
    return make(root / "results", root / "site")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_link_picture_and_anchor_is_there(site):
    site_pages = pages(site)
    for path, page in site_pages.items():
        for attributes in page.all("a", "img", "link", "script"):
            file, _, anchor = (attributes.get("href") or attributes["src"]).partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), (path, attributes)
            if anchor:
                assert any(anchor == names.get("id") for _, names in site_pages[target].elements), (
                    path,
                    attributes,
                )


def test_every_record_has_a_page_that_the_leaderboard_leads_to(site):
    linked = {attributes["href"] for attributes in Page(site / "index.html").all("a")}
    cells = {path.relative_to(site).as_posix() for path in site.glob("cells/*.html")}
    assert len(cells) == 12
    assert cells <= linked


def test_pages_load_nothing_but_their_own_files(site):
    for path, page in pages(site).items():
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'")
        assert not any("style" in attributes or any(name.startswith("on") for name in attributes) for _, attributes in page.elements)
        assert not re.search(r"(https?:)?//", path.read_text())


def test_pages_have_what_readers_and_keyboards_need(site):
    for page in pages(site).values():
        tags = [tag for tag, _ in page.elements]
        assert [tags.count(tag) for tag in ("h1", "main", "header", "footer")] == [1, 1, 1, 1]
        assert ("html", {"lang": "en"}) in page.elements
        assert page.all("a")[0] == {"class": "skip", "href": "#main"}
        levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert tags.count("caption") == tags.count("table")
        assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
        assert all(attributes.get("alt") for attributes in page.all("img"))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_the_leaderboard_shows_and_sorts_by_the_figures_of_the_table(site):
    (table,) = build_tables(load_runs(site.parent / "results"))
    text = (site / "index.html").read_text()
    sorts = re.findall(r'<td class="number" data-sort="([^"]+)"', text)
    stats = [row.stats[metric, guidance] for row in table.rows for metric in ("cl", "cam_cos", "att_cos") for guidance in ("none", "au")]
    assert [float(sort) for sort in sorts] == pytest.approx([stat.mean for stat in stats])
    assert show("att_cos", stats[-1]).rstrip(" *≈") in Page(site / "index.html").text


def test_intervals_are_said_to_readers_and_not_only_in_titles(site):
    page = Page(site / "index.html")
    titles = [attributes["title"] for attributes in page.all("td") if "title" in attributes]
    assert len(titles) == 18
    assert all(words.startswith("95% intervals for other seeds ") and words.removeprefix("95% intervals ") in page.text for words in titles)


def test_a_cell_page_shows_its_confusion_matrix_settings_and_hashes(site):
    for _, record in read_records(site.parent / "results"):
        (path,) = site.glob(f"cells/*-{hashlib.sha256(record.key.encode()).hexdigest()[:10]}.html")
        text = Page(path).text
        for part in (
            "Self-reported",
            record.key,
            record.rows_sha256,
            "--set train.epochs=2",
            f"{record.cell.backbone}, faces, seed {record.cell.seed}",
        ):
            assert part in text
        counts = re.findall(r'<td class="number shade-\d+">(\d+)</td>', path.read_text())
        assert [int(count) for count in counts] == [count for row in record.metrics["cl"]["confusion"] for count in row]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\"b'c<i onmouseover=alert(1)>", "{{ 7 * 7 }}", "../../outside"])
def test_text_from_data_stays_text(tmp_path, name):
    write_cell(tmp_path / "results", dataset=name, method=name)
    out = make(tmp_path / "results", tmp_path / "site")
    for page in pages(out).values():
        assert {attributes["src"].split("/")[-1] for attributes in page.all("script")} <= {
            "tablesort.min.js",
            "tablesort.number.min.js",
            "site.js",
        }
        assert not page.all("i") or page.all("i") == [{}, {}]  # those of the introduction
        assert not any("onmouseover" in attributes for _, attributes in page.elements)
    assert name in Page(out / "index.html").text
    assert {path.name for path in tmp_path.iterdir()} == {"results", "site"}


def test_the_same_records_give_the_same_bytes(site, tmp_path):
    again = make(site.parent / "results", tmp_path / "again")
    assert bytes_of(again) == bytes_of(site)


def test_a_site_is_replaced_whole(tmp_path):
    write_cell(tmp_path / "results", seed=0)
    make(tmp_path / "results", tmp_path / "site")
    write_cell(tmp_path / "other", seed=1)
    make(tmp_path / "other", tmp_path / "site")
    assert bytes_of(tmp_path / "site") == bytes_of(make(tmp_path / "other", tmp_path / "fresh"))
    assert {path.name for path in tmp_path.iterdir()} == {"results", "other", "site", "fresh"}


@pytest.mark.parametrize("made_before", [False, True])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, made_before):
    write_cell(tmp_path / "results")
    out = tmp_path / "site"
    if made_before:
        make(tmp_path / "results", out)
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "final.tex").write_text("mine")
    before = bytes_of(out)
    with pytest.raises(ValueError, match=r"move it away first|not a site made by bench publish"):
        make(tmp_path / "results", out)
    assert bytes_of(out) == before


def test_an_error_half_way_leaves_the_old_site(tmp_path, monkeypatch):
    write_cell(tmp_path / "results")
    before = bytes_of(make(tmp_path / "results", tmp_path / "site"))

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(write, "draw_curves", full)
    with pytest.raises(OSError, match="no space left"):
        make(tmp_path / "results", tmp_path / "site")
    assert bytes_of(tmp_path / "site") == before
    assert {path.name for path in tmp_path.iterdir()} == {"results", "site"}


def test_maps_of_another_form_are_refused_though_their_hash_fits(tmp_path):
    cell = write_cell(tmp_path / "results")
    path, record = cell / "maps.safetensors", cell / "record.json"
    before = file_sha256(path)
    maps = read_average_maps(path)
    write_average_maps(path, dataclasses.replace(maps, example_attention=maps.example_attention[:-1]))
    record.write_text(record.read_text().replace(before, file_sha256(path)))
    with pytest.raises(ValueError, match=r"'example_attention' is uint8 \(2, 32, 32\), it should be uint8 \(3, 32, 32\)"):
        make(tmp_path / "results", tmp_path / "site")


def test_records_without_maps_say_so(tmp_path):
    write_cell(tmp_path / "results", maps=False)
    out = make(tmp_path / "results", tmp_path / "site")
    (cell,) = out.glob("cells/*.html")
    assert "has no average maps" in Page(cell).text
    assert not list(out.glob("maps/*"))


def test_a_file_of_maps_that_is_not_the_records_is_refused(tmp_path):
    cell, donor = (write_cell(tmp_path / "results", seed=seed) for seed in (0, 1))
    (cell / "maps.safetensors").write_bytes((donor / "maps.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"{cell.name}/maps.safetensors does not match the hash"):
        make(tmp_path / "results", tmp_path / "site")


def test_a_strip_shows_each_map_and_leaves_absent_ones_white(tmp_path):
    maps = np.full((2, 32, 32), 100, dtype=np.uint8)
    (tmp_path / "strip.png").write_bytes(draw_strip(maps, shown=[True, False]))
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"))
    assert strip.shape == (34, 68, 3)
    assert strip[17, 17].tolist() == [round(255 * part) for part in mpl.colormaps["viridis"](100)[:3]]
    assert (strip[:, 34:] == 255).all()
    assert (strip[:, 0] == 255).all()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    options = {"size": 36, "train": 7, "val": 7, "test": SAMPLES}
    prepare("synthetic", name="synthetic", options=options, raw=None, out=root / "data" / "synthetic", workers=1)
    return root / "data"


def faces_shown(tmp_path: Path, data: Path, *, entry: str, faces: bool) -> bool:
    fingerprint = load_index(data / "synthetic").fingerprint
    write_cell(tmp_path / "results", entry=entry, fingerprint=fingerprint)
    out = make(tmp_path / "results", tmp_path / "site", data=data, faces=faces)
    (page,) = (out / "maps").glob("*.html")
    shown = bool(list(out.rglob("*.jpg")))
    assert ("not ours to publish" in Page(page).text) is not shown
    assert len(Page(page).all("img")) == 2 + 2 + (3 if shown else 1)  # average maps, attention, examples
    return shown


def test_faces_that_the_project_drew_are_shown(tmp_path, prepared):
    assert faces_shown(tmp_path, prepared, entry="synthetic", faces=False)


def test_faces_of_a_dataset_are_shown_only_if_asked_for(tmp_path, prepared):
    assert not faces_shown(tmp_path / "not", prepared, entry="folder", faces=False)
    assert faces_shown(tmp_path / "asked", prepared, entry="folder", faces=True)


def test_a_record_that_claims_drawn_faces_does_not_open_other_peoples(tmp_path, prepared):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    index = data / "synthetic" / "index.json"
    index.write_text(
        index.read_text().replace('"entry": "synthetic"', '"entry": "rafdb"').replace('"entry":"synthetic"', '"entry":"rafdb"')
    )
    assert "rafdb" in index.read_text()
    assert not faces_shown(tmp_path, data, entry="synthetic", faces=False)


def test_colours_of_text_have_contrast(site):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    css = (site / "static" / "site.css").read_text()
    names = dict(re.findall(r"--(\w+): (#\w{6});", css))
    pairs = [(names[ink], ground) for ink in ("ink", "quiet", "accent") for ground in ("#ffffff", names["soft"])]
    shades = re.findall(r"\.shade-\d+ \{ background: (#\w{6}); color: (#\w{6}); \}", css)
    assert len(shades) == 11
    for pair in [*pairs, *shades]:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair  # WCAG 2.2, 1.4.3


def test_vendored_scripts_come_with_version_and_licence(site):
    vendor = site / "static" / "vendor" / "tablesort"
    assert "v5.6.0" in (vendor / "tablesort.min.js").read_text()
    assert "Permission is hereby granted" in (vendor / "LICENCE").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--site DIR for a static site, --hub OWNER/NAME"),
        (["--site", "out", "--private"], "--private is about a repository of the hub"),
        (["--hub", "me/x", "--faces"], "--faces is about the pictures of a site"),
        (["--hub", "x"], "give OWNER/NAME"),
        (["--site", "out", "--reference", "papr"], "unknown reference. Did you mean 'paper'?"),
        (["--site", "out"], "bench run --profile quick --results results"),
    ],
)
def test_what_cannot_be_published_is_refused_with_what_to_type(bench_here, tmp_path, arguments, message):
    if "x" in arguments or "papr" in arguments:
        write_cell(tmp_path / "results")
    done = bench_here("publish", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("backbone", "words"), [("resnet50", "reported, unverified"), ("mini", "its figures are of resnet50, not mini")])
def test_published_figures_stand_in_a_table_of_their_own_or_it_says_why_not(tmp_path, backbone, words):
    write_cell(tmp_path / "results", dataset="rafdb", entry="rafdb", backbone=backbone)
    write_site(tmp_path / "results", tmp_path / "site", data=tmp_path, reference=load_reference("paper"))
    index = Page(tmp_path / "site" / "index.html")
    assert words in index.text
    assert len(index.all("table")) == (3 if backbone == "resnet50" else 2)  # leaderboard, reported, cost
    assert words in (tmp_path / "site" / "leaderboard.md").read_text()


def test_the_command_makes_a_site(bench_here, tmp_path):
    write_cell(tmp_path / "results")
    done = bench_here("publish", "--site", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out/index.html: 3 pages" in done.stdout
    assert (tmp_path / "out" / "index.html").is_file()
    assert CLASSES[1] in Page(next((tmp_path / "out").glob("cells/*"))).text
