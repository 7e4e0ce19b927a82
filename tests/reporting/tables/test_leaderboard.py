from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

from bench.reporting.tables.evidence import Run
from bench.reporting.tables.leaderboard import build_tables as build_from_runs
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.render import render
from bench.sweep.record import CellName, CodeFacts, DataFacts, ProcessFacts, Record


def build_tables(records):
    return build_from_runs(Run(record=record) for record in records)


def record(
    *,
    method="cam",
    backbone="mini",
    guidance="none",
    seed=0,
    cl=0.5,
    cam=0.4,
    att=0.3,
    protocol="val",
    variant="paper",
    fingerprint="f" * 64,
    weight=9.0,
    lr=0.1,
    provenance=None,
    dataset="faces",
    **changes,
):
    settings = {"train": {"lr": lr}, "images": {"size": 64}, "protocol": protocol}
    if guidance == "au":
        settings["guidance"] = {"weight": weight, "layers": [5], "au_maps": "symmetric", "grid": 28}
    summary = {"macro": cam, "samples": 9, "without_map": 0, "missing_classes": [], "per_class": {}}
    filed = Record(
        key="k",
        training_key="t",
        scheme=2,
        cell=CellName(method=method, guidance=guidance, backbone=backbone, dataset=dataset, seed=seed),
        trains_as=method,
        variant=variant,
        protocol=protocol,
        method_options={},
        training_options={},
        backbone_options={},
        settings=settings,
        brought={},
        evaluation={},
        config={"train": {"lr": lr, "checkpoint_minutes": 1.0}, "augment": {}, "images": {}},
        origins={},
        data=DataFacts(
            entry="folder",
            fingerprint=fingerprint,
            classes=("a", "b"),
            split="test",
            samples=10,
            keys_sha256="s",
            bad_pictures=0,
            provenance=provenance or {},
        ),
        attention_layer=5,
        metrics={"cl": {"accuracy": cl}, "cam_cos": {"true": summary}, "att_cos": {"5": {**summary, "macro": att}}},
        invariance=None,
        selection={},
        epochs=[],
        processes=None,
        weights_sha256="w",
        rows_sha256="r",
        maps_sha256=None,
        code=CodeFacts(version="0", commit=None, clean=None, dirty_diff_sha256=None, source_sha256=None, entries={}, libraries={}),
        hardware={},
        cost={},
        seeds={},
        finished="2026-11-20T00:00:00+00:00",
    )
    return filed.model_copy(update=changes)


def test_a_row_has_mean_and_sample_deviation_over_seeds():
    values = [0.5, 0.6, 0.9]
    (table,) = build_tables([record(seed=s, cl=v) for s, v in enumerate(values)])
    stat = table.rows[0].stats["cl", "none"]
    assert (stat.mean, stat.sd, stat.n) == (pytest.approx(2 / 3), pytest.approx(statistics.stdev(values)), 3)


def test_a_single_seed_has_no_deviation():
    (table,) = build_tables([record()])
    assert table.rows[0].stats["cl", "none"].sd is None
    assert "±" not in render([table], "md").split("mean ±")[0]


def test_without_and_with_guidance_stand_side_by_side():
    (table,) = build_tables([record(cam=0.4), record(guidance="au", cam=0.7)])
    assert table.rows[0].stats["cam_cos", "none"].mean == 0.4
    assert table.rows[0].stats["cam_cos", "au"].mean == 0.7


@pytest.mark.parametrize("changes", [{"protocol": "test-selected"}, {"variant": "official"}, {"fingerprint": "e" * 64}, {"lr": 0.2}])
def test_rows_that_may_not_be_compared_are_never_in_one_table(changes):
    assert len(build_tables([record(), record(seed=1, **changes)])) == 2


def test_two_guidance_settings_are_two_rows_beside_the_same_unguided_runs():
    (table,) = build_tables([record(), record(guidance="au", weight=9.0), record(guidance="au", weight=4.0)])
    assert sorted(row.title for row in table.rows) == [
        "CAM (weight 4, layers 5, symmetric AU maps)",
        "CAM (weight 9, layers 5, symmetric AU maps)",
    ]
    assert all(row.stats["cl", "none"].n == 1 for row in table.rows)


def test_the_same_seed_twice_is_an_error():
    with pytest.raises(ValueError, match="same seed"):
        build_tables([record(), record()])


def test_two_copies_of_a_record_are_both_named():
    with pytest.raises(ValueError, match=r"same seed: here/a and there/a\. Move one of them away"):
        build_from_runs([Run(record=record(), folder=Path(place) / "a") for place in ("here", "there")])


def test_a_test_selected_table_says_that_it_is_optimistic():
    assert "optimistic" in render(build_tables([record(protocol="test-selected")]), "md")


def test_json_and_csv_hold_every_figure():
    tables = build_tables([record(seed=s, guidance=g, cl=0.1 * (s + 1)) for s in range(2) for g in ("none", "au")])
    (plain,) = json.loads(render(tables, "json"))["tables"]
    assert {(f["metric"], f["guidance"], f["n"]) for f in plain["rows"][0]["figures"]} == {
        (m, g, 2) for m in ("cl", "cam_cos", "att_cos") for g in ("none", "au")
    }
    lines = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert len(lines) == 6
    assert float(next(line["mean"] for line in lines if line["metric"] == "cl")) == pytest.approx(0.15)


def test_latex_is_a_booktabs_table_with_escaped_text():
    text = render(build_tables([record()]), "latex")
    assert "\\toprule" in text
    assert "accuracy in \\%" in text
    assert "faces, mini" in text


def test_an_unknown_method_keeps_its_name():
    (table,) = build_tables([record(method="from-a-plugin-not-here")])
    assert table.rows[0].title == "from-a-plugin-not-here"


def test_several_backbones_share_a_table_and_are_named_in_their_rows():
    (table,) = build_tables([record(), record(method="apvit", backbone="mini-apvit")])
    assert [(row.method, row.backbone) for row in table.rows] == [("cam", "mini"), ("apvit", "mini-apvit")]
    assert "| Backbone" in render([table], "md")


def test_rows_come_in_the_published_order():
    names = ["tscam", "a-plugin", "wildcat", "cam"]
    (table,) = build_tables([record(method=name) for name in names])
    assert [row.method for row in table.rows] == ["cam", "wildcat", "tscam", "a-plugin"]


def test_partial_data_is_said_in_every_format():
    tables = build_tables(
        [record(provenance={"partial": {"train": {"happiness": [40, 4772]}, "test": {"fear": [1, 74], "anger": [2, 162]}}})]
    )
    for fmt in ("md", "latex"):
        text = render(tables, fmt)
        assert "faces (partial data)" in text
        assert "train 40 of 4772 (1 class), test 3 of 236 (2 classes)" in text
    assert json.loads(render(tables, "json"))["tables"][0]["partial"] is True
    assert {line["partial"] for line in csv.DictReader(io.StringIO(render(tables, "csv")))} == {"True"}


EARLY, LATER, LATEST = (f"2026-11-2{day}T00:00:00+00:00" for day in range(3))


def measured(*names, value=0.5):
    """What a record with optional measures has."""
    return {
        "key": f"{names} {value}",
        "evaluation": {"au_maps": "symmetric", "measures": list(names), "measure_samples": 9},
        "metrics": {**record().metrics, "measures": {name: {"macro": value, "samples": 9, "per_class": {}} for name in names}},
    }


def test_of_records_that_differ_in_measures_only_the_fullest_and_latest_counts():
    fullest = [record(**measured("road", "energy", value=v), finished=f) for v, f in ((0.1, EARLY), (0.2, LATER))]
    fewer = record(**measured("road", value=0.3), finished=LATEST)
    (table,) = build_tables([*fullest, fewer, record(seed=1, training_key="another", **measured())])
    assert table.rows[0].stats["cl", "none"].n == 2
    assert table.rows[0].measures["road", "none"].values == (0.2,)


def test_measures_are_a_further_table_and_always_in_csv_and_json():
    tables = build_tables([record(seed=s, training_key=str(s), **measured("road", value=0.25 + s / 2)) for s in range(2)])
    assert "road" not in render(tables, "md")
    assert "0.500 ± 0.354" in render(tables, "md", columns="measures").split("further measures")[1]
    (line,) = (line for line in csv.DictReader(io.StringIO(render(tables, "csv"))) if line["metric"] == "road")
    assert (line["kind"], float(line["mean"]), line["n"]) == ("measure", 0.5, "2")
    (measure,) = json.loads(render(tables, "json"))["tables"][0]["rows"][0]["measures"]
    assert (measure["measure"], measure["values"]) == ("road", [0.25, 0.75])


def test_cost_is_a_further_table_in_units_people_read():
    cost = {"parameters": 23_520_000, "training_seconds": 90.0, "map_seconds_per_image": 0.0021, "unknown": 1}
    tables = build_tables([record(seed=s, cost=cost, hardware={"device": "cpu", "name": f"machine{s}"}) for s in range(2)])
    text = render(tables, "md", columns="cost").split(": cost")[1]
    assert [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]] == ["CAM", "mini", "w/o AU", "23.52", "1.50", "2.10"]
    assert "not comparable between machines" in text
    assert {line["metric"] for line in csv.DictReader(io.StringIO(render(tables, "csv"))) if line["kind"] == "cost"} == set(cost) - {
        "unknown"
    }


def test_a_row_is_verified_only_if_all_its_records_are():
    runs = [Run(record=record(seed=s, method=m), verified=(m, s) != ("acol", 1)) for s in range(2) for m in ("cam", "acol")]
    tables = build_from_runs(runs)
    assert {row.method: row.verified for row in tables[0].rows} == {"cam": True, "acol": False}
    text = render(tables, "md")
    assert "CAM ✓" in text
    assert "ACoL ✓" not in text
    assert "other rows are self-reported" in text
    assert {line["method"]: line["verified"] for line in csv.DictReader(io.StringIO(render(tables, "csv")))} == {
        "cam": "True",
        "acol": "False",
    }


def test_a_batch_dependent_row_is_marked_in_every_format():
    tables = build_tables([record(invariance={"holds": True}), record(seed=1, invariance={"holds": False})])
    assert "CAM ⚠ batch-dependent" in render(tables, "md")
    assert "not tested, not ranked" in render(tables, "latex")
    assert json.loads(render(tables, "json"))["tables"][0]["rows"][0]["batch_dependent"] is True
    assert {line["batch_dependent"] for line in csv.DictReader(io.StringIO(render(tables, "csv")))} == {"True"}


def test_maps_that_show_no_place_are_counted_beside_the_row_in_every_format():
    def counted(**counts):
        return {"metrics": record().metrics | {"maps": {"true": {"samples": 70, "constant": 0, "not_finite": 0} | counts}}}

    tables = build_tables(
        [record(**counted(constant=12)), record(seed=1, **counted(constant=3, not_finite=1)), record(method="acol", **counted())]
    )
    text = render(tables, "md")
    assert r"CAM \[15 of 140 maps constant, 1 of 140 maps not finite\]" in text
    assert r"\[maps constant\]: maps of the true class" in text
    assert "ACoL \\[" not in text
    rows = json.loads(render(tables, "json"))["tables"][0]["rows"]
    assert rows[0]["maps"] == {"samples": 140, "constant": 15, "not_finite": 1}


NASTY = r"a_b & 50% #1 $x$ ~y ^z {w} \ <b>|*`\n"


def nasty_tables():
    return build_tables(
        [record(method=NASTY, dataset=NASTY, backbone=b, cost={"parameters": 5}, hardware={"name": NASTY}) for b in (NASTY, "mini")]
    )


def test_names_cannot_break_a_markdown_table():
    lines = [line for line in render(nasty_tables(), "md").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert not any("<b>" in line for line in lines if "\\<b" not in line)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_whatever_the_names_are(tmp_path):
    tables = nasty_tables()
    rankings = rank([tables[0], dataclasses.replace(tables[0], dataset="other_faces")])
    (tmp_path / "table.tex").write_text(render(tables, "latex", rankings=rankings, columns="all"))
    packages = r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}"
    (tmp_path / "main.tex").write_text(packages + r"\begin{document}\input{table}\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert "tabular" in (tmp_path / "table.tex").read_text()
    assert "Overfull" not in done.stdout


def spread(*counts, dependent=("batch statistics",)):
    return ProcessFacts(counts=counts, dependent=dependent)


def test_rows_of_several_processes_say_so_where_the_weights_depend_on_it():
    runs = [record(seed=0, processes=spread(2)), record(seed=1, processes=spread(2), training_key="u")]
    (table,) = build_tables(runs)
    assert table.rows[0].spread == "[2 processes]"
    assert r"CAM \[2 processes\]" in render([table], "md")
    assert "batch statistics make the weights depend on the number of processes" in render([table], "md")


def test_a_row_that_mixes_numbers_of_processes_says_so():
    runs = [record(seed=0, processes=spread(1)), record(seed=1, processes=spread(2), training_key="u")]
    (table,) = build_tables(runs)
    assert table.rows[0].spread == "[1 and 2 processes]"
    assert "mixes trainings that are not alike" in render([table], "md")


@pytest.mark.parametrize("processes", [None, spread(1), spread(2, dependent=())])
def test_where_the_number_of_processes_does_not_matter_nothing_is_said(processes):
    (table,) = build_tables([record(seed=0, processes=processes)])
    assert table.rows[0].spread == ""
