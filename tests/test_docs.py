"""What the documentation tells people to type works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_page_on_adding_a_method_runs_as_written(project, run_bench):
    (code,) = blocks("docs/add-a-method.md", "python")
    (command,) = blocks("docs/add-a-method.md", "bash")
    (project / "sharp_cam.py").write_text(code)
    verb, *arguments = shlex.split(command)
    assert verb == "bench"
    smaller = ["--seeds", "0", "--set", "images.size=32", "--set", "train.epochs=2", "--set", "datasets.synthetic.train=64"]
    done = run_bench(*arguments, *smaller, "--set", "datasets.synthetic.val=21", "--set", "datasets.synthetic.test=28", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 cells done" in done.stdout
    assert "SharpCAM" in done.stdout


def test_the_readme_shows_the_two_commands_and_no_dead_links():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    for target in re.findall(r"\]\(([^)#]+?)\)", readme):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_every_command_of_the_readme_names_verbs_and_options_that_exist(bench_here, tmp_path):
    for block in blocks("README.md", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "bench":
                continue
            verbs = [w for w in words[1:3] if not w.startswith("-") and w.isalpha()][: 2 if words[1] == "data" else 1]
            helped = bench_here(*verbs, "--help", cwd=tmp_path)
            assert helped.returncode == 0, line
            for option in (w for w in words if w.startswith("--")):
                assert option in helped.stdout, f"{line}: {option}"
