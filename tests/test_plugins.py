"""Entries from outside the project: a real package, installed; a file given on the command line."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.audit.verify import verify
from bench.method import METHODS
from bench.registry import load_plugin
from bench.reporting.tables.evidence import load_runs
from bench.reporting.tables.leaderboard import build_tables
from bench.sweep.restore import restore
from bench.sweep.store import read_records

PACKAGE = Path(__file__).parent / "plugin_package"


def install(source: Path, target: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "--target",
            target,
            source,
        ],
        check=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source)
    target = tmp_path_factory.mktemp("site")
    install(source, target)
    return target


@pytest.mark.slow
def test_an_installed_package_adds_a_method_that_runs(installed, project, run_bench):
    env = {"PYTHONPATH": str(installed)}
    listed = json.loads(run_bench("list", "methods", "--format", "json", env=env).stdout)
    assert next(e for e in listed if e["name"] == "edge-cam")["trains_as"] == "cam"
    done = run_bench("run", "--methods", "cam,edge-cam", "--guidance", "none", "--seeds", "0", cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    assert "EdgeCAM" in done.stdout
    assert "2 cells done" in done.stdout
    assert "1 trainings" in done.stdout


@pytest.mark.slow
def test_two_packages_with_one_name_are_an_error_with_both_origins(installed, tmp_path, run_bench):
    source = tmp_path / "other"
    shutil.copytree(PACKAGE, source)
    text = (source / "pyproject.toml").read_text().replace('"bench-edge-cam"', '"bench-other"').replace('"bench_edge_cam"', '"bench_other"')
    (source / "pyproject.toml").write_text(text)
    (source / "bench_edge_cam.py").rename(source / "bench_other.py")
    install(source, tmp_path / "site")
    done = run_bench("list", "methods", env={"PYTHONPATH": f"{installed}:{tmp_path / 'site'}"})
    assert done.returncode == 2
    assert "defined twice" in done.stderr
    assert "bench-edge-cam" in done.stderr
    assert "bench-other" in done.stderr


@pytest.mark.slow
def test_a_file_on_the_command_line_adds_a_method_that_runs(project, run_bench):
    done = run_bench(
        "run", "--plugin", PACKAGE / "bench_edge_cam.py", "--methods", "edge-cam", "--guidance", "none", "--seeds", "0", cwd=project
    )
    assert done.returncode == 0, done.stderr
    assert "EdgeCAM" in done.stdout


def sharp(sign="", scale="1.0"):
    return f"""
from bench.method import METHODS
from bench.methods.cam import CAM, GAPClassifier

class Head(GAPClassifier):
    def forward(self, images, labels=None):
        output = super().forward(images, labels)
        output.logits = output.logits * {scale}
        return output

@METHODS.register("own-head", title="OwnHead", kind="trained", in_all=False)
class OwnHead(CAM):
    def classifier(self, backbone, *, num_classes):
        return Head(backbone, num_classes=num_classes)

@METHODS.register("own-map", title="OwnMap", kind="posthoc", trains_as="cam", in_all=False)
class OwnMap(CAM):
    def maps(self, classifier, output, classes):
        return {sign}super().maps(classifier, output, classes)
"""


@pytest.fixture
def load_own(project):
    """Register the two methods of a plugin file of some content, in the place of those before."""
    number = itertools.count()

    def forget():
        for name in ("own-map", "own-head"):
            METHODS._entries.pop(name, None)

    def load(content):
        forget()
        # A process loads a file once: another content in the same place is another process's.
        file = project / f"own{next(number)}.py"
        file.write_text(content)
        load_plugin(str(file))

    yield load
    forget()


@pytest.fixture
def run_own(load_own, go):
    """Run them beside CAM."""

    def run(content):
        load_own(content)
        return go(run__methods=["cam", "own-map", "own-head"], run__guidance=["none"], train__epochs=1)

    return run


def figures(project):
    (table,) = build_tables(load_runs(project / "results"))
    return {row.method: row.stats["cam_cos", "none"].values for row in table.rows}, table.notes


def test_a_changed_plugin_is_another_cell_and_the_table_shows_the_latest(run_own, project):
    assert len(run_own(sharp()).ran) == 3
    before, _ = figures(project)
    again = run_own(sharp(sign="-"))
    assert sorted(cell.method for cell in again.ran) == ["own-head", "own-map"]  # they are of one file
    after, notes = figures(project)
    assert before["own-map"] != after["own-map"]
    assert (before["cam"], before["own-head"]) == (after["cam"], after["own-head"])
    assert "1 records of own-map were left out: they are not of its latest code" in notes


def test_the_same_plugin_again_has_nothing_to_do(run_own):
    run_own(sharp())
    assert run_own(sharp()).ran == ()


def test_code_that_trains_is_part_of_the_trainings_key_and_code_that_reads_of_the_cells(run_own, project):
    run_own(sharp())
    run_own(sharp(scale="2.0"))
    records = [record for _, record in read_records(project / "results")]
    assert len({record.training_key for record in records if record.trains_as == "cam"}) == 1
    assert len({record.training_key for record in records if record.cell.method == "own-head"}) == 2
    assert all((record.training.key, record.as_cell.key) == (record.training_key, record.key) for record in records)
    assert verify([project / "results"]).problems == ()


def test_a_training_of_code_that_has_changed_is_restored_with_a_warning(run_own, load_own, project, caplog):
    run_own(sharp())
    (folder,) = (path.parent for path in (project / "results").rglob("trained.json") if '"own-head"' in path.read_text())
    load_own(sharp(scale="2.0"))
    restore(folder)
    assert "the code of method own-head has changed since it was trained" in caplog.text
