from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.cli.data import app, find_prepared, parse_options
from bench.data.index import load_index
from bench.data.stored import read_sample
from bench.prepare import landmark_check
from bench.prepare.landmarks import Landmarker


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)
    rows = [",".join(["path", *(f"{axis}{i}" for i in range(68) for axis in "xy")])]
    for split in ("train", "val", "test"):
        for name in ("happiness", "neutral", "boredom"):
            for i in range(2):
                source = f"{split}/{name}/{i}.png"
                (root / source).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(root / source)
                rows.append(",".join([source, *map(str, rng.integers(0, 40, 136))]))
    (root / "test/neutral/broken.jpg").write_bytes(b"no")
    (root / "landmarks.csv").write_text("\n".join(rows))
    return root


def run(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture
def root(raw, tmp_path):
    run("prepare", "mine", "--raw", raw, "--root", tmp_path, "-o", "size=40")
    return tmp_path


def test_prepare_says_what_it_made_and_what_it_left_out(raw, tmp_path):
    output = run("prepare", "mine", "--raw", raw, "--root", tmp_path, "--option", "size=40").output
    assert "bad picture, left out of test: test/neutral/broken.jpg: not a picture" in output
    assert f"prepared: {tmp_path / 'mine'} (18 pictures: train 6, val 6, test 6;" in output
    assert load_index(tmp_path / "mine").image_size == 40


def test_prepare_again_says_that_it_is_done(raw, root):
    assert "already prepared" in run("prepare", "mine", "--raw", raw, "--root", root, "-o", "size=40").output


def test_the_name_chooses_the_entry_unless_told(raw, tmp_path):
    run("prepare", "mine", "--entry", "folder", "--raw", raw, "--out", tmp_path / "here")
    assert load_index(tmp_path / "here").entry == "folder"
    assert load_index(tmp_path / "here").name == "mine"


PLUGIN = """
import numpy as np
from bench.dataset import DATASETS, Dataset, Face, Item
@DATASETS.register("{name}", title="dots", license="free", embedded=True)
class Dots(Dataset):
    classes = ("happiness", "other")
    def splits(self):
        return {{s: [Item(source=f"{{s}}/{{i}}", label=i % 2) for i in range(4)] for s in ("train", "val", "test")}}
    def read(self, item):
        return Face(image=np.full((24, 24, 3), 99, np.uint8), landmarks=None)
"""


def prepare_dots(tmp_path, name, *words):
    plugin = tmp_path / f"{name}.py"
    plugin.write_text(PLUGIN.format(name=name))
    return run("prepare", name, "--plugin", plugin, "--root", tmp_path / "data", *words)


def test_an_embedded_dataset_of_a_plugin_is_found_by_its_bare_name(tmp_path):
    prepare_dots(tmp_path, "dots_a", "-o", "size=24", "--workers", "2")
    folder = find_prepared("dots_a", root=tmp_path / "data")
    assert folder.name.startswith("dots_a-")
    assert "12 pictures in 3 shards" in run("verify", "dots_a", "--root", tmp_path / "data").output


def test_a_bare_name_with_several_option_sets_is_ambiguous(tmp_path):
    prepare_dots(tmp_path, "dots_b", "-o", "size=24")
    old = find_prepared("dots_b", root=tmp_path / "data")
    os.utime(old / "index.json", (1, 1))
    prepare_dots(tmp_path, "dots_b", "-o", "size=25")
    with pytest.raises(ValueError, match=rf"newest first\): .*dots_b-.*, {old}"):
        find_prepared("dots_b", root=tmp_path / "data")
    assert find_prepared(old.name, root=tmp_path / "data") == old


def test_a_mistyped_prepared_name_gets_the_nearest(root):
    with pytest.raises(FileNotFoundError, match="Did you mean 'mine'"):
        find_prepared("mien", root=root)


def test_a_folder_without_an_index_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index.json.*interrupted"):
        find_prepared(str(tmp_path), root=tmp_path)


def test_a_mistyped_dataset_without_raw_gets_the_nearest(tmp_path):
    error = run("prepare", "synthetc", "--root", tmp_path, status=1).exception
    assert "Did you mean 'synthetic'" in str(error)


def test_a_name_that_is_a_path_is_refused(tmp_path):
    error = run("prepare", "../evil", "--root", tmp_path, status=1).exception
    assert "use letters, digits" in str(error)


def test_verify_names_the_damage_and_fails(root):
    shard = root / "mine" / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    output = run("verify", "mine", "--root", root, status=1).output
    assert re.search("shard val-000000.tar, sample 00000000-[0-9a-f]{8}: the tar header", output)
    assert "quick" not in output
    assert "names and sizes" in run("verify", "mine", "--root", root, "--quick").output


def test_stats_counts_classes_and_lists_bad_pictures(root):
    output = run("stats", root / "mine").output
    line = next(line for line in output.splitlines() if "boredom" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["boredom", "2", "2", "2"]
    assert "broken.jpg" in output
    assert load_index(root / "mine").fingerprint in output


def test_show_draws_a_row_per_class(root):
    out = root / "sheet.png"
    run("show", "mine", "--root", root, "--split", "test", "--out", out, "--per-class", "2", "--cell", "40")
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape[0] == 22 + 3 * 44 + 4
    red = pixels[..., 0] - pixels[..., 1] > 60
    green = (pixels[..., 0] < 80) & (pixels[..., 1] > 240) & (pixels[..., 2] < 80)
    rows = [slice(22 + 44 * i, 62 + 44 * i) for i in range(3)]  # neutral, happiness, boredom: the project's order, then others
    assert all(green[r].sum() > 50 for r in rows)
    assert [bool(red[r].any()) for r in rows] == [False, True, False]  # only happiness has action units


def test_show_refuses_a_split_that_is_not_there(root):
    assert "Did you mean 'test'" in str(run("show", "mine", "--root", root, "--split", "tset", status=1).exception)


@pytest.mark.parametrize(
    ("pairs", "options"),
    [
        (["size=128", "salt=a=b"], {"size": "128", "salt": "a=b"}),
        (['names=["a", "b"]'], {"names": ["a", "b"]}),
        (["map={x = 1}"], {"map": {"x": 1}}),
        (["empty="], {"empty": ""}),
    ],
)
def test_options_are_words_or_toml(pairs, options):
    assert parse_options(pairs) == options


@pytest.mark.parametrize(("pairs", "words"), [(["size"], "KEY=VALUE"), (["=3"], "KEY=VALUE"), (["a=1", "a=2"], "twice"), (["a=[1"], "a=")])
def test_options_that_make_no_sense_are_refused(pairs, words):
    with pytest.raises(ValueError, match=words):
        parse_options(pairs)


def test_importing_the_commands_is_light():
    code = "import sys, json, bench.cli.data; print(json.dumps([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_verifying_and_importing_the_packer_need_no_torch(root):
    code = (
        "import sys\nfrom pathlib import Path\nimport bench.prepare.pack\nfrom bench.data.verify import verify\n"
        "assert verify(Path(sys.argv[1])) == []\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(root / "mine")], check=True)


def test_landmarks_of_prepare_are_the_option_of_that_name(raw, tmp_path):
    run("prepare", "mine", "--raw", raw, "--root", tmp_path, "-o", "size=40", "--landmarks", "none")
    index = load_index(tmp_path / "mine")
    assert index.options["landmarks"] == "none"
    assert index.provenance["samples_without_landmarks"] == {"train": 6, "val": 6, "test": 6}


def test_landmarks_given_twice_are_refused(raw, tmp_path):
    error = run("prepare", "m", "--raw", raw, "--root", tmp_path, "-o", "landmarks=none", "--landmarks", "dlib", status=1).exception
    assert "--landmarks dlib and --option landmarks=none say the same" in str(error)


def test_a_mistyped_source_of_landmarks_is_refused(raw, tmp_path):
    error = run("prepare", "m", "--raw", raw, "--root", tmp_path, "--landmarks", "dilb", status=1).exception
    assert "face-alignment" in str(error)
    assert "dlib" in str(error)


def test_landmark_weights_reach_the_packer(raw, tmp_path):
    error = run("prepare", "m", "--raw", raw, "--root", tmp_path, "--landmark-weights", tmp_path / "w", status=1).exception
    assert f"--landmark-weights {tmp_path / 'w'}: landmarks=shipped needs no weights" in str(error)


class Shifted(Landmarker):
    """Finds the stored points moved by a tenth of their unit; no face in the first picture it sees."""

    def __init__(self, stored):
        self.stored = stored

    def find(self, images, boxes):
        moved = [points + np.array([0.1 * np.linalg.norm(points[36] - points[45]), 0.0]) for points in self.stored]
        return [None, *moved[1:]]


@pytest.fixture
def shifted(root, monkeypatch):
    """Stands for dlib on the test split; the prepared dataset."""
    index = load_index(root / "mine")
    chosen = landmark_check.draw_sample(index, split="test", count=200)
    stored = [read_sample(root / "mine", shard, member).landmarks for _, shard, member in chosen]
    monkeypatch.setattr(landmark_check, "describe_source", lambda name, *, weights: {"name": name})
    monkeypatch.setattr(landmark_check, "open_landmarker", lambda name, *, weights: Shifted(stored))
    return root


def test_landmarks_prints_the_agreement_and_the_worst_and_writes_nothing(shifted):
    before = sorted(shifted.rglob("*"))
    output = run("landmarks", "mine", "--root", shifted, "--against", "dlib").output
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if line.startswith("│")]
    rows = dict(row for row in cells if len(row) == 2)
    assert rows["pictures"] == "6"
    assert rows["none by stored"] == "0 (0.00 %)"
    assert rows["none by dlib"] == "1 (16.67 %)"
    assert rows["normalised mean error, median"] == rows["jaw"] == rows["mouth"] == "10.00 %"
    assert output.count("10.00 %  test: test/") == 5
    assert sorted(shifted.rglob("*")) == before


def test_landmarks_draws_a_sheet_on_request(shifted, tmp_path):
    run("landmarks", "mine", "--root", shifted, "--against", "dlib", "--sheet", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_landmarks_checks_the_folder_of_the_sheet_first(root):
    error = run("landmarks", "mine", "--root", root, "--against", "dlib", "--sheet", root / "no/sheet.png", status=1).exception
    assert f"there is no folder {root / 'no'}" in str(error)


def test_landmarks_refuses_an_unknown_source(root):
    error = run("landmarks", "mine", "--root", root, "--against", "dilb", status=1).exception
    assert "Did you mean 'dlib'" in str(error)
