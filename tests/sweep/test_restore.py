"""A trained network from its folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.sweep.record import parse_record
from bench.sweep.restore import restore
from bench.sweep.store import read_records
from bench.training.checkpoint import hash_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "records"


@pytest.fixture
def trained(finished, tmp_path):
    results = shutil.copytree(finished, tmp_path / "results")
    (record,) = (record for _, record in read_records(results) if record.cell.guidance == "au")
    return results / "trainings" / record.training_key[:16], record


def test_a_training_is_restored_from_its_folder_alone(trained):
    folder, record = trained
    restored = restore(folder)
    assert hash_weights(restored.classifier) == record.weights_sha256
    assert (restored.training.key, restored.classes) == (record.training_key, record.data.classes)
    assert not restored.classifier.training


def test_settings_changed_by_hand_are_refused(trained):
    folder, _ = trained
    path = folder / "trained.json"
    content = json.loads(path.read_text())
    content["identity"]["seed"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"trained\.json was changed"):
        restore(folder)


def test_a_folder_without_a_training_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        restore(tmp_path)


def test_a_record_knows_its_own_keys(trained):
    _, record = trained
    assert (record.training.key, record.as_cell.key) == (record.training_key, record.key)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("schema*/*/record.json")), ids=lambda path: path.parent.parent.name)
def test_a_record_of_an_older_schema_is_read_and_knows_its_own_keys(path):
    record = parse_record(path.read_bytes())
    assert (record.training.key, record.as_cell.key) == (record.training_key, record.key)


def test_there_is_a_record_of_every_schema_so_far():
    assert {path.name for path in GOLDEN.glob("schema*")} == {"schema1", "schema2", "schema3"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"schema_version": 99}', "update bench"), (b"[]", "no schema_version"), (b'{"schema_version": 1}', "not of schema version 1")],
)
def test_what_is_no_record_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_record(content)
