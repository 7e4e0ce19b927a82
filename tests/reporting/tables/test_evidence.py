from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from bench.evaluation.rows import Rows, write_rows
from bench.reporting.tables.evidence import Run, Samples, judge, load_samples
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.render import render

from .test_leaderboard import record

N = 600
LABELS = np.arange(N) % 7


def samples(*, accuracy=0.7, cosine=0.5, seed=0, people=None, labels=LABELS):
    """Independent hits, and cosines with a spread of 0.1, of one run."""
    rng = np.random.default_rng(seed)
    n = len(labels)
    counted = labels > 0
    cosines = np.where(counted, cosine + 0.1 * rng.standard_normal(n), np.nan).astype(np.float32)
    return Samples(
        labels=labels,
        people=np.full(n, -1) if people is None else people,
        counted=counted,
        values={"cl": (rng.random(n) < accuracy).astype(np.float32), "cam_cos": cosines, "att_cos": cosines.copy()},
    )


def run(method="cam", *, seed=0, guidance="none", **facts):
    drawn = samples(seed=1000 * seed + sum(map(ord, method + guidance)), **facts)
    mean = np.mean([np.nanmean(drawn.values["cam_cos"][drawn.labels == label]) for label in range(1, 7)])
    filed = record(method=method, seed=seed, guidance=guidance, cl=float(drawn.values["cl"].mean()), cam=float(mean), att=float(mean))
    return Run(record=filed.model_copy(update={"data": filed.data.model_copy(update={"samples": N})}), samples=drawn)


def standing(table, method, column):
    row = next(row for row in table.rows if row.method == method)
    return row.stats[column].judged.standing


def test_the_best_row_is_marked_and_equal_ones_are_tied_with_it():
    (table,) = build_tables([run("cam", accuracy=0.70), run("acol", accuracy=0.71), run("adl", accuracy=0.30)])
    assert sorted(standing(table, method, ("cl", "none")) for method in ("cam", "acol")) == ["best", "tied"]
    assert standing(table, "adl", ("cl", "none")) == "behind"


def test_a_row_alone_in_its_column_is_not_called_the_best():
    (table,) = build_tables([run("cam")])
    assert standing(table, "cam", ("cl", "none")) == "alone"
    assert "**" not in render([table], "md").split("\n\n")[1]


def test_identical_networks_are_tied_whatever_they_share():
    cam = run("cam")
    twin = Run(record=record(method="gradcam", cl=cam.record.metrics["cl"]["accuracy"], cam=0.9), samples=cam.samples)
    (table,) = build_tables([cam, twin])
    assert {standing(table, method, ("cl", "none")) for method in ("cam", "gradcam")} == {"best", "tied"}


def test_a_difference_that_seeds_do_not_bear_out_is_a_tie():
    """Each run is far from the other on its 600 samples, but the sign changes with the seed."""
    runs = [run("cam", seed=s, cosine=c) for s, c in enumerate((0.6, 0.4, 0.6))]
    runs += [run("acol", seed=s, cosine=c) for s, c in enumerate((0.5, 0.58, 0.5))]
    (table,) = build_tables(runs)
    assert {standing(table, method, ("cam_cos", "none")) for method in ("cam", "acol")} == {"best", "tied"}


def test_a_difference_that_stands_against_samples_and_seeds_is_one():
    runs = [run("cam", seed=s, cosine=0.6 + 0.001 * s) for s in range(3)] + [run("acol", seed=s, cosine=0.5) for s in range(3)]
    (table,) = build_tables(runs)
    assert standing(table, "cam", ("cam_cos", "none")) == "best"
    assert standing(table, "acol", ("cam_cos", "none")) == "behind"


def test_a_few_people_with_many_pictures_tell_less_than_many_people():
    """The same figures: pictures of one person agree, so that only twelve independent units are left."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 50)
    labels = np.ones(N, dtype=np.int64)
    advantage = rng.normal(0.02, 0.05, 12)[people]
    base = 0.5 + 0.01 * rng.standard_normal(N)

    def two(people):
        facts = {"labels": labels, "people": people, "counted": np.ones(N, bool)}
        pair = [Samples(values={m: v.astype(np.float32) for m in ("cl", "cam_cos", "att_cos")}, **facts) for v in (base + advantage, base)]
        columns = {("cam_cos", "none"): {i: [Run(record=record(method=f"m{i}"), samples=s)] for i, s in enumerate(pair)}}
        return judge(columns).cells[1, ("cam_cos", "none")].p_best

    assert two(np.full(N, -1)) < 1e-6
    assert two(people) > 1e-3


def test_accuracy_is_judged_by_people_where_they_are_known():
    """One row knows two of the twelve people, fifty pictures each, and the other does not: too few to tell."""
    people = np.repeat(np.arange(12), 50)
    right = {"cam": np.ones(N, np.float32), "acol": (people > 1).astype(np.float32)}

    def p(people):
        facts = {"labels": LABELS, "people": people, "counted": LABELS > 0}
        rows = {
            number: [Run(record=record(method=method), samples=Samples(values={"cl": hits}, **facts))]
            for number, (method, hits) in enumerate(right.items())
        }
        return judge({("cl", "none"): rows}).cells[1, ("cl", "none")].p_best

    assert p(np.full(N, -1)) == pytest.approx(2 * 0.5**100)
    assert p(people) == pytest.approx(2 * 0.5**2)


def test_the_table_says_what_its_split_can_resolve():
    (table,) = build_tables([run("cam"), run("acol")])
    words = re.search(
        r"CL ± ([0-9.]+) points \(Wilson\); two rows disagree on ([0-9]+) %.*no gap in CL below ([0-9.]+) points", table.resolution
    )
    assert float(words[1]) == pytest.approx(100 * 1.96 * math.sqrt(0.7 * 0.3 / N), rel=0.05)
    assert float(words[2]) == pytest.approx(100 * 2 * 0.7 * 0.3, abs=6)
    assert "12 comparisons" not in table.resolution
    assert "3 comparisons, corrected by Holm" in table.resolution


def test_every_format_shows_the_standing():
    tables = build_tables([run("cam", accuracy=0.9), run("acol", accuracy=0.89), run("adl", accuracy=0.3)])
    markdown, latex = render(tables, "md"), render(tables, "latex")
    best = f"{100 * max(row.stats['cl', 'none'].mean for row in tables[0].rows):.1f}"
    assert f"**{best}**" in markdown
    assert f"\\textbf{{{best}}}" in latex
    assert "$\\approx$" in latex
    assert "\ue001" not in latex
    figures = json.loads(render(tables, "json"))["tables"][0]["rows"][0]["figures"]
    (cl,) = (f for f in figures if f["metric"] == "cl")
    assert cl["standing"] in ("best", "tied")
    assert cl["intervals_over_samples"][0][0] < cl["mean"] < cl["intervals_over_samples"][0][1]
    assert "standing" in render(tables, "csv").splitlines()[0]


def test_a_batch_dependent_row_is_never_the_best_nor_tied_with_it():
    broken = run("cam", accuracy=0.99)
    broken = dataclasses.replace(broken, record=broken.record.model_copy(update={"invariance": {"holds": False}}))
    (table,) = build_tables([broken, run("acol", accuracy=0.7), run("adl", accuracy=0.3)])
    cam = next(row for row in table.rows if row.method == "cam")
    assert {stat.judged for stat in cam.stats.values()} == {None}
    assert standing(table, "acol", ("cl", "none")) == "best"


def test_tables_without_samples_are_not_judged():
    (table,) = build_tables([Run(record=record()), Run(record=record(method="acol", cl=0.9))])
    assert table.resolution == ""
    assert all(stat.judged is None for row in table.rows for stat in row.stats.values())


def write(path, n):
    labels = np.arange(n) % 2
    cosines = np.where(labels == 1, 0.5, np.nan).astype(np.float32)
    rows = Rows(
        keys=[f"{i:08d}" for i in range(n)],
        labels=labels,
        people=np.arange(n) // 2,
        logits=np.eye(2, dtype=np.float32)[np.zeros(n, int)],
        au_valid=np.ones(n, bool),
        attention_cosines={5: cosines},
        map_cosines_true=cosines,
        map_cosines_predicted=cosines,
    )
    write_rows(path, rows)


def test_samples_come_from_the_rows_of_a_record(tmp_path):
    write(tmp_path / "samples.parquet", 10)
    filed = record()
    filed.metrics["cam_cos"]["true"]["per_class"] = {"b": {}}
    loaded = load_samples(tmp_path / "samples.parquet", filed)
    assert loaded.values["cl"].tolist() == [1, 0] * 5
    assert loaded.counted.tolist() == [False, True] * 5
    assert loaded.people.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_rows_of_another_number_of_samples_are_refused(tmp_path):
    write(tmp_path / "samples.parquet", 8)
    with pytest.raises(ValueError, match="8 rows, its record 10"):
        load_samples(tmp_path / "samples.parquet", record())


@pytest.mark.slow
def test_equal_methods_are_told_apart_in_at_most_five_tables_of_a_hundred():
    """1,000 whole tables of three equal methods: a false alarm anywhere in a table counts once."""
    rng = np.random.default_rng(0)
    false = 0
    filed = {method: record(method=method) for method in ("cam", "acol", "adl")}
    for _ in range(1000):
        difficulty = rng.beta(6, 2, N)
        runs = []
        for method in ("cam", "acol", "adl"):
            values = {
                "cl": (rng.random(N) < difficulty).astype(np.float32),
                "cam_cos": np.where(LABELS > 0, difficulty - 0.3 + 0.1 * rng.standard_normal(N), np.nan).astype(np.float32),
                "att_cos": np.where(LABELS > 0, difficulty - 0.3 + 0.1 * rng.standard_normal(N), np.nan).astype(np.float32),
            }
            runs.append(Run(record=filed[method], samples=Samples(labels=LABELS, people=np.full(N, -1), counted=LABELS > 0, values=values)))
        columns = {(metric, "none"): {i: [r] for i, r in enumerate(runs)} for metric in ("cl", "cam_cos", "att_cos")}
        false += any(cell.p_best < 0.05 for cell in judge(columns).cells.values())
    assert false <= 50 + 2 * math.sqrt(1000 * 0.05 * 0.95)
