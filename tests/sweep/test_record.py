"""What a record says of the running code."""

from __future__ import annotations

import subprocess

import pytest

import bench
from bench.registry import load_plugin
from bench.sweep import record as record_module
from bench.sweep.record import code_facts
from bench.sweep.store import read_records


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed checkout that `code_facts` takes for the running one."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("bench/__init__.py", "results/LEADERBOARD.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("as committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench" / "__init__.py"))
    yield tmp_path
    monkeypatch.undo()
    code_facts.cache_clear()


def facts():
    code_facts.cache_clear()
    return code_facts()


def test_only_changes_of_the_code_are_told_as_such(checkout):
    (checkout / "results" / "LEADERBOARD.md").unlink()
    assert (facts().clean, facts().dirty_diff_sha256) == (True, None)
    (checkout / "bench" / "__init__.py").write_text("changed")
    assert facts().clean is False
    assert facts().dirty_diff_sha256 is not None


def test_an_untracked_file_counts_with_its_content(checkout):
    seen = []
    for content in ("first", "second", "first"):
        (checkout / "bench" / "new.py").write_text(content)
        assert facts().clean is False
        seen.append(facts().dirty_diff_sha256)
    assert seen[0] == seen[2] != seen[1]


def test_where_git_does_not_answer_nobody_says_that_the_code_is_clean(checkout, monkeypatch):
    real = record_module._git
    monkeypatch.setattr(record_module, "_git", lambda root, *arguments: real(root, *arguments) if arguments[0] == "rev-parse" else None)
    assert facts().commit is not None
    assert (facts().clean, facts().dirty_diff_sha256) == (None, None)


def test_outside_of_a_checkout_the_files_tell_which_code_it_was(checkout):
    (checkout / ".git").rename(checkout / "no.git")
    assert (facts().commit, facts().clean) == (None, None)
    assert len(facts().source_sha256) == 64


PLUGIN = """
from bench.method import METHODS
from bench.methods.cam import CAM


@METHODS.register("foreign", title="Foreign", kind="trained")
class Foreign(CAM):
    pass
"""


def test_a_record_names_the_file_of_a_method_that_is_not_ours(go, project):
    import hashlib

    from bench.method import METHODS

    (project / "foreign.py").write_text(PLUGIN)
    load_plugin(str(project / "foreign.py"))
    try:
        go(run__methods=["cam", "foreign"], run__guidance=["none"], train__epochs=1)
    finally:
        METHODS._entries.pop("foreign")
    expected = {"method foreign": hashlib.sha256(PLUGIN.encode()).hexdigest()}
    assert [record.code.entries for _, record in read_records(project / "results")] == [expected, expected]
