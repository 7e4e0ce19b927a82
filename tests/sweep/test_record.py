"""What a record says of the running code."""

from __future__ import annotations

import subprocess

import bench
from bench.sweep.record import code_facts


def test_only_changes_of_the_code_are_told_as_such(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("bench/__init__.py", "results/LEADERBOARD.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("as committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench" / "__init__.py"))

    def changed():
        code_facts.cache_clear()
        return code_facts().dirty_diff_sha256 is not None

    (tmp_path / "results" / "LEADERBOARD.md").unlink()
    assert not changed()
    (tmp_path / "bench" / "new.py").touch()
    assert changed()
    monkeypatch.undo()
    code_facts.cache_clear()
