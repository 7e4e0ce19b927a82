"""Datasets are told apart by their content, whatever they are called."""

from __future__ import annotations

import pytest

from bench.cli.plan import show_plan
from bench.config import ConfigError, load_settings
from bench.matrix import DatasetRef, tell_apart
from bench.prepare.pack import prepare
from bench.sweep.plan import make_plan
from bench.sweep.store import read_records


def reference(name, fingerprint):
    return DatasetRef(name=name, entry="folder", fingerprint=fingerprint, samples={"train": 100, "val": 10, "test": 10})


@pytest.fixture
def twins(project):
    """Paths of two prepared datasets of one name and size, and other pictures."""
    paths = []
    for seed, name in enumerate("ab"):
        options = {"size": 36, "train": 48, "val": 14, "test": 27, "seed": seed}
        prepare("synthetic", name="faces", options=options, raw=None, out=project / name / "faces", workers=1)
        paths.append(f"{name}/faces")
    return paths


def test_a_name_that_is_enough_is_left_alone():
    labelled = tell_apart({"x": reference("x", "1" * 64), "y": reference("y", "2" * 64)})
    assert [dataset.shown for dataset in labelled.values()] == ["x", "y"]


def test_two_of_one_name_are_shown_with_their_fingerprints():
    labelled = tell_apart({"a/x": reference("x", "1" * 64), "b/x": reference("x", "2" * 64), "y": reference("y", "3" * 64)})
    assert [dataset.shown for dataset in labelled.values()] == ["x@11111111", "x@22222222", "y"]


def test_the_same_data_twice_is_refused_with_both_names():
    with pytest.raises(ConfigError, match=r"'a/x' and './a/x' are the same data"):
        tell_apart({"a/x": reference("x", "1" * 64), "./a/x": reference("x", "1" * 64)})


def test_a_label_is_no_part_of_a_key_or_a_path(twins):
    def cells(*datasets):
        return make_plan(load_settings(environ={}, flags={"run.datasets": datasets, "run.guidance": ["none"]})).matrix.cells

    (alone,) = cells(twins[1])
    _, together = cells(*twins)
    assert (alone.key, alone.path) == (together.key, together.path)
    assert alone.label != together.label


@pytest.fixture(autouse=True)
def _here(project, monkeypatch):
    monkeypatch.chdir(project)


def test_a_plan_says_which_is_which(twins, capsys):
    plan = make_plan(load_settings(environ={}, flags={"run.datasets": twins}))
    show_plan(plan)
    printed = capsys.readouterr().out
    for dataset, path in zip(dict.fromkeys(t.training.dataset.shown for t in plan.matrix.trainings), twins, strict=True):
        assert f"{dataset} is {path}" in printed


def test_each_is_trained_and_evaluated_on_its_own_pictures_and_stands_in_its_own_table(go, twins, bench_here, project):
    assert len(go(run__datasets=twins, run__guidance=["none"], train__epochs=1).ran) == 2
    records = [record for _, record in read_records(project / "results")]
    assert len({record.data.keys_sha256 for record in records}) == 2
    assert len({record.weights_sha256 for record in records}) == 2
    done = bench_here("leaderboard", cwd=project)
    assert done.stdout.count("faces@") >= 2
    assert bench_here("verify", "results", "--data", project / "a", cwd=project).returncode == 0


def test_datasets_that_are_still_to_be_prepared_have_keys_of_their_own(project):
    (project / "bench.toml").write_text(
        (project / "bench.toml").read_text()
        + """
[datasets.second]
entry = "synthetic"
size = 36
train = 48
val = 14
test = 27
seed = 1
"""
    )
    settings = load_settings(environ={}, flags={"run.datasets": ["synthetic", "second"], "run.data": project / "empty"})
    trainings = make_plan(settings).matrix.trainings
    assert len(trainings) == 4  # two datasets, without and with guidance


def test_a_folder_that_was_prepared_from_another_entry_is_refused(project, data_root):
    prepare(
        "synthetic",
        name="mine",
        options={"size": 36, "train": 48, "val": 14, "test": 27, "seed": 3},
        raw=None,
        out=project / "own" / "mine",
        workers=1,
    )
    settings = load_settings(
        environ={}, flags={"run.datasets": ["mine"], "run.data": project / "own", "datasets.mine.entry": "folder", "datasets.mine.raw": "."}
    )
    with pytest.raises(ConfigError, match=r"was prepared from the dataset 'synthetic', not from 'folder'"):
        make_plan(settings)
