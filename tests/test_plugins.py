"""Entries from outside the project: a real package, installed; a file given on the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
