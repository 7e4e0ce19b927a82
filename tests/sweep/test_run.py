"""A run as its user sees it: records, skipping, failing, resuming; in one process on tiny faces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.config import load_settings
from bench.evaluation.metrics import compute_metrics
from bench.method import METHODS
from bench.methods.cam import CAM
from bench.sweep import run as run_module
from bench.sweep.plan import make_plan
from bench.sweep.store import read_cell_rows, read_records
from bench.training import trainer


@pytest.fixture
def results(project):
    return project / "results"


def records(results):
    return [record for _, record in read_records(results)]


def test_a_run_leaves_a_record_a_cell_with_rows_that_give_its_metrics(go, results):
    outcome = go()
    assert (len(outcome.ran), outcome.trained, outcome.failed) == (2, 2, {})
    for folder, record in read_records(results):
        rows = read_cell_rows(folder)
        expressive = [name != "neutral" for name in record.data.classes]
        assert compute_metrics(rows, classes=record.data.classes, expressive=expressive) == record.metrics
        assert len(rows.keys) == record.data.samples == 27
        assert record.metrics["cl"]["accuracy"] == np.mean(rows.predicted == rows.labels)
        assert set(record.metrics["att_cos"]) == {"1", "2", "3", "4", "5"}


def test_running_again_does_nothing(go, results):
    go()
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    outcome = go()
    assert (len(outcome.ran), len(outcome.skipped), outcome.trained) == (0, 2, 0)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()} == before


def test_a_dataset_may_be_given_by_its_folder(go):
    go(run__guidance=["none"])  # prepares it
    (source,) = make_plan(load_settings(environ={}, flags={})).sources.values()
    outcome = go(run__guidance=["none"], run__datasets=[str(source.folder)], run__results="others")
    assert (len(outcome.ran), outcome.failed) == (1, {})


def test_only_what_is_missing_is_done(go, results):
    go(run__guidance=["none"])
    outcome = go(run__seeds=[0, 1])
    assert (len(outcome.ran), len(outcome.skipped), outcome.trained) == (3, 1, 3)


def test_a_changed_setting_is_another_cell(go, results):
    go(run__guidance=["none"])
    assert len(go(run__guidance=["none"], train__lr=0.001).ran) == 1
    assert len(records(results)) == 2


def test_a_setting_that_cannot_change_a_result_is_the_same_cell(go):
    go(run__guidance=["none"])
    assert len(go(run__guidance=["none"], loader__cache_gib=0.0, evaluation__batch_size=5).skipped) == 1


def test_the_same_run_twice_gives_the_same_weights_and_rows(go, results, tmp_path):
    go()
    first = records(results)
    go(run__results=tmp_path / "again")
    for a, b in zip(first, records(tmp_path / "again"), strict=True):
        assert (a.weights_sha256, a.rows_sha256, a.metrics) == (b.weights_sha256, b.rows_sha256, b.metrics)
        assert (a.maps_sha256, a.invariance) == (b.maps_sha256, b.invariance)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_no_figure_depends_on_the_batch_size_of_the_evaluation(go, results, tmp_path, batch_size):
    go(run__guidance=["au"], evaluation__batch_size=9)
    go(run__guidance=["au"], evaluation__batch_size=batch_size, run__results=tmp_path / "other")
    (a,), (b,) = list(read_records(results)), list(read_records(tmp_path / "other"))
    rows_a, rows_b = read_cell_rows(a[0]), read_cell_rows(b[0])
    assert rows_a.keys == rows_b.keys
    np.testing.assert_allclose(rows_a.logits, rows_b.logits, atol=1e-5)
    np.testing.assert_allclose(rows_a.map_cosines_true, rows_b.map_cosines_true, atol=1e-5)


def test_an_interrupted_training_goes_on_and_ends_the_same(go, results, tmp_path, monkeypatch):
    go(run__guidance=["au"], run__results=tmp_path / "undisturbed", train__checkpoint_minutes=0.0)
    real, calls = trainer._Trainer._step, 0

    def step(self, raw):
        nonlocal calls
        calls += 1
        if calls == 7:  # in the second epoch
            raise KeyboardInterrupt
        return real(self, raw)

    monkeypatch.setattr(trainer._Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        go(run__guidance=["au"], train__checkpoint_minutes=0.0)
    assert not list(read_records(results))
    go(run__guidance=["au"], train__checkpoint_minutes=0.0)
    assert calls == 7 + 4  # the second start goes on from the end of the first epoch
    (a,), (b,) = records(results), records(tmp_path / "undisturbed")
    assert (a.weights_sha256, a.rows_sha256) == (b.weights_sha256, b.rows_sha256)
    assert [e["classification"] for e in a.epochs] == [e["classification"] for e in b.epochs]


def test_a_training_resumes_in_the_middle_of_an_epoch_bit_for_bit(go, results, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECK_EVERY", 1)
    go(run__guidance=["none"], run__results=tmp_path / "undisturbed", train__checkpoint_minutes=0.0)
    real, calls = trainer._Trainer._step, 0

    def step(self, raw):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(self, raw)

    monkeypatch.setattr(trainer._Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        go(run__guidance=["none"], train__checkpoint_minutes=0.0)
    go(run__guidance=["none"], train__checkpoint_minutes=0.0)
    assert calls == 3 + 6
    (a,), (b,) = records(results), records(tmp_path / "undisturbed")
    assert (a.weights_sha256, a.rows_sha256) == (b.weights_sha256, b.rows_sha256)


def test_a_diverged_training_is_recorded_with_its_step_and_the_others_go_on(go, results, monkeypatch):
    real = trainer._Trainer._step

    def step(self, raw):
        losses = real(self, raw)
        return losses * float("nan") if self.training.guidance == "au" and self.progress.step == 2 else losses

    monkeypatch.setattr(trainer._Trainer, "_step", step)
    outcome = go()
    assert [cell.training.guidance for cell in outcome.ran] == ["none"]
    assert "not finite at step 3" in outcome.failed["synthetic/mini/cam/au/seed0"]
    (failure,) = (results / "failures").rglob("*.json")
    assert "DivergedError" in json.loads(failure.read_text())["error"]


def test_a_failed_cell_is_tried_again_and_its_failure_forgotten(go, results, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train", lambda *_, **__: 1 / 0)
        assert len(go().failed) == 2
    assert go().failed == {}
    assert not list((results / "failures").rglob("*.json"))


@pytest.fixture
def broken_read_out():
    @METHODS.register("broken-test", title="Broken", kind="posthoc", trains_as="cam")
    class Broken(CAM):
        def maps(self, classifier, output, classes):
            if len(classes) > 2:  # not in the trial of the plan
                raise RuntimeError("no map today")
            return super().maps(classifier, output, classes)

    yield
    METHODS._entries.pop("broken-test")


def test_a_read_out_that_fails_leaves_the_others_of_its_training_alone(go, results, broken_read_out):
    outcome = go(run__methods=["cam", "broken-test"], run__guidance=["none"])
    assert outcome.trained == 1
    assert [cell.method for cell in outcome.ran] == ["cam"]
    assert outcome.failed == {"synthetic/mini/broken-test/none/seed0": "RuntimeError: no map today"}


def test_a_read_out_that_gives_nan_fails_with_their_number_and_leaves_the_others_alone(go, results):
    @METHODS.register("nan-test", title="NaN", kind="posthoc", trains_as="cam", in_all=False)
    class Spoiled(CAM):
        def maps(self, classifier, output, classes):
            return super().maps(classifier, output, classes) * (float("nan") if len(classes) > 2 else 1)

    try:
        outcome = go(run__methods=["cam", "nan-test"], run__guidance=["none"])
    finally:
        METHODS._entries.pop("nan-test")
    assert [cell.method for cell in outcome.ran] == ["cam"]
    (error,) = outcome.failed.values()
    assert error.startswith("UnusableMapsError: maps of 27 of 27 samples hold NaN or infinite values, the first that of sample 00000000-")
    assert [record.cell.method for record in records(results)] == ["cam"]


def test_a_cell_without_its_marker_is_not_a_result(go, results):
    go(run__guidance=["none"])
    (marker,) = results.rglob("DONE")
    marker.unlink()
    assert records(results) == []
    outcome = go(run__guidance=["none"])
    assert (len(outcome.ran), outcome.trained) == (1, 0)  # evaluated again, not trained again


def test_a_post_hoc_method_shares_the_training_of_its_base(go, results):
    @METHODS.register("abs-cam-test", title="AbsCAM", kind="posthoc", trains_as="cam")
    class AbsCAM(CAM):
        def maps(self, classifier, output, classes):
            return super().maps(classifier, output, classes).abs()

    try:
        outcome = go(run__methods=["cam", "abs-cam-test"], run__guidance=["none"])
        cam, absolute = sorted(records(results), key=lambda r: r.cell.method, reverse=True)
    finally:
        METHODS._entries.pop("abs-cam-test")
    assert (len(outcome.ran), outcome.trained) == (2, 1)
    assert cam.weights_sha256 == absolute.weights_sha256
    assert cam.metrics["cl"] == absolute.metrics["cl"]
    assert cam.metrics["cam_cos"] != absolute.metrics["cam_cos"]


def test_the_test_selected_protocol_selects_on_test_and_says_so(go, results):
    go(run__guidance=["none"], run__protocol="test-selected")
    (record,) = records(results)
    assert record.protocol == "test-selected"
    assert record.selection["accuracy"] == pytest.approx(record.metrics["cl"]["accuracy"])


def test_a_layer_that_a_network_without_guidance_lacks_leaves_it_its_own(go, results):
    outcome = go(run__guidance=["none"], guidance__layers=[9])
    assert outcome.failed == {}
    assert records(results)[0].attention_layer == 5


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(go, results, tmp_path):
    go(run__guidance=["au"], run__results=tmp_path / "whole")
    go(run__guidance=["au"], run__results=tmp_path / "parts", train__accumulate=3)
    whole, parts = ([json.loads(p.read_text())["losses"] for p in (tmp_path / name).rglob("trained.json")] for name in ("whole", "parts"))
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)


def test_bf16_trains_and_evaluates_in_float32(go, results):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        go(run__guidance=["au"], train__precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    ((folder, _),) = read_records(results)
    assert read_cell_rows(folder).logits.dtype == np.float32


def test_the_gallery_shows_faces_au_maps_and_the_maps_of_all_trained_cells(go, results):
    from bench.data.readers import open_reader
    from bench.reporting.pictures.gallery import choose_faces, draw_gallery

    go(run__guidance=["none"])
    plan = make_plan(load_settings(environ={}, flags={"run.guidance": ["none", "au"]}))
    reader = open_reader(plan.sources["synthetic"].folder, "test")
    faces = choose_faces(reader)
    assert len(faces.names) == 6
    assert "neutral" not in faces.names
    sheet = np.asarray(draw_gallery(plan, faces, reader, fingerprint=plan.matrix.cells[0].training.dataset.fingerprint, seed=0, cell=40))
    row = slice(36 + 2 * 43, 36 + 2 * 43 + 40)  # of CAM
    assert sheet[row, 92:132].std() > 10
    assert (sheet[row, 92 + 43 : 92 + 83] == 255).all()  # guidance au is not trained yet: blank
