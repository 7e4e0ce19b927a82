from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from bench.data.index import load_index
from bench.data.readers import open_reader
from bench.data.verify import verify
from bench.dataset import DATASETS
from bench.prepare import pack
from bench.prepare.pack import Progress, prepare, prepared_folder
from bench.registry import check_options

CLASSES = ("happiness", "anger")
OPTIONS = {"size": 32, "val_fraction": 0.25}


def write_picture(path, seed, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).save(path)


def landmark_row(source, seed):
    values = np.random.default_rng(seed).uniform(0, 29, 136)
    return ",".join([source, *(f"{v:.2f}" for v in values)])


def write_raw(root, per_class=6):
    header = ",".join(["path", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    rows = [header]
    for split, count in (("train", per_class), ("test", 2)):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                source = f"{split}/{name}/{i:02d}.png"
                seed = 1000 * c + 10 * i + (split == "test")
                write_picture(root / source, seed)
                rows.append(landmark_row(source, seed))
    (root / "landmarks.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_ITEMS", 4)


def make(raw, out, **changes):
    arguments = {"name": "mine", "options": OPTIONS, "raw": raw, "out": out, "workers": 1, **changes}
    return prepare("folder", **arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_picture_is_in_the_index_and_the_shards_verify(raw, tmp_path):
    index = make(raw, tmp_path / "out")
    assert {split: s.samples for split, s in index.splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert index.splits["train"].class_counts == {"happiness": 4, "anger": 4}
    assert [shard.name for shard in index.splits["train"].shards] == ["train-000000.tar", "train-000001.tar"]
    assert verify(tmp_path / "out") == []
    assert load_index(tmp_path / "out") == index


def test_offsets_point_at_the_data_of_the_members(raw, tmp_path):
    index = make(raw, tmp_path / "out")
    shard = index.splits["train"].shards[1]
    data = (tmp_path / "out" / shard.name).read_bytes()
    member = shard.members[1]
    assert re.fullmatch("00000005-[0-9a-f]{8}", member.key)
    assert data[member.cls_offset : member.cls_offset + member.cls_bytes] == str(member.label).encode()
    with Image.open(io.BytesIO(data[member.jpg_offset : member.jpg_offset + member.jpg_bytes])) as picture:
        assert picture.size == (32, 32)
    note = json.loads(data[member.json_offset : member.json_offset + member.json_bytes])
    assert sorted(note) == ["extra", "identity", "landmarks", "source"]
    assert note["source"].startswith(f"train/{CLASSES[member.label]}/")


def test_landmarks_are_those_of_the_csv_in_pixels_of_the_stored_picture(raw, tmp_path):
    index = make(raw, tmp_path / "out")
    shard = index.splits["test"].shards[0]
    data = (tmp_path / "out" / shard.name).read_bytes()
    member = shard.members[0]
    note = json.loads(data[member.json_offset : member.json_offset + member.json_bytes])
    row = next(line for line in (raw / "landmarks.csv").read_text().splitlines() if line.startswith(note["source"]))
    points = np.array(row.split(",")[1:], float).reshape(68, 2)
    expected = (points + 0.5) * 0.8 - 0.5 + [0, 4]  # 40 x 30 -> 32 x 24, four rows of black above
    assert np.allclose(note["landmarks"], expected, atol=0.0006)


def test_tar_headers_tell_nothing_but_names_and_sizes(raw, tmp_path):
    make(raw, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        infos = tar.getmembers()
    key = load_index(tmp_path / "out").splits["val"].members[0].key
    assert [info.name for info in infos[:3]] == [f"{key}.jpg", f"{key}.cls", f"{key}.json"]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}


def test_the_bytes_do_not_depend_on_the_workers(raw, tmp_path):
    make(raw, tmp_path / "one", workers=1)
    make(raw, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_bytes_do_not_depend_on_where_the_raw_folder_is(raw, tmp_path):
    make(raw, tmp_path / "one")
    raw.rename(tmp_path / "moved")
    make(tmp_path / "moved", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_bad_pictures_are_listed_with_their_reason_and_leave_a_gap(raw, tmp_path):
    (raw / "test/happiness/00.png").write_bytes(b"")
    (raw / "test/happiness/notes.png").write_text("not a picture")
    index = make(raw, tmp_path / "out")
    assert [(bad.split, bad.source) for bad in index.bad_pictures] == [
        ("test", "test/happiness/00.png"),
        ("test", "test/happiness/notes.png"),
    ]
    assert "empty" in index.bad_pictures[0].reason
    order = sorted(path.relative_to(raw).as_posix() for path in raw.glob("test/*/*"))
    order.sort(key=lambda source: hashlib.sha256(source.encode()).digest())
    left = [i for i, source in enumerate(order) if source not in ("test/happiness/00.png", "test/happiness/notes.png")]
    assert [pack.position_of(member.key) for member in index.splits["test"].members] == left
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [bad["source"] for bad in report["bad_pictures"]] == ["test/happiness/00.png", "test/happiness/notes.png"]
    assert verify(tmp_path / "out") == []


def test_a_shard_of_bad_pictures_only_is_left_out(raw, tmp_path):
    for i in range(4, 9):
        write_picture(raw / f"test/anger/{i:02d}.png", i)
    sources = [path.relative_to(raw).as_posix() for path in raw.glob("test/*/*")]
    for source in sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())[:4]:
        (raw / source).write_bytes(b"broken")
    index = make(raw, tmp_path / "out")
    assert [shard.name for shard in index.splits["test"].shards] == ["test-000001.tar", "test-000002.tar"]
    assert not (tmp_path / "out" / "test-000000.tar").exists()
    assert verify(tmp_path / "out") == []


def test_a_class_whose_pictures_are_all_bad_is_refused_or_recorded_as_partial(raw, tmp_path):
    for path in raw.glob("test/happiness/*"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"without a single usable picture: test: 'happiness'.*--allow-partial"):
        make(raw, tmp_path / "out")
    index = make(raw, tmp_path / "out", allow_partial=True)
    assert "every picture of class 'happiness' in test is bad" in index.provenance["notes"]
    assert index.provenance["partial"] == {"test": {"happiness": [0, 1]}}


def test_names_that_are_no_expressions_are_noted_with_the_nearest():
    (note,) = pack._class_notes(("happiness", "suprise", "7"))
    assert "not recognised: 'suprise' (did you mean 'surprise'?), '7'" in note
    assert pack._class_notes(("happiness", "anger")) == []


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="has one class, 'images'"):
        pack._check_classes("folder", "listed", {"train": {"images": 3}}, ("images",), allow_partial=False)


def test_a_picture_under_two_classes_of_a_split_is_noted(raw, tmp_path):
    twin = raw / "test/anger/zz.png"
    twin.write_bytes((raw / "test/happiness/00.png").read_bytes())
    notes = make(raw, tmp_path / "out").provenance["notes"]
    assert "1 pictures of test are there under several classes, first: test/anger/zz.png = test/happiness/00.png" in notes


def test_a_picture_exchanged_for_one_of_the_same_size_in_bytes_is_noticed(raw, tmp_path):
    make(raw, tmp_path / "out")
    path = raw / "test/anger/00.png"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="have changed"):
        make(raw, tmp_path / "out")


def test_a_split_of_bad_pictures_only_is_an_error(raw, tmp_path):
    for path in raw.glob("test/*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"'test' has no usable picture; first of 4 .*test/anger/00.png"):
        make(raw, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_pictures_without_landmarks_are_kept_and_counted(raw, tmp_path):
    lines = (raw / "landmarks.csv").read_text().splitlines()
    (raw / "landmarks.csv").write_text("\n".join(line for line in lines if not line.startswith("test/anger/01")))
    index = make(raw, tmp_path / "out")
    assert index.provenance["samples_without_landmarks"] == {"train": 0, "val": 0, "test": 1}


def test_a_picture_or_person_in_two_splits_is_noted(raw, tmp_path):
    (raw / "test/anger/Ann_7.png").write_bytes((raw / "train/anger/03.png").read_bytes())
    write_picture(raw / "train/anger/Ann_1.png", 77)
    write_picture(raw / "train/anger/Bob_1.png", 78)
    index = make(raw, tmp_path / "out", options={**OPTIONS, "identity_pattern": "^([A-Z][a-z]+)_"})
    notes = "\n".join(index.provenance["notes"])
    assert "1 pictures are in both" in notes
    assert "train/anger/03.png = test/anger/Ann_7.png" in notes
    assert "1 people are in both" in notes


def test_running_again_does_nothing(raw, tmp_path):
    first = make(raw, tmp_path / "out")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    seen: list[Progress] = []
    assert make(raw, tmp_path / "out", on_progress=seen.append) == first
    assert [(p.done, p.reused) for p in seen] == [(16, 16)]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def test_other_options_are_refused_with_both_values_and_the_ways_out(raw, tmp_path):
    make(raw, tmp_path / "out")
    with pytest.raises(ValueError, match=r"option size was 32, now 48.*--out.*--overwrite"):
        make(raw, tmp_path / "out", options={**OPTIONS, "size": 48})


def test_changed_raw_files_are_refused(raw, tmp_path):
    make(raw, tmp_path / "out")
    write_picture(raw / "train/anger/99.png", 5)
    with pytest.raises(ValueError, match="raw folder have changed"):
        make(raw, tmp_path / "out")


def test_a_damaged_result_is_not_taken_for_done(raw, tmp_path):
    make(raw, tmp_path / "out")
    os.truncate(tmp_path / "out" / "test-000000.tar", 2000)
    with pytest.raises(ValueError, match=r"damaged.*test-000000.tar.*--overwrite"):
        make(raw, tmp_path / "out")


def test_overwrite_leaves_exactly_the_new_files(raw, tmp_path):
    make(raw, tmp_path / "out")
    make(raw, tmp_path / "other", options={"size": 48})
    make(raw, tmp_path / "out", options={"size": 48}, overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_a_folder_with_other_files_is_not_written_into(raw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"thesis.tex"):
            make(raw, tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == {"thesis.tex": b"precious"}


def test_two_writers_do_not_share_a_folder(raw, tmp_path):
    def second(_: Progress) -> None:
        with pytest.raises(ValueError, match="another process is preparing"):
            make(raw, tmp_path / "out")

    make(raw, tmp_path / "out", on_progress=second)
    assert verify(tmp_path / "out") == []


def test_a_kill_after_the_index_and_before_tidying_up_is_tidied_up(raw, tmp_path):
    make(raw, tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / ".prepare").mkdir()
    (tmp_path / "out" / ".prepare" / "plan.json").write_text("{}")
    (tmp_path / "out" / "val-000000.tar.0123abcd.partial").write_bytes(b"x")
    make(raw, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_copy_without_its_index_is_not_taken_for_a_start(raw, tmp_path):
    make(raw, tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"shards without an index.*--overwrite"):
        make(raw, tmp_path / "out")
    make(raw, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out") == []


class StopHereError(Exception):
    pass


def interrupt(raw, out, *, after):
    def stop(progress: Progress) -> None:
        if progress.done >= after:
            raise StopHereError

    with pytest.raises(StopHereError):
        make(raw, out, on_progress=stop)


def test_an_interrupted_prepare_has_no_index_and_is_continued(raw, tmp_path):
    make(raw, tmp_path / "whole")
    interrupt(raw, tmp_path / "out", after=8)
    assert not (tmp_path / "out" / "index.json").exists()
    seen: list[Progress] = []
    make(raw, tmp_path / "out", on_progress=seen.append)
    assert seen[0].reused == 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_damaged_since_is_made_again(raw, tmp_path):
    make(raw, tmp_path / "whole")
    interrupt(raw, tmp_path / "out", after=8)
    shard = tmp_path / "out" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    seen: list[Progress] = []
    make(raw, tmp_path / "out", on_progress=seen.append)
    assert seen[0].reused == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_of_other_options_is_not_continued(raw, tmp_path):
    make(raw, tmp_path / "whole", options={"size": 48})
    interrupt(raw, tmp_path / "out", after=8)
    seen: list[Progress] = []
    make(raw, tmp_path / "out", options={"size": 48}, on_progress=seen.append)
    assert seen[0].reused == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from bench.prepare import pack
from bench.datasets.folder import Folder
raw, out, deadly, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
read, reads = Folder.read, []
def deadly_read(self, item):
    reads.append(item)
    if len(reads) == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, item)
def deadly_progress(progress):
    import multiprocessing
    if workers == 1:
        Folder.read = deadly_read  # counts from the first shard on: landmarks are looked at before
    if workers > 1 and progress.done >= deadly:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    pack.SHARD_ITEMS = 4
    pack.prepare("folder", name="mine", options={"size": 32, "val_fraction": 0.25}, raw=raw, out=out, workers=workers,
                 on_progress=deadly_progress)
"""


def killed(tmp_path, raw, *, deadly, workers):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, "-P", str(script), str(raw), str(tmp_path / "out"), str(deadly), str(workers)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


@pytest.mark.parametrize("deadly", [1, 6, 16])
def test_kill_9_and_resume_gives_the_undisturbed_bytes(raw, tmp_path, deadly):
    make(raw, tmp_path / "whole")
    killed(tmp_path, raw, deadly=deadly, workers=1)
    assert not (tmp_path / "out" / "index.json").exists()
    assert any(path.name.endswith(".partial") for path in (tmp_path / "out").iterdir())
    make(raw, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.dist
def test_workers_end_with_a_killed_parent(raw, tmp_path):
    make(raw, tmp_path / "whole")
    children = [int(pid) for pid in killed(tmp_path, raw, deadly=4, workers=2).split()]
    assert children
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in children):
        assert time.monotonic() < deadline, "an orphaned worker is still there"
        time.sleep(0.05)
    make(raw, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


BROKEN_PLUGIN = """
from bench.dataset import DATASETS, Dataset, Face, Item
@DATASETS.register("{name}", title="t", license="none", embedded=True)
class Broken(Dataset):
    classes = ("a",)
    def splits(self):
        return {splits}
    def read(self, item):
        raise KeyError("no such column")
"""


def broken(tmp_path, name, splits):
    plugin = tmp_path / f"{name}.py"
    plugin.write_text(BROKEN_PLUGIN.format(name=name, splits=splits))
    return prepare(name, name=name, options={}, raw=None, out=tmp_path / "out", workers=1, plugins=[str(plugin)], allow_partial=True)


def test_an_error_in_a_datasets_own_code_names_the_picture(tmp_path):
    with pytest.raises(RuntimeError, match=r"Broken\.read failed on one\.jpg: KeyError"):
        broken(tmp_path, "broken_read", '{"train": [Item(source="one.jpg", label=0)]}')


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ('{"train": [Item(source="x", label=0)], "test": [Item(source="x", label=0)]}', "lists x twice: in train and in test"),
        ('{"train": []}', "'train' is empty"),
        ('{"train": [Item(source="x", label=1)]}', "x has class id 1"),
        ('{"training": [Item(source="x", label=0)]}', "'training'; splits are train, val, test"),
    ],
    ids=["twice", "empty", "label", "name"],
)
def test_an_impossible_listing_is_refused_before_anything_is_written(tmp_path, splits, words, request):
    name = "bad_" + request.node.callspec.id
    with pytest.raises(ValueError, match=words):
        broken(tmp_path, name, splits)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_noticed_before_the_start(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"GB are needed.*Choose another --out"):
        make(raw, tmp_path / "out")


def test_raw_and_out_must_differ_and_raw_must_exist(raw, tmp_path):
    with pytest.raises(ValueError, match="choose another --out"):
        make(raw, raw)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        make(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="--raw DIR"):
        make(None, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_fractoin": 0.1}, "no option 'val_fractoin'. Did you mean 'val_fraction'"),
        ({"val_fraction": "2"}, "val_fraction = '2' of dataset 'folder': Input should be less than 1"),
        ({"quality": 101}, "less than or equal to 100"),
        ({"identity_pattern": "abc"}, "has no group"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, words):
    with pytest.raises(ValueError, match=words):
        check_options(DATASETS, "folder", options)


def test_option_sets_of_an_embedded_dataset_live_side_by_side(tmp_path):
    plain = prepared_folder(tmp_path, name="synthetic", entry_name="synthetic", options={})
    second = prepared_folder(tmp_path, name="synthetic", entry_name="synthetic", options={"size": "64"})
    assert plain != second
    assert prepared_folder(tmp_path, name="synthetic", entry_name="synthetic", options={"size": 64}) == second
    assert prepared_folder(tmp_path, name="mine", entry_name="folder", options={}) == tmp_path / "mine"


def test_non_ascii_names_arrive_as_they_are(raw, tmp_path):
    write_picture(raw / "test/anger/Zoë Müller.png", 9)
    index = make(raw, tmp_path / "out")
    stored = b"".join((tmp_path / "out" / shard.name).read_bytes() for shard in index.splits["test"].shards)
    assert "Zoë Müller.png".encode() in stored


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_plain_webdataset_reads_every_sample_once_with_the_content_of_the_index(raw, tmp_path, split):
    shards = make(raw, tmp_path / "out").splits[split].shards
    for shard in shards:
        data = (tmp_path / "out" / shard.name).read_bytes()
        samples = list(webdataset.WebDataset(str(tmp_path / "out" / shard.name), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [member.key for member in shard.members]
        for sample, member in zip(samples, shard.members, strict=True):
            assert sample["jpg"] == data[member.jpg_offset : member.jpg_offset + member.jpg_bytes]
            assert int(sample["cls"]) == member.label
            assert sample["json"] == data[member.json_offset : member.json_offset + member.json_bytes]
            assert json.loads(sample["json"])["source"].startswith(f"{'test' if split == 'test' else 'train'}/")


def test_the_keys_of_other_pictures_are_others_in_every_split(raw, tmp_path):
    first = make(raw, tmp_path / "first")
    for path in raw.glob("*/*/*.png"):
        with Image.open(path) as picture:
            ImageOps.invert(picture.convert("RGB")).save(path)
    second = make(raw, tmp_path / "second")
    assert {name: split.samples for name, split in first.splits.items()} == {name: split.samples for name, split in second.splits.items()}
    assert all(first.splits[name].keys_sha256 != second.splits[name].keys_sha256 for name in ("train", "val", "test"))


def test_the_keys_of_the_same_pictures_are_the_same_with_any_number_of_workers(raw, tmp_path):
    alone, together = (make(raw, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    assert {name: split.keys_sha256 for name, split in alone.splits.items()} == {
        name: split.keys_sha256 for name, split in together.splits.items()
    }


def test_a_dataset_whose_keys_are_bare_positions_verifies_and_is_read(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PACKER", "bench.data.pack 2")
    monkeypatch.setattr(pack, "_key", lambda position, digest: f"{position:08d}")
    index = make(raw, tmp_path / "out")
    assert index.splits["val"].members[0].key == "00000000"
    monkeypatch.undo()
    assert verify(tmp_path / "out") == []
    (batch,) = open_reader(tmp_path / "out", "train").train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=8)
    assert sorted(batch.positions.tolist()) == list(range(8))


def test_a_picture_exchanged_for_one_of_the_same_size_is_noticed(raw, tmp_path):
    file, second = raw / "test/happiness/00.bmp", raw / "test/anger/00.bmp"
    for path, shade in ((file, 30), (second, 200)):
        Image.new("RGB", (16, 16), (shade,) * 3).save(path)
    index = make(raw, tmp_path / "out")
    assert make(raw, tmp_path / "out") == index
    file.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="were exchanged for others of the same size"):
        make(raw, tmp_path / "out")


def test_pictures_that_were_moved_and_are_the_same_are_prepared_already(raw, tmp_path):
    index = make(raw, tmp_path / "out")
    raw.rename(tmp_path / "moved")
    assert make(tmp_path / "moved", tmp_path / "out") == index
