"""A part of the results on another disk, behind a link: what a run takes for done, the tables show and ``bench verify`` looks at."""

from __future__ import annotations

import shutil

import pytest

from bench.audit.verify import find_cells, verify
from bench.sweep.store import list_cells


@pytest.fixture
def cell(tmp_path):
    """One finished cell of a results folder, with nothing in it."""
    folder = tmp_path / "results/cells/faces/mini/cam/none/seed0"
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    return folder


def move(folder, disk):
    """Put a link in the place of a folder."""
    shutil.move(folder, disk)
    folder.symlink_to(disk)


@pytest.mark.parametrize("part", ["cells", "cells/faces", "cells/faces/mini/cam/none/seed0"])
def test_cells_behind_a_link_are_listed(cell, tmp_path, part):
    move(tmp_path / "results" / part, tmp_path / "disk")
    assert list_cells(tmp_path / "results") == [cell]


def test_a_folder_that_is_there_twice_is_listed_once_under_its_own_name(cell, tmp_path):
    (tmp_path / "results/cells/again").symlink_to("faces")
    assert list_cells(tmp_path / "results") == [cell]


def test_links_in_a_circle_come_to_an_end(cell, tmp_path):
    (cell / "up").symlink_to(tmp_path / "results")
    assert list_cells(tmp_path / "results") == [cell]


def test_what_was_set_aside_is_not_listed(cell, tmp_path):
    shutil.copytree(tmp_path / "results/cells", tmp_path / "results/damaged/cells")
    assert list_cells(tmp_path / "results") == [cell]


def test_verify_looks_at_cells_that_are_a_link(honest, tmp_path):
    move(honest / "cells", tmp_path / "disk")
    report = verify([honest])
    assert (len(report.facts), report.problems) == (4, ())


def test_verify_follows_no_link_below_cells_and_says_what_to_type(cell, tmp_path):
    move(tmp_path / "results/cells/faces", tmp_path / "disk")
    folders, (problem,) = find_cells([tmp_path / "results"])
    assert not folders
    assert str(problem).endswith(f"bench verify {tmp_path}/results/cells/faces")


def test_a_link_that_verify_is_given_is_followed(cell, tmp_path):
    move(tmp_path / "results/cells/faces", tmp_path / "disk")
    assert find_cells([tmp_path / "results/cells/faces"]) == ([cell], [])
