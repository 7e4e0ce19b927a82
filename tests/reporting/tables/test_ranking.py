from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from bench.evaluation.statistics import rank_methods
from bench.reporting.tables.evidence import Run
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.render import FORMATS, render, rich_tables

from .test_leaderboard import record

CL = {
    "faces": {"cam": 0.9, "acol": 0.8, "adl": 0.7},
    "more": {"cam": 0.6, "acol": 0.7, "adl": 0.5},
    "last": {"cam": 0.8, "acol": 0.7, "adl": 0.6},
}


def tables(figures, **changes):
    return build_tables(
        Run(record=record(method=method, dataset=dataset, cl=cl, fingerprint=dataset, **changes))
        for dataset, methods in figures.items()
        for method, cl in methods.items()
    )


def test_average_ranks_are_those_of_the_shared_rows():
    (ranking,) = rank(tables(CL))
    assert {row.method: row.ranks["cl", "none"] for row in ranking.rows} == {
        "cam": pytest.approx(4 / 3),
        "acol": pytest.approx(5 / 3),
        "adl": 3,
    }
    expected = rank_methods(np.array([[0.9, 0.8, 0.7], [0.6, 0.7, 0.5], [0.8, 0.7, 0.6]]))
    assert ranking.columns["cl", "none"] == expected


def test_rows_nearer_to_the_best_than_the_critical_difference_are_tied():
    (ranking,) = rank(tables(CL))
    standings = {row.method: ranking.standing(row, ("cl", "none")) for row in ranking.rows}
    assert ranking.columns["cl", "none"].critical_difference == pytest.approx(1.91, abs=0.01)
    assert standings == {"cam": "best", "acol": "tied", "adl": "tied"}


def test_a_row_that_is_not_on_every_dataset_is_left_out_and_named():
    (ranking,) = rank(tables({**CL, "last": {"cam": 0.8, "acol": 0.7}}))
    assert [row.method for row in ranking.rows] == ["cam", "acol"]
    assert ranking.notes == ("left out, because they are not in every table: ADL (mini)",)


def test_a_dataset_that_shares_too_little_is_left_out_and_named():
    (ranking,) = rank(tables({**CL, "last": {"prm": 0.8}}))
    assert ranking.datasets == ("faces", "more")
    assert "last left out: it shares fewer than two rows with the rest" in ranking.notes


def test_a_batch_dependent_row_is_not_ranked():
    runs = [
        record(method=m, dataset=d, fingerprint=d, invariance={"holds": m != "cam"}) for d in ("a", "b") for m in ("cam", "acol", "adl")
    ]
    (ranking,) = rank(build_tables(Run(record=entry) for entry in runs))
    assert [row.method for row in ranking.rows] == ["acol", "adl"]
    assert "CAM (mini) left out: batch-dependent on a" in ranking.notes


@pytest.mark.parametrize(
    "changes",
    [{"protocol": "test-selected"}, {"variant": "official"}, {"lr": 0.2}, {"provenance": {"partial": {"test": {"fear": [1, 74]}}}}],
)
def test_tables_made_differently_are_not_ranked_together(changes):
    assert rank((*tables({"faces": CL["faces"]}), *tables({"more": CL["more"]}, **changes))) == ()


def test_one_dataset_is_no_ranking():
    assert rank(tables({"faces": CL["faces"]})) == ()


def test_two_versions_of_a_dataset_are_not_two_datasets():
    twice = [record(method=m, fingerprint=f) for f in "ab" for m in CL["faces"]]
    assert rank(build_tables(Run(record=entry) for entry in twice)) == ()


def test_every_format_shows_the_ranking():
    made = tables(CL)
    rankings = rank(made)
    texts = {fmt: render(made, fmt, rankings=rankings) for fmt in FORMATS}
    for fmt in ("md", "latex"):
        assert "Average rank over faces, last and more" in texts[fmt]
        assert "1.33" in texts[fmt]
        assert "Critical difference" in texts[fmt]
    assert json.loads(texts["json"])["rankings"][0]["columns"][0]["critical_difference"] == pytest.approx(1.91, abs=0.01)
    lines = [line for line in csv.DictReader(io.StringIO(texts["csv"])) if line["kind"] == "rank" and line["metric"] == "cl"]
    assert [(line["method"], round(float(line["mean"]), 2)) for line in lines] == [("cam", 1.33), ("acol", 1.67), ("adl", 3.0)]
    assert str(rich_tables(made, rankings=rankings)[-1].title).startswith("Average rank")
