"""The command line as its users see it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.cli.summary import summary
from bench.sweep.run import Outcome
from tests.reporting import cells


def test_help_imports_nothing_heavy(run_python):
    code = """
import sys
from typer.testing import CliRunner
from bench.cli.main import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0, result.output
heavy = {"torch", "timm", "accelerate", "numpy", "pyarrow", "PIL", "webdataset", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
    run_python(code)


def test_a_request_is_made_before_torch_is_imported_so_that_a_stop_in_those_seconds_is_heard(run_python):
    run_python("import sys, bench.launch.request; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("verb", [[], ["run"], ["plan"], ["leaderboard"], ["list"], ["data"], ["data", "prepare"]])
def test_every_verb_has_help(bench_here, tmp_path, verb):
    done = bench_here(*verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_a_plan_shows_cells_and_origins_and_makes_nothing(bench_here, tmp_path):
    done = bench_here("plan", "--methods", "cam", "--profile", "quick", "--origins", "--set", "train.epochs=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 cells from 4 trainings" in done.stdout
    assert "--set train.epochs=3" in done.stdout
    assert "shipped profile quick" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_makes_nothing(bench_here, tmp_path):
    done = bench_here("run", "--methods", "cam", "--profile", "quick", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "will be prepared" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cma"], "Did you mean 'cam'"),
        (["--datasets", "rafbd"], "unknown dataset 'rafbd'"),
        (["--datasets", "folder"], "Type: bench data prepare folder --raw DIR"),
        (["--backbones", "resnet5"], "Did you mean 'resnet50'"),
        (["--guidance", "au,non"], "run.guidance"),
        (["--seeds", "a"], "is not a whole number or a range"),
        (["--profile", "quik"], "Did you mean 'quick'"),
        (["--set", "train.epoch=3"], "Did you mean 'epochs'"),
        (["--set", "guidance.layers=[7]"], "has no layer 7"),
        (["--set", "train.batch_size=100000"], "is more than the 1540 training samples"),
        (["--set", "backbones.mini.weights=nowhere.safetensors"], "no such file"),
        (["--plugin", "nowhere.py"], "no such file"),
        (["--device", "tpu"], "choose one of: auto, cpu"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(bench_here, tmp_path, arguments, message):
    profile = [] if "--profile" in arguments else ["--profile", "quick"]
    methods = [] if "--methods" in arguments else ["--methods", "cam"]
    done = bench_here("run", *profile, *methods, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_methods_are_listed_as_data(bench_here, tmp_path):
    (cam,) = [e for e in json.loads(bench_here("list", "methods", "--format", "json", cwd=tmp_path).stdout) if e["name"] == "cam"]
    assert (cam["year"], cam["kind"], cam["variants"]) == (2016, "trained", ["paper", "official"])
    assert cam["doi"]


def test_a_leaderboard_of_nothing_says_what_to_type(bench_here, tmp_path):
    done = bench_here("leaderboard", "--results", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "bench run --profile quick --results nowhere" in done.stderr


@pytest.mark.parametrize("command", ["plan", "status", "leaderboard"])
def test_brackets_in_the_name_of_a_folder_are_shown(bench_here, project, command):
    (project / "re[s]1").mkdir()
    done = bench_here(command, "--results", "re[s]1", cwd=project)
    assert "re[s]1" in done.stdout


def test_brackets_in_the_name_of_a_folder_are_shown_at_the_end_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr("bench.cli.leaderboard.show_tables", lambda _: None)
    plan = SimpleNamespace(settings=SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(results=Path("re[s]1")))))
    summary(plan, Outcome(ran=(), skipped=(), failed={"cam": "no"}, trained=0, seconds=0.0))
    assert "bench leaderboard --results re[s]1\n" in capsys.readouterr().out


def test_a_run_prints_its_leaderboard_and_every_format_works(run_bench, bench_here, project):
    done = run_bench("run", "--guidance", "none", "--seeds", "0", "--track", "tensorboard", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "CAM-COS" in done.stdout
    assert "1 cells done, 0 were done before, 0 failed" in done.stdout
    assert list((project / "results" / "tracking").rglob("events.out.tfevents.*"))
    for fmt, mark in (("table", "CAM-COS"), ("md", "| Method"), ("csv", "dataset,fingerprint"), ("json", '"rows"'), ("latex", "\\toprule")):
        shown = bench_here("leaderboard", "--format", fmt, cwd=project)
        assert shown.returncode == 0
        assert mark in shown.stdout


def test_a_failed_cell_gives_exit_code_1_and_its_reason(run_bench, project):
    (project / "bad.py").write_text(
        "from bench.method import METHODS\nfrom bench.methods.cam import CAM\n"
        "@METHODS.register('bad', title='Bad', kind='posthoc', trains_as='cam')\n"
        "class Bad(CAM):\n    def maps(self, classifier, output, classes):\n"
        "        if len(classes) > 2:\n            raise RuntimeError('no map today')\n"
        "        return super().maps(classifier, output, classes)\n"
    )
    done = run_bench("run", "--plugin", "bad.py", "--methods", "cam,bad", "--guidance", "none", "--seeds", "0", cwd=project)
    assert done.returncode == 1
    assert "RuntimeError: no map today" in done.stdout
    assert "1 cells done" in done.stdout


def test_an_own_folder_runs_from_its_table_in_the_settings(bench_here, project):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = ["path," + ",".join(f"x{i},y{i}" for i in range(68))]
    for split, count in (("train", 8), ("test", 3)):
        for name in ("happiness", "sadness"):
            (project / "raw" / split / name).mkdir(parents=True)
            for i in range(count):
                path = f"{split}/{name}/{i}.png"
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(project / "raw" / path)
                rows.append(path + "," + ",".join(f"{v:.1f}" for v in rng.uniform(5, 35, 136)))
    (project / "raw" / "landmarks.csv").write_text("\n".join(rows) + "\n")
    with (project / "bench.toml").open("a") as file:
        file.write('\n[datasets.mine]\nentry = "folder"\nraw = "raw"\nsize = 40\n')
    done = bench_here(
        "run", "--datasets", "mine", "--data", "own", "--seeds", "0", "--set", "train.batch_size=4", "--set", "train.epochs=1", cwd=project
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine, mini" in done.stdout
    again = bench_here(
        "run", "--datasets", "mine", "--data", "own", "--seeds", "0", "--set", "train.batch_size=4", "--set", "train.epochs=1", cwd=project
    )
    assert "0 cells done, 2 were done before" in again.stdout


def test_a_terminal_that_lacks_a_sign_shows_another(run_bench, tmp_path):
    cells.write_cell(tmp_path / "results")
    cells.write_cell(tmp_path / "results", seed=1)
    done = run_bench("leaderboard", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "CAM" in done.stdout
