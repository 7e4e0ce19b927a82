"""In a shared folder everything that a run leaves is as open as the umask lets it be."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def for_the_group():
    old = os.umask(0o002)
    yield
    os.umask(old)


def test_a_colleague_of_the_group_may_read_and_write_all_that_a_run_leaves(go, project, for_the_group):
    results = project / "results"
    results.mkdir()
    results.chmod(0o2775)
    go(run__guidance=["none"], train__epochs=1)
    modes = {path.relative_to(results).as_posix(): path.stat().st_mode & 0o7777 for path in results.rglob("*")}
    assert modes == {name: 0o2775 if (results / name).is_dir() else 0o664 for name in modes}
