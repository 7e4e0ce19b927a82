"""The commands that install what optional parts need."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.extras import DISTRIBUTION, install_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_distribution_has_the_name_that_the_code_asks_for():
    assert PROJECT["name"] == DISTRIBUTION


@pytest.mark.parametrize("extra", ["deepspeed", "dlib", "landmarks", "slurm", "tensorboard", "vggface2", "wandb"])
def test_the_command_names_the_packages_of_the_extra_and_no_others(extra):
    pip, install, *packages = shlex.split(install_command(extra))
    assert (pip, install) == ("pip", "install")
    assert {Requirement(text) for text in packages} == {Requirement(text) for text in PROJECT["optional-dependencies"][extra]}


def test_the_command_can_be_pasted_into_a_shell():
    assert re.fullmatch(r"pip install 'submitit>=[\d.]+'", install_command("slurm"))


def test_nothing_says_to_install_the_package_that_somebody_else_calls_bench():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    command = re.compile(r"pip install (?:-\S+ )*['\"]?bench(?![-\w])")
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in files if name.endswith((".py", ".md", ".toml", ".html", ".txt"))}
    assert texts
    assert [name for name, text in texts.items() if command.search(text)] == []
