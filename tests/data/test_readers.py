"""Both readers on tiny shards: exactly once, equal steps, continuing, and damage that is never silent."""

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

from bench.data import plan, samples
from bench.data.batch import key_hash
from bench.data.index import Index, hash_keys
from bench.data.readers import open_reader

from .shards import describe, jpeg, landmarks, members_of, tar_bytes, write_dataset

SIZES = (7, 4, 9, 5)
SAMPLES = sum(SIZES)
KINDS = ("indexed", "stream")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers") / "tiny"
    write_dataset(folder, shard_sizes=SIZES)
    return folder


def opened(folder, kind, *, workers=0, **options):
    # Worker processes are an uncached reader's business.
    return open_reader(folder, "train", kind=kind, workers=workers, **{"cache_bytes": 0, **options})


def positions_of(batches):
    return [position for batch in batches for position in batch.positions.tolist()]


def same(first, second):
    return all(torch.equal(getattr(first, f.name).nan_to_num(), getattr(second, f.name).nan_to_num()) for f in dataclasses.fields(first))


def far(folder):
    """An address: shards behind it are not looked at before they are read."""
    return f"file://{folder}"


def edit_index(folder, change):
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# What is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (3, 2)])
def test_evaluation_sees_each_sample_exactly_once(folder, kind, world, workers):
    reader = opened(folder, kind, workers=workers)
    seen = [p for rank in range(world) for p in positions_of(reader.eval_batches(rank=rank, world_size=world, batch_size=4))]
    index = Index.model_validate_json((folder / "index.json").read_bytes())
    assert len(seen) == SAMPLES
    assert hash_keys(reader.keys[p] for p in seen) == index.splits["train"].keys_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_with_more_ranks_than_samples_leaves_some_empty(tmp_path, kind):
    write_dataset(tmp_path, shard_sizes=(2, 1))
    reader = opened(tmp_path, kind)
    shares = [positions_of(reader.eval_batches(rank=rank, world_size=5, batch_size=4)) for rank in range(5)]
    assert sorted(map(len, shares)) == [0, 0, 1, 1, 1]
    assert sorted(p for share in shares for p in share) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_stored_samples(folder, kind):
    reader = opened(folder, kind)
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
    disk = list(opened(folder, "indexed").train_steps(**arguments))
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


@pytest.mark.parametrize("kind", KINDS)
def test_keys_with_dots_stay_apart(tmp_path, kind):
    write_dataset(tmp_path, shard_sizes=(3, 2), key="img.v1.{:04d}")
    seen = positions_of(opened(tmp_path, kind).eval_batches(rank=0, world_size=1, batch_size=2))
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_shards_behind_an_address_need_only_the_index_in_the_folder(folder, tmp_path):
    (tmp_path / "index.json").write_bytes((folder / "index.json").read_bytes())
    reader = opened(tmp_path, "stream", base_url=far(folder))
    assert sorted(positions_of(reader.eval_batches(rank=0, world_size=1, batch_size=4))) == list(range(SAMPLES))


# Training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0), (3, 2)])
def test_ranks_take_equal_steps_of_disjoint_samples(folder, kind, world, workers):
    reader = opened(folder, kind, workers=workers)
    ranks = [list(reader.train_steps(seed=0, epoch=0, rank=r, world_size=world, batch_size=2 * world)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {SAMPLES // (2 * world)}
    assert {len(batch) for batches in ranks for batch in batches} == {2}
    seen = [p for batches in ranks for p in positions_of(batches)]
    assert len(seen) == len(set(seen)) == SAMPLES - plan.remainder(samples=SAMPLES, batch_size=2 * world)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_at_a_step_is_the_tail_of_the_whole_pass(folder, kind, workers):
    arguments = {"seed": 1, "epoch": 2, "rank": 1, "world_size": 2, "batch_size": 6}
    reader = opened(folder, kind, workers=workers)
    whole = list(reader.train_steps(**arguments))
    for start in range(len(whole) + 1) if not workers else (1, 3):
        rest = list(reader.train_steps(**arguments, start_step=start))
        assert len(rest) == len(whole) - start
        assert all(map(same, rest, whole[start:]))


@pytest.mark.parametrize(("kind", "cache_bytes"), [("indexed", 0), ("indexed", 1 << 30), ("stream", 0)])
def test_skipped_steps_are_not_decoded(folder, monkeypatch, kind, cache_bytes):
    calls = []
    decode = samples.decode_jpeg
    monkeypatch.setattr(samples, "decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k))
    reader = opened(folder, kind, cache_bytes=cache_bytes)
    list(reader.train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5, start_step=3))
    assert len(calls) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_order_is_a_function_of_seed_and_epoch(folder, kind):
    def order(seed, epoch):
        return positions_of(opened(folder, kind).train_steps(seed=seed, epoch=epoch, rank=0, world_size=1, batch_size=5))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_stray_variables_of_the_environment_do_not_change_the_data(folder, kind, monkeypatch):
    before = positions_of(opened(folder, kind).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "WORKER": "1", "NUM_WORKERS": "3"}.items():
        monkeypatch.setenv(name, value)
    assert positions_of(opened(folder, kind).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5)) == before


def test_indexed_global_batches_do_not_depend_on_world_size_or_workers(folder):
    def batches(world, workers):
        reader = opened(folder, "indexed", workers=workers)
        ranks = [reader.train_steps(seed=0, epoch=0, rank=r, world_size=world, batch_size=6) for r in range(world)]
        return [positions_of(parts) for parts in zip(*ranks, strict=True)]

    assert batches(1, 0) == batches(2, 2) == batches(3, 0)


def test_stream_order_mixes_shards_and_samples(folder):
    seen = positions_of(opened(folder, "stream").train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))
    shard = np.repeat(np.arange(len(SIZES)), SIZES)[seen]
    assert np.count_nonzero(np.diff(shard)) > len(SIZES)
    assert seen != sorted(seen)


def test_class_balance_draws_classes_equally(tmp_path):
    write_dataset(tmp_path, shard_sizes=(10,))  # labels 4, 3, 3
    reader = open_reader(tmp_path, "train", balance="class")
    labels = torch.cat([b.labels for b in reader.train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=10)])
    assert sorted(torch.bincount(labels).tolist()) == [3, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_random_numbers_of_the_model_alone(folder, kind, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(opened(folder, kind, workers=workers).train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_readers_survive_spawned_workers(folder):
    reader = opened(folder, "indexed")
    next(reader.eval_batches(rank=0, world_size=1, batch_size=2))  # files are open now
    copy = pickle.loads(pickle.dumps(reader._disk))
    assert torch.equal(copy.decode(11)[0], reader._disk.decode(11)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "cache_bytes"), [("indexed", 0), ("indexed", 1 << 30), ("stream", 0)])
def test_pictures_lie_in_pinned_memory_where_there_is_a_gpu(folder, kind, cache_bytes):
    for batch in opened(folder, kind, cache_bytes=cache_bytes).eval_batches(rank=0, world_size=1, batch_size=4):
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

    def read(data, kind, *, workers=0, **options):
        path.write_bytes(data)
        return list(opened(tmp_path, kind, workers=workers, **options).eval_batches(rank=0, world_size=1, batch_size=4))

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
@pytest.mark.parametrize("how", ["indexed", "stream", "stream from an address"])
def test_short_shard_names_shard_and_first_lost_sample(damaged, cut, how):
    options = {"base_url": far(damaged.folder)} if how == "stream from an address" else {}
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*bench data verify"):
        damaged(damaged.original[: cuts(damaged.shard)[cut]], how.split()[0], verify=False, **options)


def test_shard_cut_while_in_use_names_shard_and_sample(damaged):
    reader = opened(damaged.folder, "indexed")
    batches = reader.eval_batches(rank=0, world_size=1, batch_size=1)
    next(batches)
    with (damaged.folder / damaged.shard.name).open("r+b") as file:
        file.truncate(damaged.shard.members[3].cls_offset)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*ends inside its cls member"):
        list(batches)


def test_flipped_byte_in_a_header_stops_the_stream_with_names(damaged):
    data = bytearray(damaged.original)
    data[damaged.shard.members[3].jpg_offset - 512 + 3] ^= 1
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'"):
        damaged(bytes(data), "stream", verify=False)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_byte_in_data_is_found_by_the_hash(damaged, kind):
    data = bytearray(damaged.original)
    data[damaged.shard.members[3].json_offset + 16] ^= 1
    with pytest.raises(ValueError, match=r"train-000000\.tar.*sha256.*bench data verify"):
        damaged(bytes(data), kind)


def test_flipped_byte_behind_an_address_names_the_sample_before_it_is_used(damaged):
    data = bytearray(damaged.original)
    data[damaged.shard.members[3].json_offset + 16] ^= 1
    (damaged.folder / damaged.shard.name).write_bytes(data)
    batches = opened(damaged.folder, "stream", base_url=far(damaged.folder)).eval_batches(rank=0, world_size=1, batch_size=1)
    assert positions_of(next(batches) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*crc32"):
        next(batches)


def test_changed_padding_behind_an_address_is_found_by_the_hash(damaged):
    with pytest.raises(ValueError, match=r"train-000000\.tar.*sha256.*bench data verify"):
        damaged(damaged.original[:-1] + b"x", "stream", base_url=far(damaged.folder))


def test_shard_is_hashed_before_the_first_batch_of_a_local_reader(damaged):
    (damaged.folder / damaged.shard.name).write_bytes(damaged.original[:-1] + b"x")
    reader = opened(damaged.folder, "indexed")
    with pytest.raises(ValueError, match="sha256"):
        reader.eval_batches(rank=0, world_size=1, batch_size=4)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_missing_shards_are_named(damaged, kind):
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000000'.*0 bytes"):
        damaged(b"", kind)
    (damaged.folder / damaged.shard.name).unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar.*does not exist"):
        opened(damaged.folder, kind).eval_batches(rank=0, world_size=1, batch_size=4)


def test_missing_shard_behind_an_address_is_named(damaged):
    reader = opened(damaged.folder, "stream", base_url=far(damaged.folder / "elsewhere"))
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000000'.*No such file"):
        list(reader.eval_batches(rank=0, world_size=1, batch_size=4))


def test_training_on_a_short_stream_is_an_error_even_in_the_dropped_remainder(damaged):
    last = damaged.shard.members[5]
    (damaged.folder / damaged.shard.name).write_bytes(damaged.original[: last.jpg_offset])
    reader = opened(damaged.folder, "stream", base_url=far(damaged.folder), verify=False)
    with pytest.raises(ValueError, match="'00000005'"):
        list(reader.train_steps(seed=0, epoch=0, rank=0, world_size=1, batch_size=5))


def test_a_byte_that_changes_after_the_hashes_were_compared_is_found(tmp_path):
    index = write_dataset(tmp_path, shard_sizes=(6,))
    shard = index.splits["train"].shards[0]
    reader = opened(tmp_path, "indexed", cache_bytes=0)
    list(reader.eval_batches(rank=0, world_size=1, batch_size=4))
    data = bytearray((tmp_path / shard.name).read_bytes())
    member = shard.members[3]
    data[member.jpg_offset + member.jpg_bytes - 10] ^= 1  # still a picture, another one
    with (tmp_path / shard.name).open("r+b") as file:
        file.write(data)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*not that of the index"):
        list(reader.eval_batches(rank=0, world_size=1, batch_size=4))


@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_pass_on_the_names(damaged, kind):
    options = {"base_url": far(damaged.folder)} if kind == "stream" else {}
    data = bytearray(damaged.original)
    member = damaged.shard.members[3]
    data[member.jpg_offset : member.jpg_offset + member.jpg_bytes] = bytes(member.jpg_bytes)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*(cannot be decoded|not that of the index)"):
        damaged(bytes(data), kind, workers=2, verify=False, **options)
    assert not multiprocessing.active_children()  # and end at once, not when the error is collected


@pytest.mark.parametrize("kind", KINDS)
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
def test_wrong_member_names_shard_and_sample(tmp_path, kind, suffix, content, message):
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
        list(opened(tmp_path, kind).eval_batches(rank=0, world_size=1, batch_size=4))


def streamed(folder, stored):
    """Read, as a stream from an address, other samples than the index has."""
    write_dataset(folder, shard_sizes=(6,))
    (folder / "train-000000.tar").write_bytes(tar_bytes(stored))
    reader = opened(folder, "stream", base_url=far(folder), verify=False)
    return list(reader.eval_batches(rank=0, world_size=1, batch_size=4))


def six():
    return [(f"{n:08d}", members_of(n, 16)) for n in range(6)]


@pytest.mark.parametrize("suffix", ["json", "cls", "jpg"])
def test_missing_member_in_a_stream_names_shard_and_sample(tmp_path, suffix):
    stored = six()
    del stored[3][1][suffix]
    with pytest.raises(ValueError, match=rf"train-000000\.tar.*'00000003'.*without its {suffix} member"):
        streamed(tmp_path, stored)


def test_missing_sample_in_a_stream_is_named(tmp_path):
    stored = six()
    del stored[3]
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003'.*missing: the shard has '00000004.jpg'"):
        streamed(tmp_path, stored)


def test_surplus_sample_in_a_stream_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000006.jpg' is in the shard but not in the index"):
        streamed(tmp_path, [*six(), ("00000006", members_of(6, 16))])


def test_pickle_in_a_shard_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    stored = six()
    stored[3][1]["pkl"] = pickle.dumps(Bomb())
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000003.pkl'"):
        streamed(tmp_path, stored)
    assert not (tmp_path / "ran").exists()


# Options


def test_pipe_is_refused_unless_allowed(folder, tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/{{}}"
    with pytest.raises(ValueError, match="allow_pipe=True"):
        opened(folder, "stream", base_url=command)
    assert not (tmp_path / "ran").exists()
    reader = opened(folder, "stream", base_url=command, allow_pipe=True)
    assert len(positions_of(reader.eval_batches(rank=0, world_size=2, batch_size=4))) == SAMPLES // 2
    assert (tmp_path / "ran").exists()


def test_pipe_that_is_left_early_is_no_error(tmp_path):
    write_dataset(tmp_path, shard_sizes=(40,), size=64)
    reader = opened(tmp_path, "stream", base_url=f"pipe:cat {tmp_path}/{{}}", allow_pipe=True)
    assert len(positions_of(reader.eval_batches(rank=0, world_size=8, batch_size=4))) == 5


def test_pipe_that_fails_is_named(folder):
    reader = opened(folder, "stream", base_url=f"pipe:false {folder}/{{}}", allow_pipe=True)
    with pytest.raises(ValueError, match=r"train-000000\.tar.*'00000000'.*cannot be read"):
        list(reader.eval_batches(rank=0, world_size=1, batch_size=4))


@pytest.mark.parametrize("url", ["s3://bucket/x", "folder/x"])
def test_unknown_address_lists_what_is_known(folder, url):
    with pytest.raises(ValueError, match=r"Known schemes: .*https"):
        opened(folder, "stream", base_url=url)


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
        ({"kind": "index"}, "Did you mean 'indexed'"),
        ({"workers": -1}, "must be 0"),
        ({"base_url": "https://host/x"}, "use kind='stream'"),
        ({"kind": "stream", "balance": "class"}, "use kind='indexed'"),
        ({"balance": "classes"}, "Did you mean 'class'"),
    ],
)
def test_wrong_option_is_refused_with_a_hint(folder, options, message):
    with pytest.raises(ValueError, match=message):
        open_reader(folder, **{"split": "train", **options})
