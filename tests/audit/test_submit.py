"""Packing records for a pull request."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import yaml

from bench.audit.stamp import write_stamp
from bench.audit.submit import describe, make_submission
from bench.audit.verify import verify

ROOT = Path(__file__).parents[2]


def submit(bench_here, results, out, *more):
    return bench_here("submit", "--results", results, "--out", out, *more, cwd=results.parent)


def contents(archive):
    with tarfile.open(archive) as file:
        return {member.name: file.extractfile(member).read() for member in file.getmembers()}


def test_a_submission_unpacked_into_an_empty_results_folder_is_sound_and_in_the_table(honest, bench_here, tmp_path):
    assert submit(bench_here, honest, "mine.tar.gz").returncode == 0
    with tarfile.open(tmp_path / "mine.tar.gz") as archive:
        archive.extractall(tmp_path / "received", filter="data")
    assert bench_here("verify", "received", cwd=tmp_path).returncode == 0
    shown = bench_here("leaderboard", "--results", "received", "--format", "csv", cwd=tmp_path)
    assert "gradcam" in shown.stdout


def test_only_the_records_of_the_chosen_methods_are_packed_without_weights_pictures_and_stamps(honest, bench_here, tmp_path):
    (stamped,) = honest.glob("cells/*/*/gradcam/*/seed0-*")
    write_stamp(stamped, weights_sha256=json.loads((stamped / "record.json").read_text())["weights_sha256"], largest_difference=0.0)
    (stamped / "notes.txt").write_text("mine")
    assert submit(bench_here, honest, "mine.tar.gz", "--methods", "gradcam").returncode == 0
    names = contents(tmp_path / "mine.tar.gz")
    assert {name.rsplit("/", 1)[-1] for name in names} == {"SUBMISSION.md", "DONE", "record.json", "samples.parquet", "maps.safetensors"}
    assert {name.split("/")[3] for name in names if name.startswith("cells/")} == {"gradcam"}
    assert len(names) == 1 + 2 * 4


def test_the_same_records_give_the_same_archive_and_a_folder_has_the_same_files(honest, bench_here, tmp_path):
    for out in ("a.tar.gz", "b.tar.gz", "c"):
        assert submit(bench_here, honest, out).returncode == 0
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    files = {str(path.relative_to(tmp_path / "c")): path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    assert files == contents(tmp_path / "a.tar.gz")


def test_records_with_a_problem_are_not_packed(honest, bench_here, tmp_path):
    (folder,) = honest.glob("cells/*/*/cam/*/seed0-*")
    (folder / "record.json").write_text((folder / "record.json").read_text().replace('"seed": 0', '"seed": 5', 1))
    done = submit(bench_here, honest, "mine.tar.gz")
    assert done.returncode == 1
    assert "training_key" in done.stderr
    assert not (tmp_path / "mine.tar.gz").exists()


def test_what_is_there_is_not_overwritten(honest, bench_here, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    done = submit(bench_here, honest, "mine")
    assert (done.returncode, "is there already" in done.stderr) == (2, True)


def test_a_method_without_records_is_refused_with_the_nearest(honest, bench_here):
    done = submit(bench_here, honest, "mine.tar.gz", "--methods", "gradcan")
    assert done.returncode == 2
    assert "Did you mean 'gradcam'" in done.stderr


def test_the_text_says_what_the_records_are_of(honest):
    text = describe(make_submission(honest, methods=["gradcam"]))
    record = json.loads(next(honest.glob("cells/*/*/gradcam/*/seed0-*/record.json")).read_text())
    assert "# Results of Grad-CAM\n" in text
    assert "Selvaraju" in text
    assert re.search(r"gradcam .*mini .*none .*synthetic .*val .*paper .*0, 1", text)
    assert record["data"]["fingerprint"][:16] in text
    assert "- [ ] All seeds that were run are here" in text


def test_names_from_records_cannot_mark_up_the_text(honest):
    submission = make_submission(honest)
    folder, record = submission.cells[0]
    named = record.cell.model_copy(update={"backbone": "a|b](http://x) <img src=x>\n# c"})
    text = describe(type(submission)(cells=((folder, record.model_copy(update={"cell": named})),), personal=()))
    assert r"a\|b\](http://x) \<img src=x\> # c" in text


def test_fields_that_tell_of_a_place_are_told_and_packed_as_they_are(honest, bench_here, tmp_path):
    done = submit(bench_here, honest, "mine.tar.gz")
    assert "config.slurm.partition tells of you or your machine in 4 records: 'department-of-faces'" in done.stderr
    (packed, *_) = [text for name, text in contents(tmp_path / "mine.tar.gz").items() if name.endswith("record.json")]
    assert json.loads(packed)["config"]["slurm"]["partition"] == "department-of-faces"


def test_a_record_does_not_say_where_results_and_data_lie(honest, data_root):
    assert all(str(data_root) not in path.read_text() for path in honest.rglob("record.json"))


# --- the page


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs/submit.md").read_text(encoding="utf-8")


def test_the_workflow_of_the_page_is_one_and_its_checks_are_right(page, honest, bench_here):
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    workflow = yaml.safe_load(block)
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    (line,) = [line for step in steps for line in step.splitlines() if line.startswith("bench verify")]
    assert bench_here(*shlex.split(line)[1:], cwd=honest.parent).returncode == 0
    assert verify([honest]).problems == ()


def test_every_option_of_the_page_exists(page, bench_here, tmp_path):
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["bench"]:
                helped = bench_here(words[1], "--help", cwd=tmp_path).stdout
                assert all(word.partition("=")[0] in helped for word in words if word.startswith("--")), line
