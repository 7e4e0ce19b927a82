"""The reader on tiny shards: exactly once, equal steps, continuing, and damage that is never silent."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data import samples
from bench.data.batch import key_hash
from bench.data.index import Index, hash_keys
from bench.data.readers import open_reader

from .shards import describe, jpeg, landmarks, members_of, tar_bytes, write_dataset

SIZES = (7, 4, 9, 5)
SAMPLES = sum(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers") / "tiny"
    write_dataset(folder, shard_sizes=SIZES)
    return folder


def opened(folder, *, workers=0, **options):
    # Worker processes are an uncached reader's business.
    return open_reader(folder, "train", workers=workers, **{"cache_bytes": 0, **options})


def positions_of(batches):
    return [position for batch in batches for position in batch.positions.tolist()]


def same(first, second):
    return all(torch.equal(getattr(first, f.name).nan_to_num(), getattr(second, f.name).nan_to_num()) for f in dataclasses.fields(first))


def edit_index(folder, change):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# What is read


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_evaluation_sees_each_sample_exactly_once(folder, world, workers):
    reader = opened(folder, workers=workers)
    seen = [p for rank in range(world) for p in positions_of(reader.eval_batches(rank=rank, world_size=world, batch_size=4))]
    index = Index.model_validate_json((folder / "index.json").read_bytes())
    assert len(seen) == SAMPLES
    assert hash_keys(reader.keys[p] for p in seen) == index.splits["train"].keys_sha256


def test_evaluation_with_more_ranks_than_samples_leaves_some_empty(tmp_path):
    write_dataset(tmp_path, shard_sizes=(2, 1))
    reader = opened(tmp_path)
    shares = [positions_of(reader.eval_batches(rank=rank, world_size=5, batch_size=4)) for rank in range(5)]
    assert sorted(map(len, shares)) == [0, 0, 1, 1, 1]
    assert sorted(p for share in shares for p in share) == [0, 1, 2]


def test_batches_hold_the_stored_samples(folder):
    reader = opened(folder)
    for batch in reader.eval_batches(rank=0, world_size=1, batch_size=6):
        for i, position in enumerate(batch.positions.tolist()):
            picture = np.asarray(Image.open(io.BytesIO(jpeg(position, 16))).convert("RGB"))
            assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), picture)
            assert batch.labels[i] == position % 3 == reader.labels[position]
            assert batch.hashes[i] == key_hash(reader.keys[position])
            points = landmarks(position)
            expected = torch.full((68, 2), torch.nan) if points is None else torch.tensor(points)
            assert torch.equal(batch.landmarks[i].nan_to_num(-1), expected.nan_to_num(-1))
        assert (batch.images.dtype, batch.landmarks.dtype, batch.labels.dtype) == (torch.uint8, torch.float32, torch.int64)


def test_cached_batches_equal_those_from_disk(folder):
    arguments = {"seed": 3, "epoch": 1, "rank": 0, "world_size": 2, "batch_size": 6}
    cached = list(open_reader(folder, "train").train_steps(**arguments))
    disk = list(opened(folder).train_steps(**arguments))
    assert len(cached) == len(disk) == 4
    assert all(map(same, cached, disk))


@pytest.mark.parametrize("number", range(3))
def test_both_jpeg_decoders_agree_to_the_bit(number):
    assert torch.equal(samples.decode_with_torchvision(jpeg(number, 48)), samples.decode_with_pillow(jpeg(number, 48)))


@pytest.mark.parametrize("decode", [samples.decode_with_torchvision, samples.decode_with_pillow])
@pytest.mark.parametrize("data", [jpeg(0, 48)[:300], jpeg(0, 48)[:-40], b"", b"GIF89a" + bytes(20)])
def test_jpeg_decoders_refuse_what_is_not_a_whole_jpeg(decode, data):
    with pytest.raises((RuntimeError, ValueError, OSError)):
        decode(data)


def test_cached_reader_decodes_no_sample_twice(folder, monkeypatch):
    calls = []
    decode = samples.decode_jpeg
    monkeypatch.setattr(samples, "decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k))
    reader = open_reader(folder, "train")
    for epoch in range(3):
        list(reader.train_steps(seed=0, epoch=epoch, rank=0, world_size=1, batch_size=5))
    assert len(calls) == SAMPLES


def test_keys_with_dots_stay_apart(tmp_path):
    write_dataset(tmp_path, shard_sizes=(3, 2), key="img.v1.{:04d}")
    seen = positions_of(opened(tmp_path).eval_batches(rank=0, world_size=1, batch_size=2))
    assert sorted(seen) == [0, 1, 2, 3, 4]


# Training


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0)])
def test_ranks_take_equal_steps_of_disjoint_samples(folder, world, workers):
    reader = opened(folder, workers=workers)
    ranks = [list(reader.train_steps(seed=0, epoch=0, rank=r, world_size=world, batch_size=2 * world)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {SAMPLES // (2 * world)}
    assert {len(batch) for batches in ranks for batch in batches} == {2}
    seen = [p for batches in ranks for p in positions_of(batches)]
    assert len(seen) == len(set(seen)) == SAMPLES // (2 * world) * (2 * world)


@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_at_a_step_is_the_tail_of_the_whole_pass(folder, workers):
    arguments = {"seed": 1, "epoch": 2, "rank": 1, "world_size": 2, "batch_size": 6}
    reader = opened(folder, workers=workers)
    whole = list(reader.train_steps(**arguments))
    for start in range(len(whole) + 1) if not workers else (1, 3):
        rest = list(reader.train_steps(**arguments, start_step=start))
        assert len(rest) == len(whole) - start
        assert all(map(same, rest, whole[start:]))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_skipped_steps_are_not_decoded(folder, monkeypatch, cache_bytes):
    calls = []
    decode = samples.decode_jpeg
    monkeypatch.setattr(samples, "decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k))
    reader = opened(folder, cache_bytes=cache_bytes)
    list(reader.train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5, start_step=3))
    assert len(calls) == 10


def test_order_is_a_function_of_seed_and_epoch(folder):
    def order(seed, epoch):
        return positions_of(opened(folder).train_steps(seed=seed, epoch=epoch, rank=0, world_size=1, batch_size=5))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_stray_variables_of_the_environment_do_not_change_the_data(folder, monkeypatch):
    before = positions_of(opened(folder).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "3"}.items():
        monkeypatch.setenv(name, value)
    assert positions_of(opened(folder).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5)) == before


def test_global_batches_do_not_depend_on_world_size_or_workers(folder):
    def batches(world, workers):
        reader = opened(folder, workers=workers)
        ranks = [reader.train_steps(seed=0, epoch=0, rank=r, world_size=world, batch_size=6) for r in range(world)]
        return [positions_of(parts) for parts in zip(*ranks, strict=True)]

    assert batches(1, 0) == batches(2, 2) == batches(3, 0)


def test_class_balance_draws_classes_equally(tmp_path):
    write_dataset(tmp_path, shard_sizes=(10,))  # labels 4, 3, 3
    reader = open_reader(tmp_path, "train", balance="class")
    labels = torch.cat([b.labels for b in reader.train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=10)])
    assert sorted(torch.bincount(labels).tolist()) == [3, 3, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_random_numbers_of_the_model_alone(folder, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(opened(folder, workers=workers).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_readers_survive_spawned_workers(folder):
    reader = opened(folder)
    next(reader.eval_batches(rank=0, world_size=1, batch_size=2))  # files are open now
    copy = pickle.loads(pickle.dumps(reader._disk))
    assert torch.equal(copy.decode(11)[0], reader._disk.decode(11)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_pictures_lie_in_pinned_memory_where_there_is_a_gpu(folder, cache_bytes):
    for batch in opened(folder, cache_bytes=cache_bytes).eval_batches(rank=0, world_size=1, batch_size=4):
        assert batch.images.is_pinned()
        assert same(batch, batch.to(torch.device("cuda")).to(torch.device("cpu")))


# Damage


@pytest.fixture
def damaged(tmp_path):
    """One shard of 6 samples; returns a function that replaces its bytes and reads everything."""
    index = write_dataset(tmp_path, shard_sizes=(6,))
    shard = index.splits["train"].shards[0]
    path = tmp_path / shard.name
    original = path.read_bytes()

    def read(data, *, workers=0, **options):
        path.write_bytes(data)
        return list(opened(tmp_path, workers=workers, **options).eval_batches(rank=0, world_size=1, batch_size=4))

    read.folder, read.shard, read.original = tmp_path, shard, original
    return read


def cuts(shard):
    """Ends of a broken copy, and the key of the first sample it has lost."""
    third = shard.members[3]
    return {
        "inside data": third.jpg_offset + third.jpg_bytes // 2,
        "at a block boundary": third.jpg_offset - 512,
        "inside a header": third.jpg_offset - 300,
        "between jpg and cls": third.cls_offset - 512,
    }


CUTS = ("inside data", "at a block boundary", "inside a header", "between jpg and cls")


@pytest.mark.parametrize("cut", CUTS)
def test_short_shard_names_shard_and_first_lost_sample(damaged, cut):
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*bench data verify"):
        damaged(damaged.original[: cuts(damaged.shard)[cut]], verify=False)


def test_shard_cut_while_in_use_names_shard_and_sample(damaged):
    reader = opened(damaged.folder)
    batches = reader.eval_batches(rank=0, world_size=1, batch_size=1)
    next(batches)
    with (damaged.folder / damaged.shard.name).open("r+b") as file:
        file.truncate(damaged.shard.members[3].cls_offset)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*ends inside its cls member"):
        list(batches)


def test_flipped_byte_in_data_is_found_by_the_hash(damaged):
    data = bytearray(damaged.original)
    data[damaged.shard.members[3].json_offset + 16] ^= 1
    with pytest.raises(ValueError, match=r"train-000000\.tar.*sha256.*bench data verify"):
        damaged(bytes(data))


def test_shard_is_hashed_before_the_first_batch_of_a_local_reader(damaged):
    (damaged.folder / damaged.shard.name).write_bytes(damaged.original[:-1] + b"x")
    reader = opened(damaged.folder)
    with pytest.raises(ValueError, match="sha256"):
        reader.eval_batches(rank=0, world_size=1, batch_size=4)


def test_empty_and_missing_shards_are_named(damaged):
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000000'.*0 bytes"):
        damaged(b"")
    (damaged.folder / damaged.shard.name).unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar.*does not exist"):
        opened(damaged.folder).eval_batches(rank=0, world_size=1, batch_size=4)


def test_a_byte_that_changes_after_the_hashes_were_compared_is_found(tmp_path):
    index = write_dataset(tmp_path, shard_sizes=(6,))
    shard = index.splits["train"].shards[0]
    reader = opened(tmp_path, cache_bytes=0)
    list(reader.eval_batches(rank=0, world_size=1, batch_size=4))
    data = bytearray((tmp_path / shard.name).read_bytes())
    member = shard.members[3]
    data[member.jpg_offset + member.jpg_bytes - 10] ^= 1  # still a picture, another one
    with (tmp_path / shard.name).open("r+b") as file:
        file.write(data)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*not that of the index"):
        list(reader.eval_batches(rank=0, world_size=1, batch_size=4))


def test_batches_of_workers_do_not_lie_in_shared_memory(folder):
    (batch, *_) = opened(folder, workers=1).eval_batches(rank=0, world_size=1, batch_size=5)
    assert not any(getattr(batch, field.name).is_shared() for field in dataclasses.fields(batch))


def test_worker_processes_pass_on_the_names(damaged):
    data = bytearray(damaged.original)
    member = damaged.shard.members[3]
    data[member.jpg_offset : member.jpg_offset + member.jpg_bytes] = bytes(member.jpg_bytes)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*(cannot be decoded|not that of the index)"):
        damaged(bytes(data), workers=2, verify=False)
    assert not multiprocessing.active_children()  # and end at once, not when the error is collected


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("cls", b"2", "class b'2' where the index says 0"),
        ("cls", b"x", "class b'x' where the index says 0"),
        ("json", b"[]", "not an annotation with landmarks"),
        ("json", b"{", "not an annotation with landmarks"),
        ("json", b'{"landmarks": [[1, 2]]}', "68 finite points"),
        ("json", b'{"landmarks": ' + json.dumps([[float("nan"), 0.0]] * 68).encode() + b"}", "68 finite points"),
        ("jpg", jpeg(3, 24), "24 x 24 where the index says 16 x 16"),
        ("jpg", jpeg(3, 16)[:-40], "cannot be decoded"),
        ("jpg", b"not a picture", "cannot be decoded"),
    ],
)
def test_wrong_member_names_shard_and_sample(tmp_path, suffix, content, message):
    index = write_dataset(tmp_path, shard_sizes=(6,))
    stored = [(f"{n:08d}", members_of(n, 16)) for n in range(6)]
    stored[3][1][suffix] = content
    data = tar_bytes(stored)
    honest = [(key, {**members, "cls": str(n % 3).encode()}) for n, (key, members) in enumerate(stored)]
    shard = describe(index.splits["train"].shards[0].name, data, honest)
    # As in an index without checksums of samples: else those would tell first.
    shard = shard.model_copy(update={"members": tuple(member._replace(crc32=None) for member in shard.members)})
    (tmp_path / shard.name).write_bytes(data)
    edit_index(tmp_path, lambda content: content["splits"]["train"].update(shards=[shard.model_dump(mode="json")]))
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*" + message):
        list(opened(tmp_path).eval_batches(rank=0, world_size=1, batch_size=4))


# Options


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "-rf.tar", "a b.tar", "x;true.tar"])
def test_shard_name_that_could_leave_the_folder_is_refused(tmp_path, name):
    write_dataset(tmp_path, shard_sizes=(2,))
    edit_index(tmp_path, lambda content: content["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="not a plain relative path"):
        open_reader(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split.update(samples=3), "3 samples, but 2 members"),
        (lambda split: split.update(keys_sha256="0"), "not those of keys_sha256"),
        (lambda split: split["shards"][0].update(samples=3), "lists 2 members for 3 samples"),
        (lambda split: split["class_counts"].update(calm=2), "do not add up to class_counts"),
        (lambda split: split["shards"][0]["members"][0].__setitem__(1, 9), "outside the 3 classes"),
    ],
)
def test_index_that_contradicts_itself_is_refused(tmp_path, change, message):
    write_dataset(tmp_path, shard_sizes=(2,))
    edit_index(tmp_path, lambda content: change(content["splits"]["train"]))
    with pytest.raises(ValueError, match=message):
        open_reader(tmp_path, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "Did you mean 'train'"),
        ({"workers": -1}, "must be 0"),
        ({"balance": "classes"}, "Did you mean 'class'"),
    ],
)
def test_wrong_option_is_refused_with_a_hint(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_reader(folder, **{"split": "train", **options})
