"""The package as installed: import names, the wheel, and not standing in the way of Hugging Face datasets."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import bench

ROOT = Path(__file__).parents[1]


def test_every_module_imports_by_its_bench_name_and_only_by_it():
    for module in pkgutil.walk_packages(bench.__path__, "bench."):
        if module.name != "bench.__main__":
            importlib.import_module(module.name)
    for alias in ("methods", "backbones", "datasets"):
        assert not [name for name in sys.modules if name == alias or name.startswith(f"{alias}.")]


@pytest.mark.parametrize("modules", ["bench.cli.main", "bench.sweep.run, bench.runtime.deepspeed_strategy"])
def test_importing_bench_imports_no_deepspeed(run_python, modules):
    run_python(f"import sys, {modules}; assert not {{'deepspeed', 'transformers'}} & set(sys.modules)")


def test_hugging_face_datasets_wins_over_our_folder_of_that_name(run_python, tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("class IterableDataset: pass")
    info = tmp_path / "datasets-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 9.9\n")
    code = "import bench.datasets.synthetic, accelerate, datasets; print(datasets.__file__)"
    assert str(tmp_path) in run_python(code, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)})


def test_every_entry_point_names_a_module_that_is_packaged():
    from bench.backbone import BACKBONES
    from bench.dataset import DATASETS
    from bench.method import METHODS

    for registry in (METHODS, BACKBONES, DATASETS):
        points = entry_points(group=registry.group)
        assert points
        for point in points:
            assert registry.get(point.name).target.__module__ == point.module
            assert point.module.startswith("bench.")


@pytest.mark.slow
def test_a_wheel_works_away_from_the_tree(tmp_path, project, run_bench):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("bench", "methods", "backbones", "datasets", "results/references"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=500)
    shutil.rmtree(source)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    done = run_bench("run", "--guidance", "au", "--seeds", "0", cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import bench.methods.cam as m; print(m.__file__)"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert str(tmp_path / "site") in where.stdout
