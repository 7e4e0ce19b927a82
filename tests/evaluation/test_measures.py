"""Optional measures from the settings to the records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.config import MEASURES as NAMES
from bench.config import ConfigError, load_settings
from bench.evaluation.measures import COLUMNS, MEASURES, Choice, Measuring
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import read_rows, write_rows
from tests.evaluation.explained import explained
from tests.evaluation.test_metrics import EXPRESSIVE, make_rows

CLASSES = ("neutral", "happiness", "surprise", "fear", "anger", "disgust", "sadness")
PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def settings(*names):
    return load_settings(environ={}, flags={"evaluation.measures": list(names)}).config.evaluation


def test_the_names_of_the_settings_are_the_measures():
    assert tuple(MEASURES) == NAMES
    assert len(COLUMNS) == sum(len(measure.columns) for measure in MEASURES.values())


def test_all_is_resolved_and_the_order_of_names_does_not_matter():
    assert settings("all").measures == NAMES
    assert settings("road", "ap", "road") == settings("ap", "road")


def test_an_unknown_measure_is_an_error_that_names_its_origin_and_the_nearest():
    with pytest.raises(ConfigError, match=r"--metrics.*evaluation\.measures.*'deletoin'.*Did you mean 'deletion'"):
        settings("deletoin")


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_does_not_depend_on_the_batch(name):
    seen = explained(7, count=3, size=20)
    whole = MEASURES[name].compute(seen)
    single = [MEASURES[name].compute(seen.take(torch.tensor([i]))) for i in range(3)]
    for column, values in whole.items():
        torch.testing.assert_close(torch.cat([figures[column] for figures in single]), values, atol=1e-4, rtol=0, equal_nan=True)


def test_every_measure_gives_the_columns_it_names_and_leaves_the_network_as_it_was():
    seen = explained()
    weights = {name: value.clone() for name, value in seen.classifier.state_dict().items()}
    for measure in MEASURES.values():
        assert measure.compute(seen).keys() == {column.name for column in measure.columns}
    assert all(torch.equal(value, weights[name]) for name, value in seen.classifier.state_dict().items())
    assert not seen.classifier.training
    assert all(parameter.grad is None for parameter in seen.classifier.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_as_many_forward_passes_are_made_as_are_told(name):
    seen = explained()
    passes = []
    copies = {part: seen.randomised(part) for part in ("head", "all")}
    for network in (seen.classifier, *copies.values()):
        network.register_forward_hook(lambda *_: passes.append(1))
    MEASURES[name].compute(dataclasses.replace(seen, randomised=copies.__getitem__))
    assert len(passes) == MEASURES[name].passes


def measured(*, samples, positions, total=60):
    seen = explained(count=6)
    seen = dataclasses.replace(seen, au_valid=torch.arange(6) != 1)
    choice = Choice(names=("energy", "drop"), samples=samples, seed=0)
    return Measuring(choice, seen.classifier, total=total).measure(seen, positions=torch.tensor(positions))


def test_samples_without_an_au_map_count_only_where_none_is_needed():
    figures = measured(samples=0, positions=range(6))
    assert figures["energy"].isnan().tolist() == [False, True, False, False, False, False]
    assert not figures["drop"].isnan().any()


def test_a_subset_is_evenly_spread_over_the_split_and_the_others_do_not_count():
    figures = measured(samples=6, positions=[0, 10, 20, 30, 40, 59])
    assert figures["drop"].isnan().tolist() == [False, False, False, False, False, True]
    assert measured(samples=6, positions=[1, 2, 3, 4, 5, 6])["drop"].isnan().all()
    assert not measured(samples=100, positions=[0, 1, 2, 3, 4, 59])["drop"].isnan().any()


def test_summaries_are_means_over_classes_of_what_counts():
    values = np.array([0.2, 0.4, np.nan, 0.9], np.float32)
    rows = dataclasses.replace(make_rows([0, 0, 0, 2]), measures={"drop": values})
    summary = compute_metrics(rows, classes=CLASSES, expressive=EXPRESSIVE)["measures"]["drop"]
    assert summary["macro"] == pytest.approx((0.3 + 0.9) / 2)
    assert summary["samples"] == 3
    assert summary["per_class"]["neutral"] == {"samples": 2, "mean": pytest.approx(0.3)}
    assert summary["per_class"]["fear"] == {"samples": 0, "mean": None}


def test_measures_survive_the_disk_and_rows_without_any_have_none(tmp_path):
    plain = make_rows([1, 2, 3])
    rows = dataclasses.replace(plain, measures={"au_4": np.array([0.5, np.nan, 1], np.float32)})
    write_rows(tmp_path / "some.parquet", rows)
    write_rows(tmp_path / "none.parquet", plain)
    np.testing.assert_array_equal(read_rows(tmp_path / "some.parquet").measures["au_4"], rows.measures["au_4"])
    none = read_rows(tmp_path / "none.parquet")
    assert none.measures == {}
    assert "measures" not in compute_metrics(none, classes=CLASSES, expressive=EXPRESSIVE)


def test_a_run_with_measures_records_them_and_changes_nothing_else(go, project):
    asked = {
        "evaluation__measures": ["energy", "drop", "randomisation"],
        "run__methods": ["cam", "gradcampp"],
        "run__guidance": ["none"],
        "train__epochs": 1,
    }
    go(**asked)
    go(**asked | {"evaluation__measures": []})
    cells = {}
    for path in project.glob("results/cells/**/record.json"):
        record = json.loads(path.read_text())
        cells[record["cell"]["method"], bool(record["evaluation"]["measures"])] = record, read_rows(path.parent / "samples.parquet")
    assert len(cells) == 4
    for method in ("cam", "gradcampp"):
        (plain, plain_rows), (record, rows) = cells[method, False], cells[method, True]
        assert record["evaluation"]["measures"] == ["energy", "drop", "randomisation"]
        assert set(record["metrics"]["measures"]) == {"energy", "drop", "increase", "randomisation_head", "randomisation_all"}
        assert record["metrics"]["measures"]["drop"]["samples"] == record["data"]["samples"]
        assert {key: value for key, value in record["metrics"].items() if key != "measures"} == plain["metrics"]
        assert np.isnan(rows.measures["energy"]).tolist() == (~rows.au_valid).tolist()
        np.testing.assert_array_equal(rows.map_cosines_true, plain_rows.map_cosines_true)


def test_the_command_line_takes_names_with_commas_and_refuses_others(bench_here, project):
    shown = bench_here("plan", "--metrics", "ap,drop", "--origins", cwd=project).stdout
    assert "['ap', 'drop']" in shown
    assert "--metrics" in shown
    refused = bench_here("plan", "--metrics", "ap,dorp", cwd=project)
    assert refused.returncode == 2
    assert "Did you mean 'drop'" in refused.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_metrics_tells_of_every_measure(name):
    measure = MEASURES[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {measure.passes} |" in row
    for column in measure.columns:
        if not column.name.startswith("au_"):
            assert f"`{column.name}` {'↑' if column.better == 'higher' else '↓'}" in row
