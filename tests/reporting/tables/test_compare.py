from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import multitest

from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows, write_rows
from bench.evaluation.statistics import clustered_mcnemar
from bench.matrix import digest
from bench.reporting.tables.compare import compare, find_side, match
from bench.reporting.tables.compare_text import names, sentence, sentences

from .test_leaderboard import record

N, CLASSES = 600, ("neutral", "happiness", "fear")
LABELS = np.arange(N) % 3


def cell(root, *, method="cam", guidance="none", seed=0, accuracy=0.7, cosine=0.5, people=None, draw=None, keys="same", **facts):
    """A finished cell with independent hits, and cosines with a spread of 0.1."""
    rng = np.random.default_rng(digest([method, guidance, seed]).encode()[0] if draw is None else draw)
    predicted = np.where(rng.random(N) < accuracy, LABELS, (LABELS + 1) % 3)
    cosines = np.where(LABELS > 0, cosine + 0.1 * rng.standard_normal(N), np.nan).astype(np.float32)
    rows = Rows(
        keys=[f"{i:04d}" for i in range(N)],
        labels=LABELS,
        people=np.full(N, -1) if people is None else people,
        logits=np.eye(3, dtype=np.float32)[predicted],
        au_valid=LABELS > 0,
        attention_cosines={5: cosines},
        map_cosines_true=cosines,
        map_cosines_predicted=cosines,
    )
    filed = record(method=method, guidance=guidance, seed=seed, **facts)
    filed = filed.model_copy(
        update={
            "key": digest([method, guidance, seed, facts]),
            "training_key": digest([method, guidance, seed, facts]),
            "metrics": compute_metrics(rows, classes=CLASSES, expressive=[False, True, True]),
            "data": filed.data.model_copy(update={"samples": N, "classes": CLASSES, "keys_sha256": keys}),
        }
    )
    folder = root / "cells" / filed.key[:8]
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(filed.model_dump_json())
    write_rows(folder / "samples.parquet", rows)
    (folder / "DONE").touch()
    return folder


def compared(root, a, b, *, classes=True):
    matched, alone = match(find_side(str(a), results=root), find_side(str(b), results=root))
    return compare(matched), alone


def hits(folder):
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "samples.parquet")
    return table["label"].to_numpy() == table["predicted"].to_numpy(), table["map_cosine_true"].to_numpy()


def test_accuracy_of_one_seed_is_compared_by_the_exact_mcnemar_test(tmp_path):
    a, b = cell(tmp_path, method="cam", accuracy=0.75), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    (hits_a, _), (hits_b, _) = hits(a), hits(b)
    only = int((hits_a & ~hits_b).sum()), int((hits_b & ~hits_a).sum())
    difference = comparison.differences["cl"]
    assert difference.difference == pytest.approx((only[0] - only[1]) / N)
    assert difference.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert difference.test == "exact McNemar"


def test_accuracy_of_one_seed_is_compared_over_people_where_they_are_known(tmp_path):
    people = np.arange(N) // 20
    a, b = (cell(tmp_path, method=method, accuracy=a, people=people) for method, a in (("cam", 0.75), ("acol", 0.7)))
    ((comparison,), _) = compared(tmp_path, a, b)
    differences = (hits(a)[0].astype(int) - hits(b)[0]).reshape(-1, 20).sum(axis=1)
    difference = comparison.differences["cl"]
    assert difference.p == pytest.approx(clustered_mcnemar(differences))
    assert (difference.test, difference.units) == ("exact McNemar over people", N // 20)


def test_cosines_of_one_seed_agree_with_the_paired_t_test(tmp_path):
    a, b = cell(tmp_path, method="cam", cosine=0.52), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    of_samples = hits(a)[1][LABELS > 0] - hits(b)[1][LABELS > 0]
    expected = stats.ttest_1samp(of_samples, 0)
    difference = comparison.differences["cam_cos"]
    assert difference.difference == pytest.approx(of_samples.mean(), abs=1e-6)
    assert difference.interval == pytest.approx(tuple(expected.confidence_interval()), abs=0.002)
    assert difference.samples == 400


def test_over_seeds_the_wider_interval_and_the_larger_p_count(tmp_path):
    """Far from each other on the samples of each seed, but the sign changes with the seed."""
    for seed, (cosine_a, cosine_b) in enumerate(((0.6, 0.5), (0.4, 0.58), (0.6, 0.5))):
        cell(tmp_path, method="cam", seed=seed, cosine=cosine_a)
        cell(tmp_path, method="acol", seed=seed, cosine=cosine_b)
    ((comparison,), _) = compared(tmp_path, "cam", "acol")
    difference = comparison.differences["cam_cos"]
    assert comparison.seeds == (0, 1, 2)
    assert difference.p > 0.5
    assert difference.interval.low < -0.3
    assert difference.smallest == pytest.approx(difference.interval.high - difference.difference)


def test_the_p_values_of_all_that_is_asked_are_corrected_together(tmp_path):
    a, b = cell(tmp_path, method="cam", accuracy=0.75, cosine=0.51), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    for family in (list(comparison.differences.values()), [d for by_class in comparison.per_class.values() for d in by_class.values()]):
        expected = multitest.multipletests([difference.p for difference in family], method="holm")[1]
        assert [difference.p_holm for difference in family] == pytest.approx(list(expected))
    assert {metric: set(by_class) for metric, by_class in comparison.per_class.items()} == {
        "cl": set(CLASSES),
        "cam_cos": {"happiness", "fear"},
        "att_cos": {"happiness", "fear"},
    }


def test_a_class_is_compared_on_its_own_samples(tmp_path):
    a, b = cell(tmp_path, method="cam", accuracy=0.8), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    fear = LABELS == 2
    difference = comparison.per_class["cl"]["fear"]
    assert difference.samples == 200
    assert (difference.a, difference.b) == pytest.approx((hits(a)[0][fear].mean(), hits(b)[0][fear].mean()))


def test_a_difference_is_said_in_a_sentence_to_quote(tmp_path):
    people = np.repeat(np.arange(60), 10)
    for seed in range(3):
        for guidance, accuracy in (("none", 0.5), ("au", 0.9)):
            cell(tmp_path, guidance=guidance, seed=seed, accuracy=accuracy, people=people)
    ((comparison,), _) = compared(tmp_path, "cam/au", "cam/none")
    difference = comparison.differences["cl"]
    low, high = (f"{100 * end:.1f}" for end in difference.interval)
    assert difference.p_holm < 0.001
    assert sentence(comparison, "cl") == (
        f"CAM with AU guidance is {100 * difference.difference:.1f} points more accurate than without "
        f"(95% interval {low} to {high}, p < 0.001, 600 pictures of 60 people, 3 seeds)."
    )


def test_a_difference_that_is_not_significant_is_given_with_the_smallest_that_would_be(tmp_path):
    a, b = cell(tmp_path, method="cam"), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    assert comparison.differences["cl"].significant is False
    text = sentence(comparison, "cl")
    assert "CAM and ACoL do not differ significantly in accuracy" in text
    assert f"A difference must be at least {100 * comparison.differences['cl'].smallest:.1f} points to be significant here" in text


def test_one_network_read_out_twice_is_equal_sample_by_sample(tmp_path):
    a, b = cell(tmp_path, method="cam", draw=5), cell(tmp_path, method="layercam", draw=5)
    ((comparison,), _) = compared(tmp_path, a, b)
    assert sentence(comparison, "cl") == "CAM and LayerCAM are equal in accuracy on every sample (600 pictures, 1 seed)."


def test_a_unanimous_difference_of_few_people_is_not_certain(tmp_path):
    """Without spread there is no standard error; that three people agree happens by chance in one of four cases."""
    people = np.repeat(np.arange(3), 200)
    pair = [cell(tmp_path, method=m, seed=s, accuracy=a, people=people) for m, a in (("cam", 1.0), ("acol", 0.0)) for s in range(2)]
    ((comparison,), _) = compared(tmp_path, "cam", "acol")
    assert len(pair) == 4
    assert comparison.differences["cl"].p == 0.25


def test_results_folders_are_matched_cell_by_cell(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for root, accuracy in ((old, 0.5), (new, 0.9)):
        for guidance in ("none", "au"):
            cell(root, guidance=guidance, accuracy=accuracy, lr=accuracy)
    cell(new, method="acol")
    comparisons, alone = compared(tmp_path, new, old)
    assert {names(comparison).both.split(", ")[1] for comparison in comparisons} == {"with AU guidance", "without AU guidance"}
    assert alone == 1
    assert all(comparison.differences["cl"].difference > 0.3 for comparison in comparisons)
    assert names(comparisons[0])[:2] == ("CAM in A", "CAM in B")
    assert "They also differ in: train.lr 0.9 / 0.5." in sentences(comparisons[0])


def test_protocol_and_variant_are_said_where_they_differ(tmp_path):
    cell(tmp_path, variant="official")
    cell(tmp_path, protocol="test-selected")
    ((comparison,), _) = compared(tmp_path, "variant=official", "test-selected")
    assert names(comparison)[:2] == ("CAM in variant official by protocol val", "CAM in variant paper by protocol test-selected")


def test_a_batch_dependent_side_is_said(tmp_path):
    a, b = cell(tmp_path, invariance={"holds": False}), cell(tmp_path, method="acol")
    ((comparison,), _) = compared(tmp_path, a, b)
    assert any(words.startswith("Logits or maps of CAM change") for words in sentences(comparison))


@pytest.mark.parametrize("facts", [{"keys": "other"}, {"fingerprint": "e" * 64}])
def test_cells_tested_on_different_data_are_refused(tmp_path, facts):
    a, b = cell(tmp_path), cell(tmp_path, method="acol", **facts)
    with pytest.raises(ValueError, match="not tested on the same data"):
        compared(tmp_path, a, b)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("camm", "acol", r"no cell has the value 'camm'. Did you mean 'cam'"),
        ("methd=cam", "acol", r"unknown coordinate 'methd'. Did you mean 'method'"),
        ("method=acool", "acol", r"no cell has method=acool. Did you mean 'acol'"),
        ("cam,method=cam", "acol", "gives two values of method"),
        ("cam", "cam/none", "is on both sides of the comparison"),
        ("acol/au", "cam", "has method=acol and guidance=au"),
        ("backbone=mini", "acol", "is on both sides of the comparison"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_could(tmp_path, a, b, message):
    cell(tmp_path)
    cell(tmp_path, guidance="au")
    cell(tmp_path, method="acol")
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, a, b)


def test_several_settings_of_one_cell_are_refused(tmp_path):
    cell(tmp_path, lr=0.1)
    cell(tmp_path, lr=0.2)
    cell(tmp_path, method="acol", lr=0.3)
    with pytest.raises(ValueError, match=r"no two agree in settings\. Select fewer cells on each side, or give the paths of two"):
        compared(tmp_path, "cam", "acol")


def test_two_runs_of_one_seed_are_both_named(tmp_path):
    for place in ("here", "there"):
        cell(tmp_path / place)
    cell(tmp_path, method="acol")
    with pytest.raises(ValueError, match=r"have the same seed: .*/here/.* and .*/there/.*\. Add coordinates"):
        compared(tmp_path, "cam", "acol")


def test_the_command_prints_words_table_and_json(tmp_path, bench_here):
    cell(tmp_path / "results", accuracy=0.9)
    cell(tmp_path / "results", method="acol", accuracy=0.5)
    shown = bench_here("compare", "cam", "acol", cwd=tmp_path)
    assert shown.returncode == 0
    assert "points more accurate than ACoL" in shown.stdout
    assert "happiness" in shown.stdout
    markdown = bench_here("compare", "cam", "acol", "--format", "md", "--no-classes", cwd=tmp_path).stdout
    assert "### CAM against ACoL: faces, without AU guidance, on mini" in markdown
    assert "happiness" not in markdown
    plain = json.loads(bench_here("compare", "cam", "acol", "--format", "json", cwd=tmp_path).stdout)
    assert plain["comparisons"][0]["differences"]["cl"]["told_apart"] is True
    assert "neutral" in plain["comparisons"][0]["per_class"]["cl"]
    assert bench_here("compare", "camm", "acol", cwd=tmp_path).returncode == 2
