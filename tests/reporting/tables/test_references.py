from __future__ import annotations

import csv
import io
import json

import pytest

from bench.reporting.tables.evidence import Run
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.references import beside, load_reference
from bench.reporting.tables.render import render

from .test_leaderboard import record


def tables(*, entry="rafdb", backbone="resnet50", **facts):
    filed = [record(backbone=backbone, guidance=g, cl=0.85, cam=0.6, att=0.6, **facts) for g in ("none", "au")]
    return build_tables(Run(record=filed.model_copy(update={"data": filed.data.model_copy(update={"entry": entry})})) for filed in filed)


def test_the_published_table_comes_with_the_package():
    paper = load_reference("paper")
    assert paper == load_reference("belharbi2024")
    assert (paper.status, paper.protocol, paper.runs_per_cell) == ("unverified", "test-selected", 1)
    assert paper.figures["rafdb"]["gradcampp"] == (87.84, 89.14, 0.60, 0.82, 0.52, 0.87)
    assert paper.figures["affectnet"]["apvit"] == (60.62, 62.28, None, None, 0.45, 0.84)
    assert {len(rows) for rows in paper.figures.values()} == {11}


def test_a_published_figure_stands_beside_ours_with_the_difference():
    (table,) = tables()
    published = beside(table, load_reference("paper"))
    reported = published.figures[0, ("cl", "au")]
    assert (reported.value, reported.difference) == (pytest.approx(0.8895), pytest.approx(0.85 - 0.8895))
    assert "unverified, test-selected, one run per cell" in published.words
    assert "Not made alike: protocol val here, variant paper here" in published.words


def test_every_format_labels_what_was_reported():
    made, paper = tables(), load_reference("paper")
    for fmt, minus in (("md", "\N{MINUS SIGN}"), ("latex", "$-$")):
        text = render(made, fmt, reference=paper)
        assert "reported, unverified" in text
        assert "88.95" in text
        assert f"{minus}3.95" in text
    figures = json.loads(render(made, "json", reference=paper))["tables"][0]
    assert figures["reference"]["applies"] is True
    assert figures["rows"][0]["figures"][0]["reported"]["value"] == pytest.approx(0.882)
    lines = list(csv.DictReader(io.StringIO(render(made, "csv", reference=paper))))
    assert float(lines[0]["difference_to_reported"]) == pytest.approx(0.85 - 0.882)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"entry": "folder"}, "it is about rafdb, affectnet, not folder"),
        ({"entry": "affectnet8"}, "it is about rafdb, affectnet, not affectnet8"),
        ({"backbone": "mini"}, "its figures are of resnet50, not mini"),
        ({"method": "rollout"}, "it has none of these methods"),
    ],
)
def test_a_table_to_which_nothing_applies_says_so(facts, why):
    made = tables(**facts)
    text = render(made, "md", reference=load_reference("paper"))
    assert f"No figure of Belharbi et al. 2024, Table 1 applies to this table: {why}" in text
    assert "reported" not in text.split("No figure")[0].replace("self-reported", "")


def test_an_unknown_reference_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown reference. Did you mean 'belharbi2024'"):
        load_reference("belharbi")


def test_a_reference_of_ones_own_is_read_from_its_file(tmp_path):
    own = load_reference("paper").model_dump(mode="json") | {
        "title": "Mine",
        "figures": {"rafdb": {"cam": [80.0, None, 0.5, None, None, None]}},
    }
    (tmp_path / "own.json").write_text(json.dumps(own))
    published = beside(tables()[0], load_reference(str(tmp_path / "own.json")))
    assert set(published.figures) == {(0, ("cl", "none")), (0, ("cam_cos", "none"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figures": {"rafdb": {"cam": [80.0]}}}, "figures.rafdb.cam has 1 figures for 6 columns"),
        ({"figures": {"rafdb": {"mine": [80.0] * 6}}}, "its backbone is missing: add mine to backbones"),
        ({"protocol": "best"}, "protocol: Input should be"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, change, message):
    (tmp_path / "own.json").write_text(json.dumps(load_reference("paper").model_dump(mode="json") | change))
    with pytest.raises(ValueError, match=message):
        load_reference(str(tmp_path / "own.json"))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"--reference nowhere.json: No such file"):
        load_reference("nowhere.json")
