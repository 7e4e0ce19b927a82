"""The project's own results folder: sound records, and the table that follows from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.audit.verify import verify
from bench.reporting.tables.evidence import load_runs
from bench.reporting.tables.leaderboard import PUBLISHED_ORDER, build_tables
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.render import render
from bench.sweep.store import read_records

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def records():
    return [record for _, record in read_records(RESULTS)]


def test_it_holds_every_method_without_and_with_guidance_in_five_seeds(records):
    cells = Counter((record.cell.method, record.cell.guidance) for record in records if record.cell.method in PUBLISHED_ORDER)
    assert len(cells) == 22
    assert set(cells.values()) == {5}


def test_its_records_are_what_they_say(records):
    report = verify([RESULTS])
    assert (len(report.folders), report.problems) == (len(records), ())


def test_no_figure_depends_on_the_batch(records):
    assert [record.as_cell.label for record in records if not record.invariance["holds"]] == []


def test_they_come_from_committed_code(records):
    assert [record.as_cell.label for record in records if record.code.commit is None or record.code.dirty_diff_sha256 is not None] == []


def test_the_table_follows_from_the_records():
    tables = build_tables(load_runs(RESULTS))
    assert (RESULTS / "LEADERBOARD.md").read_text() == render(tables, "md", rankings=rank(tables), columns="all") + "\n"
