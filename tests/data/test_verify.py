from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.data.index import load_index
from bench.data.verify import verify
from bench.prepare import pack
from bench.prepare.pack import prepare

SHARD = "train-000000.tar"
# What keys begin with: the rest comes from the picture.
KEY = "00000003"
LAST = "00000005"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three splits; train: one shard of six samples."""
    base = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    header = ",".join(["path", *(f"{axis}{i}" for i in range(68) for axis in "xy")])
    rows = [header]
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for name in ("fear", "joy"):
            for i in range(count):
                source = f"{split}/{name}/{i}.png"
                (base / "raw" / source).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(base / "raw" / source)
                rows.append(",".join([source, *map(str, rng.integers(0, 24, 136))]))
    (base / "raw" / "landmarks.csv").write_text("\n".join(rows))
    prepare("folder", name="mine", options={"size": 24}, raw=base / "raw", out=base / "out", workers=1)
    return base / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def member_of(folder, key=KEY):
    return next(m for m in load_index(folder).splits["train"].members if begins(m) == key)


def begins(problem):
    """The position in the key of a member or a problem."""
    return problem.key and problem.key[:8]


def change_index(folder, change):
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    (folder / "index.json").write_text(json.dumps(raw))


def rewrite(folder, data, *, forge=False):
    """Put other bytes into the shard; ``forge`` makes the index agree, as one who means harm would."""
    (folder / SHARD).write_bytes(data)
    if forge:

        def agree(raw):
            raw["splits"]["train"]["shards"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        change_index(folder, agree)


def flip(folder, position, *, forge=False):
    data = bytearray((folder / SHARD).read_bytes())
    data[position] ^= 0x11
    rewrite(folder, bytes(data), forge=forge)


def named(problems):
    return {(p.shard, begins(p)) for p in problems}


def test_a_whole_dataset_has_no_problems(folder):
    assert verify(folder) == []
    assert verify(folder, workers=2) == []


# FIELD notes, C6: what tar readers take silently. (where to cut, the first sample that is lost)
CUTS = {
    "inside a picture": (lambda m: m.jpg_offset + 100, KEY),
    "at the block before a sample": (lambda m: m.jpg_offset - 512, KEY),
    "inside a header": (lambda m: m.jpg_offset - 300, KEY),
    "between jpg and cls": (lambda m: m.cls_offset - 512, KEY),
    "between cls and json": (lambda m: m.json_offset - 512, KEY),
    "empty file": (lambda m: 0, "00000000"),
}


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_shard_is_found_and_the_first_lost_sample_named(folder, cut, deep):
    where, key = CUTS[cut]
    os.truncate(folder / SHARD, where(member_of(folder)))
    assert (SHARD, key) in named(verify(folder, deep=deep))


def test_missing_end_blocks_are_found_after_the_last_sample(folder):
    last = member_of(folder, LAST)
    os.truncate(folder / SHARD, last.json_offset + -(-last.json_bytes // 512) * 512)
    assert any(begins(p) == LAST and "end the archive" in p.what for p in verify(folder))


def test_a_missing_shard_is_found(folder):
    (folder / SHARD).unlink()
    assert (SHARD, "00000000") in named(verify(folder, deep=False))


FLIPS = {
    "name in a header": (lambda m: m.jpg_offset - 512 + 4, "header"),
    "size in a header": (lambda m: m.cls_offset - 512 + 130, "header"),
    "checksum in a header": (lambda m: m.json_offset - 512 + 150, "header"),
    "jpg data": (lambda m: m.jpg_offset + m.jpg_bytes // 2, "checksum"),
    "cls data": (lambda m: m.cls_offset, "cls member"),
    "json data": (lambda m: m.json_offset + 40, "checksum"),
    "padding": (lambda m: m.cls_offset + m.cls_bytes + 9, "padding"),
}


@pytest.mark.parametrize("place", FLIPS)
@pytest.mark.parametrize("forge", [False, True], ids=["", "hash forged"])
def test_a_flipped_byte_is_found_in_its_sample(folder, place, forge):
    where, words = FLIPS[place]
    flip(folder, where(member_of(folder)), forge=forge)
    problems = verify(folder)
    assert any(p.shard == SHARD and begins(p) == KEY and words in p.what for p in problems), problems
    assert {begins(p) for p in problems} <= {KEY, None}
    assert forge or any("sha256" in p.what for p in problems)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_flipped_byte_goes_unnoticed(prepared, folder, share):
    whole = (prepared / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole)
    position = int(share * len(whole))
    members = load_index(folder).splits["train"].members
    owner = [begins(m) for m in members if m.jpg_offset - 512 <= position][-1]
    flip(folder, position)
    assert (SHARD, owner) in named(verify(folder))


class Harm:
    def __reduce__(self):
        return (os.mkdir, (os.environ["HARM"],))


def with_pickle(data, *, position):
    """The shard with a pickle between two members."""
    buffer = io.BytesIO()
    payload = pickle.dumps(Harm())
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(f"{KEY}.pkl")
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    block = buffer.getvalue()[: 512 + -(-len(payload) // 512) * 512]
    return data[:position] + block + data[position:], len(block)


@pytest.mark.parametrize("forge", [False, True], ids=["", "hash forged"])
@pytest.mark.parametrize("place", ["inside", "at the end"])
def test_a_pickle_in_a_shard_is_reported_and_never_run(folder, tmp_path, monkeypatch, forge, place):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    member = member_of(folder, KEY if place == "inside" else LAST)
    position = member.json_offset + -(-member.json_bytes // 512) * 512
    data, shift = with_pickle((folder / SHARD).read_bytes(), position=position)
    rewrite(folder, data, forge=forge)
    if forge:

        def move(raw):
            for m in raw["splits"]["train"]["shards"][0]["members"]:
                for place in (2, 4, 6):
                    m[place] += shift * (m[place] > position)

        change_index(folder, move)
    problems = verify(folder)
    assert any(p.shard == SHARD and p.key is not None and f"{KEY}.pkl" in p.what for p in problems), problems
    assert not (tmp_path / "harm").exists()


def test_two_samples_that_changed_places_are_found(folder):
    data = (folder / SHARD).read_bytes()
    a, b = member_of(folder, "00000001"), member_of(folder, "00000002")
    ja, jb = (data[m.json_offset : m.json_offset + m.json_bytes] for m in (a, b))
    assert a.json_bytes != b.json_bytes or ja != jb
    size = min(a.json_bytes, b.json_bytes)
    swapped = bytearray(data)
    swapped[a.json_offset : a.json_offset + size] = jb[:size]
    rewrite(folder, bytes(swapped), forge=True)
    assert (SHARD, "00000001") in named(verify(folder))


def first_member(raw):
    return raw["splits"]["train"]["shards"][0]["members"][0]


LIES = {
    "label": (lambda raw: first_member(raw).__setitem__(1, 1), "class id 1 is declared"),
    "impossible label": (lambda raw: first_member(raw).__setitem__(1, 7), "class id 7 of 2 classes"),
    "key": (lambda raw: first_member(raw).__setitem__(0, "00000009"), "do not have the hash"),
    "offset": (lambda raw: first_member(raw).__setitem__(4, first_member(raw)[4] + 512), "declared at"),
    "counts": (lambda raw: raw["splits"]["val"]["class_counts"].update(fear=2), "counts per class"),
    "samples": (lambda raw: raw["splits"]["val"].update(samples=3), "counts 3 samples but lists 2"),
    "shard samples": (lambda raw: raw["splits"]["val"]["shards"][0].update(samples=3), "counts 3 samples but lists 2"),
    "image size": (lambda raw: raw.update(image_size=25), "24 x 24 RGB, 25 x 25"),
    "path": (lambda raw: raw["splits"]["val"]["shards"][0].update(name="../val-000000.tar"), "no plain file name"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_found(folder, lie):
    change, words = LIES[lie]
    change_index(folder, change)
    assert any(words in p.what for p in verify(folder))


@pytest.mark.parametrize("name", ["train-000001.tar", "evil.pkl", "val-000000.tar.ab.partial"])
def test_a_file_the_index_does_not_declare_is_reported(folder, name):
    (folder / name).write_bytes(b"?")
    assert [p.what for p in verify(folder, deep=False)] == [f"{name} is not declared in index.json"]


@pytest.mark.parametrize(
    ("landmarks", "good"),
    [
        (None, True),
        ([[1, 2.5]] * 68, True),
        ([[1, 2]] * 67, False),
        ([[1, float("nan")]] * 68, False),
        ("x", False),
        ([[1, "2"]] * 68, False),
    ],
)
def test_landmarks_must_be_null_or_68_finite_points(landmarks, good):
    from bench.data.verify import _annotation_problems

    note = json.dumps({"landmarks": landmarks, "identity": None, "source": "a"}).encode()
    assert (list(_annotation_problems(note)) == []) == good


def test_a_picture_that_claims_to_be_huge_is_not_unpacked(folder):
    from bench.data.verify import _picture_problems

    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(buffer, "JPEG")
    assert "3000 x 3000" in next(_picture_problems(buffer.getvalue(), 24))


def test_a_png_under_the_name_of_a_jpg_is_refused():
    from bench.data.verify import _picture_problems

    buffer = io.BytesIO()
    Image.new("RGB", (24, 24)).save(buffer, "PNG")
    assert "cannot be decoded" in next(_picture_problems(buffer.getvalue(), 24))


def test_progress_counts_samples(folder):
    seen = []
    verify(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 10), (8, 10), (10, 10)]


def test_a_problem_says_where_it_is(folder):
    flip(folder, member_of(folder).cls_offset)
    assert any(str(p).startswith(f"shard {SHARD}, sample {member_of(folder).key}: ") for p in verify(folder))


def test_the_shards_are_those_of_the_packer_version(prepared):
    assert load_index(prepared).packer == pack.PACKER
