"""Small prepared datasets, written with tarfile and Pillow alone, so that tests of readers need no packer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.data.index import Index, Member, Shard, Split, count_classes, hash_keys

CLASSES = ("calm", "glad", "sad")


def jpeg(number: int, size: int) -> bytes:
    """A smooth picture whose mean grows with the number, so that a mix-up of samples shows."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 60, (4, 4, 3)) + 20 + number * 3 % 170
    buffer = io.BytesIO()
    Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def landmarks(number: int) -> list[list[float]] | None:
    """68 points; every fifth face has none."""
    return None if number % 5 == 4 else [[i / 4 + number, i / 8] for i in range(68)]


def members_of(number: int, size: int) -> dict[str, bytes]:
    return {
        "jpg": jpeg(number, size),
        "cls": str(number % len(CLASSES)).encode(),
        "json": json.dumps({"landmarks": landmarks(number), "identity": None}).encode(),
    }


def tar_bytes(samples: Sequence[tuple[str, dict[str, bytes]]]) -> bytes:
    """A tar file of ``KEY.SUFFIX`` members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def describe(name: str, data: bytes, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Shard:
    """The index's entry of a shard, offsets found by tarfile."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = {info.name: (info.offset_data, info.size) for info in tar}
    members = tuple(
        Member(
            key,
            int(files["cls"]),
            *at[f"{key}.jpg"],
            *at[f"{key}.cls"],
            *at[f"{key}.json"],
            crc32=zlib.crc32(b"".join(files[suffix] for suffix in ("jpg", "cls", "json"))),
        )
        for key, files in samples
    )
    return Shard(name=name, samples=len(members), bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), members=members)


def write_dataset(folder: Path, *, shard_sizes: Sequence[int], size: int = 16, split: str = "train", key: str = "{:08d}") -> Index:
    """A prepared dataset with one split."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for i, count in enumerate(shard_sizes):
        samples = [(key.format(n), members_of(n, size)) for n in range(number, number + count)]
        number += count
        data = tar_bytes(samples)
        name = f"{split}-{i:06d}.tar"
        (folder / name).write_bytes(data)
        shards.append(describe(name, data, samples))
    members = [member for shard in shards for member in shard.members]
    counts = dict(count_classes((member.label for member in members), CLASSES))
    whole = Split(samples=number, class_counts=counts, keys_sha256=hash_keys(m.key for m in members), shards=tuple(shards))
    index = Index(
        name="tiny",
        entry="synthetic",
        packer="tests",
        options={},
        classes=CLASSES,
        image_size=size,
        license="none",
        provenance={},
        bad_pictures=(),
        splits={split: whole},
    )
    (folder / "index.json").write_text(index.model_dump_json())
    return index
