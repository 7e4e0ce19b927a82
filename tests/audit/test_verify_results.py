"""Tampering with results, and what bench verify says of it: everything is found, and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.audit import rerun as rerun_module
from bench.audit.stamp import is_verified
from bench.audit.verify import find_indexes, verify
from bench.evaluation.class_maps import read_average_maps, write_average_maps
from bench.evaluation.metrics import compute_metrics
from bench.evaluation.rows import read_rows
from bench.sweep.record import parse_record
from bench.sweep.store import read_records

GOLDEN = "golden/records"


def cell(results, method, seed):
    (folder,) = results.glob(f"cells/*/*/{method}/*/seed{seed}-*")
    return folder


def problems_of(*paths, **options):
    """The problems, as a reader sees them."""
    return [str(problem) for problem in verify(list(paths), **options).problems]


def only_problem(problems, *words):
    """The only problem with all these words."""
    (problem,) = [text for text in problems if all(word in text for word in words)]
    return problem


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder):
    return json.loads((folder / "record.json").read_text())


def write(folder, tree):
    """As it was, but for what was edited; the marker stays."""
    (folder / "record.json").write_text(json.dumps(tree, indent=2) + "\n")


def seal(folder, tree):
    """With every hash of a file as it must be."""
    tree["rows_sha256"] = sha(folder / "samples.parquet")
    tree["maps_sha256"] = sha(folder / "maps.safetensors")
    write(folder, tree)
    (folder / "DONE").write_text(sha(folder / "record.json") + "\n")


def edit_rows(folder, **columns):
    """Replace columns of the rows; the hashes stay."""
    path = folder / "samples.parquet"
    table = pq.read_table(path)
    for name, change in columns.items():
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        values = table[name].to_pylist()
        change(values)
        table = table.set_column(place, field, pa.array(values, type=field.type))
    pq.write_table(table, path)


def keep_rows(folder, positions):
    path = folder / "samples.parquet"
    pq.write_table(pq.read_table(path).take(positions), path)


def forge(folder):
    """Make everything in a cell's folder agree with its edited rows: predictions, figures, hashes."""
    rows = read_rows(folder / "samples.parquet")
    edit_rows(folder, predicted=lambda values: values.__setitem__(slice(None), rows.predicted.tolist()))
    tree = read(folder)
    classes = tree["data"]["classes"]
    tree["metrics"] = compute_metrics(rows, classes=classes, expressive=[name != "neutral" for name in classes])
    seal(folder, tree)


def rekey(folder, tree):
    """Give an edited record the keys, derived seeds and place of what it claims to be. Returns the place."""
    record = parse_record(json.dumps(tree).encode())
    training, cells = record.training, folder.parents[4]
    seeds = {"seed": training.seed, **{role: training.derived_seed(role) for role in ("init", "data", "step")}}
    tree |= {"training_key": training.key, "key": record.as_cell.key, "seeds": seeds}
    place = cells / record.as_cell.path
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, place)
    seal(place, tree)
    return place


def prepared(results, data_root):
    """The folder of the data of a result."""
    folder, _ = find_indexes(data_root)[read(cell(results, "cam", 0))["data"]["fingerprint"]]
    return folder


def swap(values, a=3, b=20):
    values[a], values[b] = values[b], values[a]


def test_what_a_run_leaves_is_sound(honest, data_root):
    report = verify([honest], data=data_root, strict=True)
    assert (len(report.folders), report.problems, report.unknown_data) == (4, (), {})


@pytest.mark.parametrize("schema", ["schema1", "schema2", "schema3"])
def test_a_record_of_an_older_schema_is_sound(schema, request):
    assert problems_of(request.path.parents[1] / GOLDEN / schema) == []


def test_a_folder_whose_name_looks_like_an_address_is_a_folder(honest, tmp_path, monkeypatch):
    honest.rename(tmp_path / "exp:1")
    monkeypatch.chdir(tmp_path)
    assert not problems_of(Path("exp:1"))


def test_a_cell_and_a_record_are_looked_at_alone(honest):
    folder = cell(honest, "cam", 0)
    for path in (folder, folder / "record.json"):
        assert [fact.folder for fact in verify([path]).facts] == [folder]


def test_a_changed_figure_is_named_with_what_the_rows_give(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    true = tree["metrics"]["cl"]["accuracy"]
    tree["metrics"]["cl"]["accuracy"] = 0.91
    write(folder, tree)
    problems = problems_of(honest)
    only_problem(problems, f"{folder}/record.json: metrics.cl.accuracy: recorded 0.91, rows give {true!r}")
    only_problem(problems, f"{folder}/DONE", "changed after it was finished")
    assert len(problems) == 2


def test_a_changed_figure_is_found_though_the_marker_was_forged_too(honest):
    folder = cell(honest, "gradcam", 1)
    tree = read(folder)
    tree["metrics"]["att_cos"]["3"]["per_class"]["fear"]["mean"] += 1e-9
    seal(folder, tree)
    (problem,) = problems_of(honest)
    assert f"{folder}/record.json: metrics.att_cos.3.per_class.fear.mean: recorded" in problem


def test_a_swapped_row_is_found_by_the_figures(honest):
    folder = cell(honest, "cam", 0)
    edit_rows(folder, map_cosine_true=swap)
    seal(folder, read(folder))
    assert "metrics.cam_cos.true" in only_problem(problems_of(honest), "rows give")


def test_swapped_logits_with_all_figures_and_hashes_forged_are_found_by_the_other_method_of_the_training(honest):
    folder = cell(honest, "gradcam", 0)
    key = read_rows(folder / "samples.parquet").keys[20]
    edit_rows(folder, logits=swap)
    forge(folder)
    (problem,) = problems_of(honest)
    first = read_rows(folder / "samples.parquet").keys[3]
    assert "column logits" in problem
    assert f"sample '{first}'" in problem or f"sample '{key}'" in problem
    assert "both read out the same training" in problem


def test_a_duplicated_sample_is_named(honest):
    folder = cell(honest, "cam", 1)
    keep_rows(folder, [*range(5), 4, *range(6, 27)])
    key, lost = (read_rows(cell(honest, "cam", 0) / "samples.parquet").keys[n] for n in (4, 5))
    seal(folder, read(folder))
    problems = problems_of(honest)
    only_problem(problems, f"{folder}/samples.parquet: sample '{key}'", "it is there several times")
    only_problem(problems, f"sample '{lost}'", "has it, this one not")
    only_problem(problems, "keys_sha256")


def test_a_missing_sample_is_named(honest):
    folder = cell(honest, "cam", 1)
    key = read_rows(folder / "samples.parquet").keys[7]
    keep_rows(folder, [n for n in range(27) if n != 7])
    forge(folder)
    problems = problems_of(honest)
    only_problem(problems, "data.samples: recorded 27", "the rows are 26")
    only_problem(problems, f"{folder}/samples.parquet: sample '{key}'", "1 missing and 0 added")


def test_a_missing_sample_is_named_by_the_data_alone(honest, data_root):
    folder = cell(honest, "cam", 1)
    key = read_rows(folder / "samples.parquet").keys[7]
    keep_rows(folder, [n for n in range(27) if n != 7])
    forge(folder)
    tree = read(folder)
    tree["data"]["samples"] = 26
    tree["data"]["keys_sha256"] = hashlib.sha256("\n".join(read_rows(folder / "samples.parquet").keys).encode()).hexdigest()
    seal(folder, tree)
    problems = problems_of(folder, data=data_root)
    only_problem(problems, f"sample '{key}'", "26 samples, 27 in the data", "the data has it, the rows do not")


def test_reordered_rows_are_found(honest):
    folder = cell(honest, "cam", 1)
    keep_rows(folder, [1, 0, *range(2, 27)])
    seal(folder, read(folder))
    only_problem(problems_of(folder), "the rows were reordered")


def test_an_edited_label_is_named_by_the_other_records(honest, data_root):
    folder = cell(honest, "cam", 0)
    rows = read_rows(folder / "samples.parquet")
    true, edited = int(rows.labels[11]), int(rows.labels[11]) % 6 + 1
    edit_rows(folder, label=lambda values: values.__setitem__(11, edited))
    forge(folder)
    expected = f"{folder}/samples.parquet: sample '{rows.keys[11]}', column label: recorded {edited}"
    assert f"has {true} (1 of 27 samples differ)" in only_problem(problems_of(honest), expected)
    assert f"has {true} (1 samples differ)" in only_problem(problems_of(folder, data=data_root), expected)


def test_a_label_that_no_class_has_is_named(honest):
    folder = cell(honest, "cam", 0)
    key = read_rows(folder / "samples.parquet").keys[2]
    edit_rows(folder, label=lambda values: values.__setitem__(2, 7))
    seal(folder, read(folder))
    only_problem(problems_of(folder), f"sample '{key}', column label: recorded 7, 0 to 6 is wanted")


def test_a_prediction_that_its_logits_do_not_give_is_named(honest):
    folder = cell(honest, "cam", 0)
    rows = read_rows(folder / "samples.parquet")
    edited = (int(rows.predicted[4]) + 1) % 7
    edit_rows(folder, predicted=lambda values: values.__setitem__(4, edited))
    seal(folder, read(folder))
    (problem,) = problems_of(folder)
    assert f"sample '{rows.keys[4]}', column predicted: recorded {edited}, its logits give {rows.predicted[4]}" in problem


def test_data_that_is_not_at_hand_is_said_and_only_strictly_a_problem(honest, tmp_path, data_root):
    data = prepared(honest, data_root)
    shutil.copytree(data, tmp_path / "data" / "other")
    index = json.loads((data / "index.json").read_text())
    index["image_size"] += 1
    (tmp_path / "data" / "other" / "index.json").write_text(json.dumps(index))
    report = verify([honest], data=tmp_path / "data")
    assert (len(report.problems), list(report.unknown_data.values())) == (0, [4])
    assert all("no prepared dataset in" in problem for problem in problems_of(honest, data=tmp_path / "data", strict=True))


def test_rows_of_another_index_are_found(honest, tmp_path, data_root):
    source = prepared(honest, data_root)
    index = json.loads((source / "index.json").read_text())
    member = index["splits"]["test"]["shards"][0]["members"][3]
    member[1] = (member[1] + 1) % 7
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    problems = problems_of(honest, data=tmp_path / "data")
    assert len(problems) == 4
    assert all(f"sample '{member[0]}', column label" in problem for problem in problems)


def test_another_data_fingerprint_is_another_training(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["data"]["fingerprint"] = "0" * 64
    seal(folder, tree)
    problems = problems_of(honest)
    only_problem(problems, f"{folder}/record.json: training_key")
    only_problem(problems, f"{folder}/record.json: key")


def test_a_copied_seed_is_found(honest):
    copied = read(cell(honest, "cam", 0))
    copied["cell"]["seed"] = 1
    place = rekey(cell(honest, "cam", 0), copied)
    assert place == cell(honest, "cam", 1)
    problems = problems_of(honest)
    only_problem(problems, f"{place}/record.json: weights_sha256: recorded those of seed 1, equal to those of seed 0", "copied")
    only_problem(problems, f"{place}/samples.parquet: logits: recorded those of seed 1, equal to those of seed 0", "copied")


def test_a_copied_seed_is_found_though_its_weights_hash_was_made_up(honest):
    shutil.rmtree(cell(honest, "gradcam", 1))  # which has the true hash
    copied = read(cell(honest, "cam", 0)) | {"weights_sha256": "ab" * 32}
    copied["cell"]["seed"] = 1
    place = rekey(cell(honest, "cam", 0), copied)
    (problem,) = problems_of(honest)
    assert f"{place}/samples.parquet: logits: recorded those of seed 1, equal to those of seed 0" in problem


def test_the_derived_seeds_belong_to_the_seed(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["seeds"]["data"] += 1
    seal(folder, tree)
    only_problem(problems_of(folder), "seeds.data: recorded", "seed 0 gives")


def test_the_same_cell_twice_is_found(honest):
    shutil.copytree(cell(honest, "cam", 0), honest / "again")
    only_problem(problems_of(honest), "two records of one cell and seed, synthetic/mini/cam/none/seed0")


def test_a_training_carried_out_twice_is_noted_and_no_problem(honest):
    folder = cell(honest, "gradcam", 1)
    tree = read(folder) | {"weights_sha256": "cd" * 32}
    tree["cost"]["training_seconds"] += 1
    seal(folder, tree)
    report = verify([honest])
    assert report.problems == ()
    assert "carried out twice with different weights" in report.notes[0]


def test_a_forged_weights_hash_is_found_by_the_other_method_of_the_training(honest):
    folder = cell(honest, "gradcam", 1)
    seal(folder, read(folder) | {"weights_sha256": "cd" * 32})
    (problem,) = problems_of(honest)
    assert f"{folder}/record.json: weights_sha256: recorded '{'cd' * 32}'" in problem


@pytest.mark.parametrize(("field", "file"), [("rows_sha256", "samples.parquet"), ("maps_sha256", "maps.safetensors")])
def test_a_forged_hash_of_a_file_is_named(honest, field, file):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    seal(folder, tree)
    tree[field] = "0" * 64
    write(folder, tree)
    (folder / "DONE").write_text(sha(folder / "record.json"))
    (problem,) = problems_of(honest)
    assert f"{folder}/{file}: {field}: recorded '{'0' * 64}', the file has {sha(folder / file)}" in problem


def test_exchanged_maps_are_found(honest):
    folder, second = cell(honest, "cam", 0), cell(honest, "gradcam", 1)
    shutil.copy(second / "maps.safetensors", folder)
    (problem,) = problems_of(honest)
    assert f"{folder}/maps.safetensors: maps_sha256: recorded" in problem


def test_maps_of_other_samples_are_found_though_their_hash_was_forged(honest):
    folder = cell(honest, "cam", 0)
    maps = read_average_maps(folder / "maps.safetensors")
    maps.count[2] += 1
    write_average_maps(folder / "maps.safetensors", maps)
    seal(folder, read(folder))
    only_problem(problems_of(honest), f"{folder}/maps.safetensors: count", "these maps are of other samples")


@pytest.mark.parametrize("field", ["map", "example_attention"])
def test_maps_of_another_form_are_found_though_their_hash_was_forged(honest, field):
    folder = cell(honest, "cam", 0)
    maps = read_average_maps(folder / "maps.safetensors")
    write_average_maps(folder / "maps.safetensors", dataclasses.replace(maps, **{field: getattr(maps, field)[:, 1:]}))
    seal(folder, read(folder))
    only_problem(problems_of(honest), f"{folder}/maps.safetensors: {field}", "these maps are of other data")


def test_an_edited_setting_is_found_by_key_and_configuration(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["settings"]["train"]["lr"] = 0.3
    seal(folder, tree)
    problems = problems_of(honest)
    only_problem(problems, "settings.train.lr: recorded 0.3, config.train.lr is 0.003")
    only_problem(problems, f"{folder}/record.json: training_key", "a setting was edited")
    only_problem(problems, f"{folder}: folder", "the folder is named by its key")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.update(protocol="test-selected"), "settings.protocol: recorded 'val', protocol is 'test-selected'"),
        (lambda tree: tree.update(attention_layer=4), "attention_layer: recorded 4, the settings guide layer"),
        (lambda tree: tree.update(trains_as="adl"), "trains_as: recorded 'adl', cam trains as cam"),
        (lambda tree: tree["selection"].update(accuracy=0.99), "selection: recorded 0.99 in epoch"),
        (lambda tree: tree["invariance"].update(holds=False), "invariance.holds: recorded False"),
        (lambda tree: tree["invariance"].update(tolerance=10.0), "invariance.tolerance: recorded 10.0"),
        (lambda tree: tree["data"].update(split="train"), "data.split: recorded 'train'"),
        (lambda tree: tree["evaluation"].update(au_maps="official"), "evaluation.au_maps: recorded 'official'"),
    ],
)
def test_what_contradicts_the_settings_is_named(honest, change, expected):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    change(tree)
    seal(folder, tree)
    only_problem(problems_of(folder), f"{folder}/record.json: {expected}")


def test_a_measure_without_its_column_is_named(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["evaluation"]["measures"] = ["ap"]
    seal(folder, tree)
    only_problem(problems_of(folder), "samples.parquet: columns measure_", "measures were added or removed")


def test_nan_for_a_figure_is_named(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["metrics"]["cam_cos"]["true"]["macro"] = math.nan
    seal(folder, tree)
    problems = problems_of(folder)
    only_problem(problems, "record.json: numbers: recorded NaN")
    only_problem(problems, "metrics.cam_cos.true.macro: recorded nan")


def test_nan_among_the_logits_is_named(honest):
    folder = cell(honest, "cam", 0)
    key = read_rows(folder / "samples.parquet").keys[5]
    edit_rows(folder, logits=lambda values: values[5].__setitem__(0, math.nan))
    seal(folder, read(folder))
    only_problem(problems_of(folder), f"sample '{key}', column logits", "finite numbers is wanted")


@pytest.mark.parametrize(
    ("valid", "value", "expected"), [(True, math.nan, "has an AU map"), (False, 0.9, "has no AU map"), (True, 1.5, "within -1 and 1")]
)
def test_a_cosine_that_cannot_be_is_named(honest, valid, value, expected):
    folder = cell(honest, "cam", 0)
    rows = read_rows(folder / "samples.parquet")
    place = int(np.flatnonzero(rows.au_valid == valid)[0])
    edit_rows(folder, map_cosine_true=lambda values: values.__setitem__(place, value))
    seal(folder, read(folder))
    only_problem(problems_of(folder), f"sample '{rows.keys[place]}', column map_cosine_true", expected)


# --- with the weights


def rerun(bench_here, honest, data_root, *more):
    done = bench_here("verify", honest, "--data", data_root, "--rerun", *more, cwd=honest.parent)
    return done.returncode, done.stdout


def test_the_weights_give_the_rows_again_and_the_records_are_stamped(honest, data_root, bench_here):
    code, out = rerun(bench_here, honest, data_root, "--stamp")
    assert (code, "4 records stamped" in out) == (0, True)
    assert "largest difference 0\n" in out  # the same machine: the same bits
    folder = cell(honest, "cam", 0)
    assert is_verified(folder)
    tree = read(folder)
    seal(folder, tree | {"finished": "2020-01-01T00:00:00+00:00"})
    assert not is_verified(folder)
    only_problem(problems_of(honest), f"{folder}/VERIFIED.json: record_sha256", "the stamp is of another record")


def test_a_forger_who_keeps_everything_consistent_is_found_by_the_weights_alone(honest, data_root, bench_here):
    for method in ("cam", "gradcam"):
        folder = cell(honest, method, 1)
        rows = read_rows(folder / "samples.parquet")
        wrong = int(np.flatnonzero(rows.predicted != rows.labels)[0])
        edit_rows(folder, logits=lambda values, rows=rows, wrong=wrong: values[wrong].__setitem__(int(rows.labels[wrong]), 9.0))
        forge(folder)
    assert problems_of(honest, data=data_root, strict=True) == []
    code, out = rerun(bench_here, honest, data_root, "--stamp")
    assert code == 1
    lines = [line for line in out.splitlines() if "column logits: recorded 9.0, its weights give" in line]
    assert len(lines) == 2
    assert "2 records stamped" in out
    assert [folder.name[:5] for folder, _ in read_records(honest) if is_verified(folder)] == ["seed0", "seed0"]


@pytest.mark.parametrize(
    ("samples", "change", "tolerance", "passes"),
    [(1, 0.004, "1e-4", True), (1, 0.4, "1e-4", False), (2, 0.004, "1e-4", False), (1, 0.004, "0", False)],
    ids=["one sample, hardly", "one sample, visible in the mean", "too many samples", "every bit"],
)
def test_the_weights_need_not_give_the_cosine_of_a_tie(honest, data_root, bench_here, monkeypatch, samples, change, tolerance, passes):
    monkeypatch.setattr(rerun_module, "EXCEPTIONS", 0.05)  # of 27 samples: one
    folder = cell(honest, "gradcam", 1)
    counted = np.flatnonzero(read_rows(folder / "samples.parquet").au_valid)[:samples]

    def edit(values):
        for place in counted:
            values[place] -= change

    edit_rows(folder, map_cosine_true=edit)
    forge(folder)
    code, out = rerun(bench_here, honest, data_root, "--tolerance", tolerance)
    assert ("and 1 of single samples where rounding decided a tie" in out) is passes
    assert (code, "column map_cosine_true" in out) == ((0, False) if passes else (1, True))


def test_a_weights_hash_forged_in_all_records_of_a_training_is_found_by_the_weights(honest, data_root, bench_here):
    for method in ("cam", "gradcam"):
        seal(cell(honest, method, 1), read(cell(honest, method, 1)) | {"weights_sha256": "ef" * 32})
    assert problems_of(honest) == []
    code, out = rerun(bench_here, honest, data_root)
    assert (code, out.count("the weights are not those of the record")) == (1, 2)


def test_settings_forged_with_all_keys_have_no_weights_that_were_trained_so(honest, data_root, bench_here):
    for method in ("cam", "gradcam"):
        folder = cell(honest, method, 1)
        tree = read(folder)
        tree["settings"]["train"]["lr"] = tree["config"]["train"]["lr"] = 0.001
        rekey(folder, tree)
        shutil.rmtree(folder)
    assert problems_of(honest) == []
    code, out = rerun(bench_here, honest, data_root)
    assert (code, out.count("it cannot be evaluated again: FileNotFoundError")) == (1, 2)


# --- hostile folders


def test_a_link_is_not_followed(honest, tmp_path):
    folder = cell(honest, "cam", 0)
    shutil.move(folder / "samples.parquet", tmp_path / "elsewhere.parquet")
    (folder / "samples.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    shutil.move(cell(honest, "cam", 1), tmp_path / "cell")
    (folder.parent / "seed1").symlink_to(tmp_path / "cell")
    problems = problems_of(honest)
    only_problem(problems, f"{folder}/samples.parquet: file: recorded a file, it is a symbolic link")
    only_problem(problems, f"{folder.parent}/seed1: folder", "nothing in it was looked at")


def test_names_that_would_lead_out_of_the_results_folder_are_refused(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["cell"]["dataset"] = ".."
    seal(folder, tree)
    only_problem(problems_of(honest), "cell: recorded '../mini/cam/none/", "it would lead out of the results folder")


def test_rows_with_thousands_of_columns_are_not_unpacked(honest):
    folder = cell(honest, "cam", 0)
    pq.write_table(pa.table({f"c{n}": pa.nulls(3, pa.float32()) for n in range(3000)}), folder / "samples.parquet")
    (problem,) = [text for text in problems_of(folder) if "rows_sha256" not in text]
    assert "column 'c0'" in problem


def test_keys_that_would_fill_the_memory_when_unpacked_are_refused(honest):
    folder = cell(honest, "cam", 0)
    table = pq.read_table(folder / "samples.parquet")
    bomb = pa.array(["x" * 5000] * 27)
    pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", bomb), folder / "samples.parquet")
    only_problem(problems_of(folder), "column key: recorded at most 4096 bytes, one has 5000")


def test_a_record_that_nests_without_end_or_is_none_is_reported(honest):
    deep, none = cell(honest, "cam", 0), cell(honest, "cam", 1)
    (deep / "record.json").write_text("[" * 100_000)
    (none / "record.json").write_bytes(b"\x80\x04.")
    problems = problems_of(honest)
    for folder in (deep, none):
        only_problem(problems, f"{folder}/record.json: schema", "it is not readable")


def test_what_a_terminal_would_obey_is_shown_as_text(honest):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["cell"]["dataset"] = "\x1b[2J"
    seal(folder, tree)
    assert not any("\x1b" in problem for problem in problems_of(honest))


def test_a_record_without_a_marker_is_reported(honest):
    (cell(honest, "cam", 0) / "DONE").unlink()
    only_problem(problems_of(honest), "DONE: marker", "the tables leave it out")


# --- the command


def test_the_command_counts_and_ends_with_1_for_problems(honest, bench_here):
    folder = cell(honest, "cam", 0)
    tree = read(folder)
    tree["metrics"]["cl"]["accuracy"] = 0.91
    seal(folder, tree)
    done = bench_here("verify", honest, cwd=honest.parent)
    assert done.returncode == 1
    assert "1 problems in 1 of 4 records" in done.stdout
    done = bench_here("verify", honest, "--json", cwd=honest.parent)
    report = json.loads(done.stdout)
    assert (done.returncode, report["records"], report["with_problems"]) == (1, 4, 1)
    assert (report["problems"][0]["what"], report["problems"][0]["recorded"]) == ("metrics.cl.accuracy", "0.91")


def test_the_command_ends_with_2_where_there_is_nothing_to_look_at(tmp_path, bench_here):
    for arguments, expected in (
        ([tmp_path], "no record.json"),
        ([tmp_path / "no"], "there is nothing"),
        ([tmp_path, "--stamp"], "--rerun"),
    ):
        done = bench_here("verify", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert expected in done.stderr
