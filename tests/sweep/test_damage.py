"""A damaged file of a results folder costs its own cell: it is named, done again or left out, and what was there is kept."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from bench.sweep.store import Store, read_marker, read_records
from bench.training import trainer
from bench.training.trainer import read_trained, selected_weights

ONE = {"run__methods": ["cam", "gradcam"], "run__guidance": ["none"], "train__epochs": 1}


@pytest.fixture
def finished(go, project):
    """The results of one training and two read-outs."""
    assert len(go(**ONE).ran) == 2
    return project / "results"


def files(results, name):
    return sorted(results.glob(f"cells/**/{name}"))


def weights(results):
    return {record.cell.method: record.weights_sha256 for _, record in read_records(results)}


@pytest.mark.parametrize("content", [b"", b'{"key": "cut off', b"[]"])
def test_a_damaged_record_is_named_and_its_cell_is_done_again(go, finished, caplog, content):
    before = weights(finished)
    path = files(finished, "record.json")[0]
    path.write_bytes(content)
    outcome = go(**ONE)
    assert [cell.method for cell in outcome.ran] == ["cam"]
    assert outcome.trained == 0
    assert str(path.relative_to(finished.parent)) in caplog.text
    assert weights(finished) == before
    assert (finished / "damaged" / path.relative_to(finished)).read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{}", b'{"best": 1'])
def test_a_damaged_end_of_a_training_is_named_and_it_is_trained_again(go, finished, caplog, content):
    before = weights(finished)
    (path,) = finished.glob("trainings/*/trained.json")
    path.write_bytes(content)
    files(finished, "DONE")[0].unlink()
    outcome = go(**ONE)
    assert (len(outcome.ran), outcome.trained) == (1, 1)
    assert str(path.relative_to(finished.parent)) in caplog.text
    assert weights(finished) == before
    assert (finished / "damaged" / path.relative_to(finished)).read_bytes() == content


def test_a_finished_training_that_is_damaged_does_not_stop_a_run_that_needs_nothing_of_it(go, finished):
    (path,) = finished.glob("trainings/*/trained.json")
    path.write_bytes(b"")
    assert go(**ONE).ran == ()


@pytest.mark.parametrize("command", [("leaderboard",), ("status", "--methods", "cam,gradcam"), ("plan", "--methods", "cam,gradcam")])
def test_commands_that_look_at_results_go_on_and_name_the_file(bench_here, finished, caplog, command):
    path = files(finished, "record.json")[0]
    path.write_bytes(b"")
    done = bench_here(*command, "--set", "run.guidance=['none']", "--set", "train.epochs=1", cwd=finished.parent)
    assert done.returncode == 0, done.stderr
    assert str(path.relative_to(finished.parent)) in caplog.text
    assert "Grad-CAM" in done.stdout or "gradcam" in done.stdout


def test_reading_strictly_names_the_file_and_what_to_do(finished):
    path = files(finished, "record.json")[0]
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"record\.json is not a readable record: .*Remove .*DONE; then bench run"):
        list(read_records(finished, strict=True))


def test_a_marker_tells_key_and_size_so_that_no_record_is_read(finished, monkeypatch):
    (folder, record), *_ = read_records(finished)
    marker = read_marker(folder)
    assert (marker.key, marker.record_bytes) == (record.key, (folder / "record.json").stat().st_size)
    monkeypatch.setattr(json, "loads", None)
    assert Store(finished).is_done(record.as_cell)


def test_a_marker_of_an_older_version_still_counts(finished):
    (folder, record), *_ = read_records(finished)
    (folder / "DONE").write_text(read_marker(folder).record_sha256 + "\n")
    assert Store(finished).is_done(record.as_cell)


@pytest.mark.parametrize("content", ["", "{}", '{"training": 1', "[1]"])
def test_a_damaged_trained_json_is_told_with_its_path(tmp_path, content):
    (tmp_path / "trained.json").write_text(content)
    with pytest.raises(ValueError, match=r"trained\.json is damaged: .*bench run trains it again"):
        read_trained(tmp_path)


# Checkpoints and best weights. Four steps an epoch, and a checkpoint after each.

LONG = {"run__guidance": ["none"], "train__epochs": 4}


@pytest.fixture
def fail_at(go, project, monkeypatch):
    """Run until a step fails; returns the folder of the training."""
    real = trainer._Trainer._step

    def run(number):
        def step(self, raw):
            if len(self.progress.losses) + len(self._pending) + 1 == number:
                raise RuntimeError("no")
            return real(self, raw)

        with monkeypatch.context() as patch:
            patch.setattr(trainer._Trainer, "_step", step)
            assert go(**LONG).failed
        (folder,) = (project / "results" / "trainings").iterdir()
        return folder

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(folder):
    (folder / "model.safetensors").write_bytes(b"cut")


def test_after_damaged_checkpoints_the_new_ones_are_gone_on_from(go, fail_at, caplog):
    folder = fail_at(14)
    for path in (folder / "checkpoints").iterdir():
        damage(path)
    fail_at(6)
    assert names(folder / "checkpoints") == ["00000004", "aside-00000008", "aside-00000012", "aside-best"]
    with caplog.at_level(logging.INFO):
        assert not go(**LONG).failed
    assert "resumed at step 4" in caplog.text
    assert not (folder / "checkpoints").exists()


def test_best_weights_of_an_earlier_try_do_not_push_out_those_of_this_one(go, fail_at):
    folder = fail_at(6)
    shutil.rmtree(folder / "checkpoints")
    for epoch in (5, 6, 7):
        shutil.copytree(folder / "best" / "00000001", folder / "best" / f"{epoch:08d}")
    assert not go(**LONG).failed
    assert selected_weights(folder).is_dir()
    assert not any((folder / "best" / f"{epoch:08d}").exists() for epoch in (5, 6, 7))


def test_best_holds_what_the_checkpoints_name_and_no_more(fail_at):
    folder = fail_at(14)
    named = {json.loads((path / "state.json").read_text())["best"]["folder"] for path in (folder / "checkpoints").iterdir()}
    assert set(names(folder / "best")) == named


def test_a_checkpoint_whose_best_weights_are_lost_is_not_gone_on_from(go, fail_at, caplog):
    folder = fail_at(6)
    damage(folder / "best" / "00000001")
    assert not go(**LONG).failed
    assert "00000004 is of no use without its best weights" in caplog.text


def test_a_finished_training_whose_weights_are_damaged_is_trained_again(go, finished, caplog):
    before = weights(finished)
    (folder,) = (finished / "trainings").iterdir()
    damage(selected_weights(folder))
    files(finished, "DONE")[0].unlink()
    outcome = go(**ONE)
    assert (outcome.failed, len(outcome.ran), outcome.trained) == ({}, 1, 1)
    assert "model.safetensors has another sha256; bench run trains it again" in caplog.text
    assert weights(finished) == before
    assert (finished / "damaged" / "trainings" / folder.name / "trained.json").is_file()


def test_weights_that_may_not_be_read_fail_the_cell_and_stay_where_they_are(go, finished, monkeypatch):
    (folder,) = (finished / "trainings").iterdir()
    files(finished, "DONE")[0].unlink()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bench.training.checkpoint.file_sha256", refuse)
    (reason,) = go(**ONE).failed.values()
    assert "cannot be read: Permission denied" in reason
    assert "damaged" not in reason
    assert selected_weights(folder).is_dir()
