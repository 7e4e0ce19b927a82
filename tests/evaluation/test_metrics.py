from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.dataset import EXPRESSIONS
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import Rows, read_columns, read_rows, write_rows

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cosines.npz", allow_pickle=False)
EXPRESSIVE = [name != "neutral" for name in EXPRESSIONS]


def make_rows(labels, *, predicted=None, cosines=None, valid=None) -> Rows:
    labels = np.asarray(labels, dtype=np.int64)
    n = len(labels)
    logits = np.zeros((n, 7), dtype=np.float32)
    logits[np.arange(n), labels if predicted is None else predicted] = 1
    cosines = np.full(n, 0.5, dtype=np.float32) if cosines is None else np.asarray(cosines, dtype=np.float32)
    valid = labels != 0 if valid is None else np.asarray(valid)
    values = np.where(valid, cosines, np.nan).astype(np.float32)
    return Rows(
        keys=[f"{i:08d}" for i in range(n)],
        labels=labels,
        people=np.full(n, -1),
        logits=logits,
        au_valid=valid,
        attention_cosines={5: values},
        map_cosines_true=values,
        map_cosines_predicted=values,
    )


def _golden_rows(drop: int | None = None) -> Rows:
    labels = [*GOLDEN["labels"].tolist(), 0, 1]
    cam, att = ([*GOLDEN[k].tolist(), 0.0, 0.0] for k in ("cam_cos", "att_cos"))
    valid = [True] * 11 + [False, False]
    keep = [i for i, label in enumerate(labels) if label != drop]
    rows = make_rows([labels[i] for i in keep], cosines=[cam[i] for i in keep], valid=[valid[i] for i in keep])
    attention = np.where(rows.au_valid, [att[i] for i in keep], np.nan).astype(np.float32)
    return Rows(**{f: getattr(rows, f) for f in rows.__slots__} | {"attention_cosines": {5: attention}})


def test_per_class_and_macro_cosines_agree_with_the_published_code():
    metrics = compute_metrics(_golden_rows(), classes=EXPRESSIONS, expressive=EXPRESSIVE)
    assert metrics["cam_cos"]["true"]["macro"] == pytest.approx(float(GOLDEN["set_macro6_att_cam"][1]), abs=1e-4)
    assert metrics["att_cos"]["5"]["macro"] == pytest.approx(float(GOLDEN["set_macro6_att_cam"][0]), abs=1e-4)
    for label, name in enumerate(EXPRESSIONS[1:], start=1):
        assert metrics["cam_cos"]["true"]["per_class"][name]["mean"] == pytest.approx(
            float(GOLDEN["set_per_class_att_cam"][label, 1]), abs=1e-4
        )
        assert metrics["cam_cos"]["true"]["per_class"][name]["samples"] == int(GOLDEN["set_counts"][label])


def test_a_class_without_samples_is_left_out_and_named():
    missing = int(GOLDEN["missing_class"])
    metrics = compute_metrics(_golden_rows(drop=missing), classes=EXPRESSIONS, expressive=EXPRESSIVE)["cam_cos"]["true"]
    means = [float(GOLDEN["missing_per_class_att_cam"][c, 1]) for c in range(1, 7) if c != missing]
    assert metrics["missing_classes"] == [EXPRESSIONS[missing]]
    assert metrics["macro"] == pytest.approx(np.mean(means), abs=1e-4)
    assert metrics["macro"] != pytest.approx(float(GOLDEN["missing_macro6_att_cam"][1]), abs=1e-3)  # published: a -1 is averaged in


def test_samples_without_a_map_are_counted_not_averaged():
    metrics = compute_metrics(
        make_rows([1, 1, 2], cosines=[0.2, 0.9, 0.4], valid=[True, False, True]), classes=EXPRESSIONS, expressive=EXPRESSIVE
    )
    summary = metrics["cam_cos"]["true"]
    assert summary["without_map"] == 1
    assert summary["per_class"]["happiness"] == {"samples": 1, "mean": pytest.approx(0.2)}


def test_accuracy_class_mean_and_confusion():
    metrics = compute_metrics(make_rows([0, 0, 0, 1], predicted=[0, 0, 1, 1]), classes=EXPRESSIONS, expressive=EXPRESSIVE)["cl"]
    assert metrics["accuracy"] == 0.75
    assert metrics["class_mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["confusion"][0][:2] == [2, 1]
    assert metrics["missing_classes"] == list(EXPRESSIONS[2:])


def test_rows_survive_the_disk_and_give_the_same_metrics(tmp_path):
    rows = _golden_rows()
    write_rows(tmp_path / "rows.parquet", rows)
    again = read_rows(tmp_path / "rows.parquet")
    assert compute_metrics(again, classes=EXPRESSIONS, expressive=EXPRESSIVE) == compute_metrics(
        rows, classes=EXPRESSIONS, expressive=EXPRESSIVE
    )


def test_a_damaged_file_of_rows_is_an_error_that_names_it(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"rows\.parquet"):
        read_rows(tmp_path / "rows.parquet")


def test_rows_in_a_folder_whose_name_looks_like_an_address_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("exp:1") / "re[s]1"
    folder.mkdir(parents=True)
    write_rows(folder / "rows.parquet", _golden_rows())
    assert list(read_rows(folder / "rows.parquet").keys) == list(_golden_rows().keys)
    assert len(read_columns(folder / "rows.parquet", ["label"])["label"]) == len(_golden_rows().keys)
