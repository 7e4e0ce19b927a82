"""``bench data prepare``: a dataset's pictures into WebDataset shards and the index that describes them to the byte.

The pictures of a split, in the dataset's order, are cut into chunks of `SHARD_ITEMS`; a chunk is one shard and is made by one worker, so
bytes do not depend on how many workers there are. The key of a sample is its position in the split and the
beginning of a hash of its picture, so that the hash of the keys tells two datasets of one size apart; a bad picture leaves a gap.

Commit order: shard (partial -> fsync -> rename), then its record in the journal, ..., then ``report.json``, then ``index.json``, then the
journal goes. A run that is killed anywhere leaves no index, and the next one keeps every shard whose record and bytes agree.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import features
from pydantic import BaseModel, ConfigDict, ValidationError

from bench import __version__
from bench.data.index import INDEX_NAME, REPORT_NAME, BadPicture, Index, Member, Shard, Split, count_classes, hash_keys, load_index
from bench.data.verify import verify
from bench.dataset import DATASETS, EXPRESSION_NAMES, EXPRESSIONS, SPLITS, BadPictureError, Dataset, Face, Item
from bench.io import PARTIAL_SUFFIX, atomic_file, file_sha256, fsync_folder, write_bytes_atomic, write_json_atomic
from bench.prepare.landmarks import Landmarker, describe_source, open_landmarker
from bench.prepare.plausibility import check_plausible
from bench.prepare.preparation import store_face
from bench.registry import check_options, load_plugin

SHARD_ITEMS = 512
"""Pictures per shard, bad ones included. Part of the format: another number is another `PACKER`."""
LANDMARK_GROUP = 32
"""Pictures that a landmark network is given together, at most."""
GROUP_PIXELS = 64_000_000
"""Pixels of these pictures, at which a group is full: large photographs are taken fewer at a time."""
PACKER = "bench.data.pack 3"
"""Version 2 made keys of the position alone; its datasets are read as before."""
JOURNAL_NAME = ".prepare"
_PLAN_NAME = "plan.json"
_OWN_FILE = re.compile(
    rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar(\.[0-9a-f]+\{PARTIAL_SUFFIX})?|({INDEX_NAME}|{REPORT_NAME})(\.[0-9a-f]+\{PARTIAL_SUFFIX})?"
)


class BusyError(ValueError):
    """Another process is preparing the same folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a prepare is, in pictures."""

    done: int
    total: int
    reused: int
    """Of ``done``, those that an earlier run had finished."""
    bad: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One shard to make. Crosses process borders."""

    out: Path
    split: str
    number: int
    start: int
    items: tuple[Item, ...]

    @property
    def shard_name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"

    @property
    def record_path(self) -> Path:
        return self.out / JOURNAL_NAME / f"{self.shard_name}.json"


class _Record(BaseModel):
    """What the journal keeps about a finished shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: Shard
    bad: tuple[BadPicture, ...]
    without_landmarks: int
    pictures: tuple[str, ...]
    """A hash of each stored picture, to find the same one in two splits."""


def prepared_folder(root: Path, *, name: str, entry_name: str, options: Mapping[str, Any]) -> Path:
    """Where a prepared dataset lies below ``root``.

    ``root/name`` for a dataset made from the user's download; for an embedded one ``root/name-xxxxxxxx``, with the first 8 hex digits of
    sha256 over all its options, so that two sets of options live side by side.

    Raises:
        ValueError: unknown dataset or option, or a value that the option does not take.
    """
    if not DATASETS.get(entry_name).info.embedded:
        return root / name
    checked = check_options(DATASETS, entry_name, options).model_dump(mode="json")
    return root / f"{name}-{hashlib.sha256(_canonical(checked)).hexdigest()[:8]}"


def prepare(
    entry_name: str,
    *,
    name: str,
    options: Mapping[str, Any],
    raw: Path | None,
    out: Path,
    workers: int,
    overwrite: bool = False,
    allow_partial: bool = False,
    landmark_weights: Path | None = None,
    plugins: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Index:
    """Write the shards and the index of a dataset into ``out``; resume or do nothing where that is all there is left to do.

    The result is a function of the entry, its options and the raw files: the same bytes with any number of workers, and after any
    number of interruptions.

    Args:
        entry_name: registered dataset.
        name: what the user calls the result.
        options: the entry's options, checked here.
        raw: folder of the user's download; None for embedded datasets.
        out: folder to write; made if missing.
        workers: processes that read, scale and encode. 1: in this process.
        overwrite: remove what an earlier run with other options or inputs left in ``out``.
        allow_partial: go on where pictures are missing from the published number, and record it in the index.
        landmark_weights: folder of the files of the network that option ``landmarks`` names; None = where its package keeps them.
        plugins: modules or files that workers must load to know the entry.
        on_progress: called after every shard; once, with ``reused == total``, where all is there already.

    Raises:
        ValueError: wrong options, layout or annotation; ``out`` holds something else; too little disk space; no usable picture in a
            split; one class only, a class without a picture in train or test, or another number of pictures than published, without
            ``allow_partial``; landmarks that cannot be found here, or that cannot be right in most of the pictures.
        BusyError: another process is preparing ``out``.
        FileNotFoundError: ``raw`` does not exist.
        RuntimeError: a worker died, or the dataset's code failed; finished shards are kept.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    for plugin in plugins:
        load_plugin(plugin)
    checked = check_options(DATASETS, entry_name, options)
    assert isinstance(checked, Dataset.Options)
    entry = DATASETS.get(entry_name)
    _check_raw(entry_name, raw, embedded=entry.info.embedded, out=out)
    landmarks = describe_source(checked.landmarks, weights=landmark_weights)
    dataset = entry.target(checked, raw=raw)
    splits = {split: tuple(items) for split, items in dataset.splits().items()}
    classes = tuple(dataset.classes)
    _check_items(entry_name, splits, classes)
    listed = {split: Counter(classes[item.label] for item in items) for split, items in splits.items()}
    _check_counts(entry_name, "listed", listed, dataset.expected(), allow_partial=allow_partial)
    _check_classes(entry_name, "listed", listed, classes, allow_partial=allow_partial)
    rejected = tuple(BadPicture(split=r.split, source=r.source, reason=r.reason) for r in dataset.rejected())
    provenance = {**dataset.provenance(), "landmark_source": landmarks}
    described = json.loads(_canonical(provenance))  # what the index will say, hence what two runs can compare
    plan: dict[str, Any] = {
        "packer": PACKER,
        "entry": entry_name,
        "name": name,
        "options": checked.model_dump(mode="json"),
        "classes": list(classes),
        "input_sha256": _hash_input(splits, raw, described),
    }
    total = sum(map(len, splits.values()))

    out.mkdir(parents=True, exist_ok=True)
    with _sole_writer(out):
        if (out / INDEX_NAME).exists() and not overwrite:
            index = _existing(out, plan, splits, raw)
            if on_progress:
                on_progress(Progress(done=total, total=total, reused=total, bad=len(index.bad_pictures)))
            return index
        if checked.landmarks == "shipped" and not entry.info.embedded:
            odd = [note for split, items in splits.items() if split != "val" for note in check_plausible(dataset, split=split, items=items)]
            described["notes"] = [*described.get("notes", []), *odd]
        described["notes"] = [*described.get("notes", []), *_class_notes(classes)]
        if len(classes) == 1:
            described["notes"].append(f"{classes[0]!r} is the only class: accuracy is 100 % whatever a network does")
        made_with = _made_with()
        _open_journal(out, {**plan, "made_with": made_with}, overwrite=overwrite)
        jobs = [
            _Job(out=out, split=split, number=number, start=start, items=items[start : start + SHARD_ITEMS])
            for split, items in splits.items()
            for number, start in enumerate(range(0, len(items), SHARD_ITEMS))
        ]
        records = _run(
            jobs,
            _Start(tuple(plugins), entry_name, plan["options"], raw, landmark_weights),
            workers=workers,
            size=checked.size,
            report=on_progress,
        )
        described["content_sha256"] = _hash_content(splits, raw)
        index = _index(plan, splits, records, rejected=rejected, provenance=described, made_with=made_with, license_note=entry.info.license)
        made = {split: Counter(group.class_counts) for split, group in index.splits.items()}
        partial = _check_counts(entry_name, "usable", made, dataset.expected(), allow_partial=allow_partial)
        for split, empty in _check_classes(entry_name, "usable", made, classes, allow_partial=allow_partial).items():
            partial[split] = {**empty, **partial.get(split, {})}
        if partial:
            index = index.model_copy(update={"provenance": index.provenance | {"partial": partial}})
        for job, record in zip(jobs, records, strict=True):
            if not record.shard.samples:
                (out / job.shard_name).unlink()
        notes = {"notes": index.provenance["notes"], "bad_pictures": [bad.model_dump() for bad in index.bad_pictures]}
        write_json_atomic(out / REPORT_NAME, notes)
        write_bytes_atomic(out / INDEX_NAME, index.model_dump_json().encode() + b"\n")
        shutil.rmtree(out / JOURNAL_NAME)
    return index


def _check_raw(entry_name: str, raw: Path | None, *, embedded: bool, out: Path) -> None:
    if embedded and raw is not None:
        raise ValueError(f"dataset {entry_name!r} makes its own pictures: leave out --raw {raw}")
    if not embedded and raw is None:
        raise ValueError(f"dataset {entry_name!r} reads your download: say where it is with --raw DIR")
    if raw is not None and not raw.is_dir():
        raise FileNotFoundError(f"--raw {raw}: no such folder")
    if raw is not None and raw.resolve() == out.resolve():
        raise ValueError(f"--out {out} is the raw folder itself; choose another --out")


def _check_items(entry_name: str, splits: Mapping[str, Sequence[Item]], classes: Sequence[str]) -> None:
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"dataset {entry_name!r}: class names must be different and at least one, got {classes}")
    seen: dict[str, str] = {}
    for split, items in splits.items():
        if split not in SPLITS:
            raise ValueError(f"dataset {entry_name!r} has a split {split!r}; splits are {', '.join(SPLITS)}")
        if not items:
            raise ValueError(f"dataset {entry_name!r}: split {split!r} is empty")
        for item in items:
            if item.source in seen:
                raise ValueError(f"dataset {entry_name!r} lists {item.source} twice: in {seen[item.source]} and in {split}")
            seen[item.source] = split
            if not 0 <= item.label < len(classes):
                raise ValueError(f"dataset {entry_name!r}: {item.source} has class id {item.label}, but there are {len(classes)} classes")


def _check_counts(
    entry_name: str,
    what: str,
    counts: Mapping[str, Mapping[str, int]],
    expected: Mapping[str, Mapping[str, int]],
    *,
    allow_partial: bool,
) -> dict[str, dict[str, list[int]]]:
    """Compare with the published numbers: split -> class -> [found, published], of those that differ."""
    differing: dict[str, dict[str, list[int]]] = {}
    for split, published in expected.items():
        parts = ("train", "val") if split == "train" and "val" not in expected else (split,)
        have = {name: sum(counts.get(part, {}).get(name, 0) for part in parts) for name in published}
        wrong = {name: [have[name], count] for name, count in published.items() if have[name] != count}
        if wrong:
            differing[split] = wrong
    if differing and not allow_partial:
        words = "; ".join(
            f"{split}: " + ", ".join(f"{name} {have} of {count} ({have - count:+d})" for name, (have, count) in wrong.items())
            for split, wrong in differing.items()
        )
        raise ValueError(
            f"dataset {entry_name!r}: the {what} pictures are not the published number of each class: {words}. Complete the download, or "
            "go on with --allow-partial: the index records it and every table says so"
        )
    return differing


def _check_classes(
    entry_name: str, what: str, counts: Mapping[str, Mapping[str, int]], classes: Sequence[str], *, allow_partial: bool
) -> dict[str, dict[str, list[int]]]:
    """Two classes at least, each with a picture to train and one to test on.

    Args:
        entry_name: registered dataset, for the message.
        what: ``listed`` or ``usable``, the pictures that are counted.
        counts: split -> class -> pictures.
        classes: every class name.
        allow_partial: go on without.

    Returns:
        split -> class -> [0, 1], of the classes that have none of the one picture needed.

    Raises:
        ValueError: a class has none, or there is one class, without ``allow_partial``.
    """
    empty = {split: {name: [0, 1] for name in classes if not counts[split].get(name)} for split in ("train", "test") if split in counts}
    empty = {split: names for split, names in empty.items() if names}
    ways = "Or go on with --allow-partial: the index records it"
    if len(classes) < 2 and not allow_partial:
        raise ValueError(
            f"dataset {entry_name!r} has one class, {classes[0]!r}: there is nothing to tell apart. Pictures of an own folder lie in "
            f"train/CLASS/ and test/CLASS/, one folder a class. {ways}"
        )
    if empty and not allow_partial:
        words = "; ".join(f"{split}: {', '.join(map(repr, names))}" for split, names in empty.items())
        raise ValueError(
            f"dataset {entry_name!r}: classes without a single {what} picture: {words}. Add or repair their pictures, "
            f"or remove the class from every split, such as a folder that is no class. {ways}"
        )
    return empty


def _class_notes(classes: Sequence[str]) -> list[str]:
    """A sentence about class names that are no expressions, with the nearest expression of each."""
    known = [name for name in classes if name.strip().lower() in EXPRESSION_NAMES]
    unknown = [name for name in classes if name not in known]
    if not unknown:
        return []
    words = []
    for name in unknown[:10]:
        close = get_close_matches(
            name.strip().lower(), [expression for expression in EXPRESSIONS if expression not in known], n=1, cutoff=0.5
        )
        words.append(f"{name!r}{f' (did you mean {close[0]!r}?)' if close else ''}")
    more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
    return [
        f"class names that are expressions: {', '.join(known) or 'none'}; not recognised: {', '.join(words)}{more}. Guidance and CAM-COS "
        f"need the names {', '.join(EXPRESSIONS)}: rename these classes in the raw data if they are expressions, and prepare again"
    ]


def _hash_input(splits: Mapping[str, Sequence[Item]], raw: Path | None, provenance: Mapping[str, Any]) -> str:
    """sha256 over what is listed (with file sizes, where sources are files) and what the dataset says about it."""
    digest = hashlib.sha256(_canonical(provenance))
    for split, items in splits.items():
        for item in items:
            path = raw / item.source if raw is not None else None
            size = path.stat().st_size if path is not None and path.is_file() else None
            digest.update(_canonical([split, item.source, item.label, item.identity, size]) + b"\n")
    return digest.hexdigest()


def _hash_content(splits: Mapping[str, Sequence[Item]], raw: Path | None) -> str | None:
    """sha256 over the bytes of all listed files; None where sources are no files."""
    if raw is None:
        return None
    digest = hashlib.sha256()
    for split, items in splits.items():
        for item in items:
            path = raw / item.source
            content = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else None
            digest.update(_canonical([split, item.source, content]) + b"\n")
    return digest.hexdigest()


def _touched(splits: Mapping[str, Sequence[Item]], raw: Path | None, *, since: Path) -> bool:
    """Whether a listed file was written, moved or replaced after another file was: its inode tells, whatever the times of the file say."""
    if raw is None:
        return False
    then = since.stat().st_mtime_ns
    paths = (raw / item.source for items in splits.values() for item in items)
    return any(path.stat().st_ctime_ns >= then for path in paths if path.is_file())


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    # A lock on the folder itself: it leaves nothing behind and ends with the process, however that ends.
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is preparing {out} right now. Wait for it, or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


def _existing(out: Path, plan: Mapping[str, Any], splits: Mapping[str, Sequence[Item]], raw: Path | None) -> Index:
    """The index that is there, if it is what was asked for and its files are whole."""
    ways = f"Choose another --out, or replace {out} with --overwrite"
    try:
        index = load_index(out)
    except ValueError as error:
        raise ValueError(f"{error} {ways}") from error
    had = {
        "packer": index.packer,
        "entry": index.entry,
        "name": index.name,
        "options": index.options,
        "classes": list(index.classes),
        "input_sha256": index.provenance.get("input_sha256"),
    }
    differences = _differences(had, plan)
    content = index.provenance.get("content_sha256")
    if not differences and content is not None and _touched(splits, raw, since=out / INDEX_NAME) and content != _hash_content(splits, raw):
        differences = ["pictures in the raw folder were exchanged for others of the same size: they have changed"]
    if differences:
        raise ValueError(f"{out} was prepared differently: {'; '.join(differences)}. {ways}")
    # A run that ended between writing the index and tidying up leaves these.
    shutil.rmtree(out / JOURNAL_NAME, ignore_errors=True)
    _remove_own(out, only_partial=True)
    problems = verify(out, deep=False)
    if problems:
        raise ValueError(f"{out} is damaged: {problems[0]} ({len(problems)} problems in all, see: bench data verify {out}). {ways}")
    return index


def _differences(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    keys = [key for key in wanted if key not in ("options", "input_sha256")]
    differences = [f"{key} was {had[key]!r}, now {wanted[key]!r}" for key in keys if had[key] != wanted[key]]
    if had["entry"] == wanted["entry"]:
        for key in sorted(had["options"].keys() | wanted["options"].keys()):
            old, new = had["options"].get(key, "absent"), wanted["options"].get(key, "absent")
            if old != new:
                differences.append(f"option {key} was {old!r}, now {new!r}")
    if not differences and had["input_sha256"] != wanted["input_sha256"]:
        differences.append("the pictures, classes, identities or landmarks in the raw folder have changed")
    return differences


def _open_journal(out: Path, plan: Mapping[str, Any], *, overwrite: bool) -> None:
    journal = out / JOURNAL_NAME
    fresh = not (out / INDEX_NAME).exists() and not journal.exists()
    foreign = sorted(path.name for path in out.iterdir() if path != journal and not _OWN_FILE.fullmatch(path.name))
    if fresh and foreign:
        raise ValueError(
            f"--out {out} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}). Give an empty folder"
        )
    try:
        resumes = not (out / INDEX_NAME).exists() and json.loads((journal / _PLAN_NAME).read_bytes()) == plan
    except (OSError, ValueError):
        resumes = False
    if fresh and not overwrite and any(_OWN_FILE.fullmatch(path.name) for path in out.iterdir()):
        raise ValueError(f"--out {out} holds shards without an index or a journal, perhaps a copy cut short. Replace them with --overwrite")
    # The index goes first: from here on the folder is no prepared dataset until a new one is written.
    (out / INDEX_NAME).unlink(missing_ok=True)
    fsync_folder(out)
    _remove_own(out, only_partial=resumes)
    if not resumes:
        if journal.exists():
            shutil.rmtree(journal)
        journal.mkdir()
        write_json_atomic(journal / _PLAN_NAME, plan)


def _remove_own(out: Path, *, only_partial: bool) -> None:
    for path in sorted(out.iterdir()):
        if _OWN_FILE.fullmatch(path.name) and (path.name.endswith(PARTIAL_SUFFIX) or not only_partial):
            path.unlink()


@dataclasses.dataclass(frozen=True, slots=True)
class _Start:
    """What a worker needs to rebuild the dataset."""

    plugins: tuple[str, ...]
    entry_name: str
    options: dict[str, Any]
    raw: Path | None
    landmark_weights: Path | None

    def landmarker(self) -> Landmarker | None:
        """What finds landmarks, if the options ask for it."""
        return open_landmarker(self.options["landmarks"], weights=self.landmark_weights)

    def dataset(self) -> Dataset:
        for plugin in self.plugins:
            load_plugin(plugin)
        target = DATASETS.get(self.entry_name).target
        return target(target.Options.model_validate(self.options), raw=self.raw)


def _run(jobs: Sequence[_Job], start: _Start, *, workers: int, size: int, report: Callable[[Progress], None] | None) -> list[_Record]:
    """Make every shard that is not there yet; the records in the order of the jobs."""
    total = sum(len(job.items) for job in jobs)
    records = {job.shard_name: record for job in jobs if (record := _finished(job)) is not None}
    reused = sum(len(job.items) for job in jobs if job.shard_name in records)
    missing = [job for job in jobs if job.shard_name not in records]
    _check_space(jobs[0].out, sum(len(job.items) for job in missing), size=size)

    def tell(done: int) -> None:
        if report:
            report(Progress(done=done, total=total, reused=reused, bad=sum(len(record.bad) for record in records.values())))

    done = reused
    tell(done)
    for job, record in _made(missing, start, workers=min(workers, len(missing))):
        records[job.shard_name] = record
        done += len(job.items)
        tell(done)
    return [records[job.shard_name] for job in jobs]


def _made(jobs: Sequence[_Job], start: _Start, *, workers: int) -> Iterator[tuple[_Job, _Record]]:
    if not jobs:
        return
    if workers == 1:
        dataset, landmarker = start.dataset(), start.landmarker()
        for job in jobs:
            yield job, _make_shard(dataset, landmarker, job)
        return
    # Spawned, not forked: the caller may have threads (and CUDA), and a worker must be able to start from its arguments alone.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(start,))
    try:
        futures = {pool.submit(_work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a worker process of {jobs[0].out} died, perhaps for want of memory. Finished shards are kept: run the same command again "
            "to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(job: _Job) -> _Record | None:
    """The journal's record of a shard, if the shard is there with these very bytes."""
    try:
        record = _Record.model_validate_json(job.record_path.read_bytes())
        path = job.out / job.shard_name
        if path.stat().st_size != record.shard.bytes:
            return None
        return record if file_sha256(path) == record.shard.sha256 else None
    except (FileNotFoundError, ValidationError):
        return None


def _check_space(out: Path, pictures: int, *, size: int) -> None:
    # At quality 95 without chroma subsampling, grey photographs took 0.22 bytes a pixel, colour takes about twice that; 4 KiB are
    # for landmarks and tar headers.
    needed = pictures * (size * size // 2 + 4096)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"{out}: about {needed / 1e9:.1f} GB are needed for {pictures} pictures of {size} x {size}, {free / 1e9:.1f} GB are free. "
            "Choose another --out, or a smaller --option size=..."
        )


_sources: tuple[Dataset, Landmarker | None] | None = None  # of this worker process


def _start_worker(start: _Start) -> None:
    global _sources
    # Ctrl-C reaches the whole process group: the parent decides, and the shard at hand is still finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()  # a worker whose parent was killed would wait for work for ever
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _sources = start.dataset(), start.landmarker()


def _work(job: _Job) -> _Record:
    assert _sources is not None
    return _make_shard(*_sources, job)


def _make_shard(dataset: Dataset, landmarker: Landmarker | None, job: _Job) -> _Record:
    from webdataset import TarWriter  # here, because it loads torch: seconds, and commands that prepare nothing import this module too

    bad: list[BadPicture] = []
    written: list[tuple[str, int, int]] = []  # key, label, crc32
    pictures: list[str] = []
    without_landmarks = 0
    with atomic_file(job.out / job.shard_name) as file:
        # A fixed header but for name and size. An integer mtime: a float would add a block of its own before every member.
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
            for position, item, sample in _samples(dataset, landmarker, job):
                if isinstance(sample, BadPictureError):
                    bad.append(BadPicture(split=job.split, source=item.source, reason=str(sample)))
                    continue
                jpg, note = sample
                without_landmarks += note["landmarks"] is None
                digest = hashlib.blake2b(jpg, digest_size=16).hexdigest()
                key = _key(position, digest)
                parts = {"jpg": jpg, "cls": str(item.label).encode(), "json": _canonical(note)}
                for suffix, data in parts.items():  # one by one: a sample given whole is written in the order of its suffixes
                    tar.write({"__key__": key, suffix: data})
                crc32 = functools.reduce(lambda crc, data: zlib.crc32(data, crc), parts.values(), 0)
                written.append((key, item.label, crc32))
                pictures.append(digest)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        members = _members(file, written)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = _Record(
        shard=Shard(name=job.shard_name, samples=len(members), bytes=size, sha256=sha256, members=members),
        bad=tuple(bad),
        without_landmarks=without_landmarks,
        pictures=tuple(pictures),
    )
    write_bytes_atomic(job.record_path, record.model_dump_json().encode())
    return record


def _samples(
    dataset: Dataset, landmarker: Landmarker | None, job: _Job
) -> Iterator[tuple[int, Item, tuple[bytes, dict[str, Any]] | BadPictureError]]:
    """Every item of a shard with its picture and note, or with why there is none."""
    read = ((position, item, _read(dataset, item)) for position, item in enumerate(job.items, start=job.start))
    for group in ([sample] for sample in read) if landmarker is None else _groups(read):
        if landmarker is not None:
            faces = [face for _, _, face in group if isinstance(face, Face)]
            points = iter(landmarker.find([face.image for face in faces], [face.box for face in faces]))
            group = [
                (position, item, dataclasses.replace(face, landmarks=next(points)) if isinstance(face, Face) else face)
                for position, item, face in group
            ]
        for position, item, face in group:
            yield position, item, _sample(dataset, item, face) if isinstance(face, Face) else face


def _groups(read: Iterable[tuple[int, Item, Face | BadPictureError]]) -> Iterator[list[tuple[int, Item, Face | BadPictureError]]]:
    """Neighbours of a shard. They begin at its first item: what a network sees together does not depend on who makes the shard, or when."""
    group: list[tuple[int, Item, Face | BadPictureError]] = []
    pixels = 0
    for sample in read:
        size = sample[2].image.shape[0] * sample[2].image.shape[1] if isinstance(sample[2], Face) else 0
        if group and (len(group) == LANDMARK_GROUP or pixels + size > GROUP_PIXELS):
            yield group
            group, pixels = [], 0
        group.append(sample)
        pixels += size
    if group:
        yield group


def _read(dataset: Dataset, item: Item) -> Face | BadPictureError:
    try:
        return dataset.read(item)
    except BadPictureError as error:
        return error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(dataset).__qualname__}.read failed on {item.source}: {type(error).__name__}: {error}") from error


def _sample(dataset: Dataset, item: Item, face: Face) -> tuple[bytes, dict[str, Any]]:
    landmarks = None if dataset.options.landmarks == "none" else face.landmarks
    if landmarks is not None and (landmarks.shape != (68, 2) or not np.isfinite(landmarks).all()):
        raise RuntimeError(f"{type(dataset).__qualname__}.read returned landmarks of {item.source} that are not 68 finite points")
    stored = store_face(dataclasses.replace(face, landmarks=landmarks), size=dataset.options.size, quality=dataset.options.quality)
    note = {
        "extra": dict(face.extra),
        "identity": item.identity,
        "landmarks": None if stored.landmarks is None else stored.landmarks.tolist(),
        "source": item.source,
    }
    return stored.jpg, note


def _members(file: BinaryIO, written: Sequence[tuple[str, int, int]]) -> tuple[Member, ...]:
    """The index's entries of a shard's samples, given as (key, label, crc32): offsets are read from the tar headers."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        at = {info.name: (info.offset_data, info.size) for info in tar}
    return tuple(Member(key, label, *at[f"{key}.jpg"], *at[f"{key}.cls"], *at[f"{key}.json"], crc32=crc32) for key, label, crc32 in written)


def _key(position: int, digest: str) -> str:
    return f"{position:08d}-{digest[:8]}"


def position_of(key: str) -> int:
    """The position, in its split as the dataset lists it, of the sample with this key."""
    return int(key.partition("-")[0])


def _index(
    plan: Mapping[str, Any],
    splits: Mapping[str, Sequence[Item]],
    records: Iterable[_Record],
    *,
    rejected: Sequence[BadPicture],
    provenance: dict[str, Any],
    made_with: Mapping[str, str],
    license_note: str,
) -> Index:
    classes = tuple(plan["classes"])
    by_split: dict[str, list[_Record]] = {split: [] for split in splits}
    for record, split in zip(records, (s for s, items in splits.items() for _ in range(0, len(items), SHARD_ITEMS)), strict=True):
        by_split[split].append(record)
    notes: list[str] = list(provenance.pop("notes", []))
    bad = tuple(sorted(rejected, key=lambda picture: (picture.split, picture.source, picture.reason))) + tuple(
        picture
        for group in by_split.values()
        for picture in sorted((p for record in group for p in record.bad), key=lambda picture: picture.source)
    )
    people = sorted({item.identity for items in splits.values() for item in items if item.identity is not None})
    numbers = {identity: number for number, identity in enumerate(people)}
    made: dict[str, Split] = {}
    for split, group in by_split.items():
        members = [member for record in group for member in record.shard.members]
        if not members:
            lost = [picture for picture in bad if picture.split == split]
            raise ValueError(f"split {split!r} has no usable picture; first of {len(lost)} bad ones: {lost[0].source}: {lost[0].reason}")
        counts = dict(count_classes((member.label for member in members), classes))
        listed = Counter(item.label for item in splits[split])
        notes += [f"every picture of class {c!r} in {split} is bad" for i, c in enumerate(classes) if listed[i] and not counts[c]]
        made[split] = Split(
            samples=len(members),
            class_counts=counts,
            keys_sha256=hash_keys(member.key for member in members),
            shards=tuple(_with_people(record.shard, splits[split], numbers) for record in group if record.shard.samples),
        )
    notes += _overlaps(splits, by_split)
    without = {split: sum(record.without_landmarks for record in group) for split, group in by_split.items()}
    return Index(
        name=plan["name"],
        entry=plan["entry"],
        packer=plan["packer"],
        options=plan["options"],
        classes=classes,
        image_size=plan["options"]["size"],
        license=license_note,
        provenance={
            **provenance,
            "notes": notes,
            "samples_without_landmarks": without,
            "input_sha256": plan["input_sha256"],
            "made_with": dict(made_with),
        },
        bad_pictures=bad,
        splits=made,
    )


def _with_people(shard: Shard, items: Sequence[Item], numbers: Mapping[str, int]) -> Shard:
    """The shard's entry with the number of the person in each picture."""
    identities = (items[position_of(member.key)].identity for member in shard.members)
    members = tuple(
        member if identity is None else member._replace(person=numbers[identity])
        for member, identity in zip(shard.members, identities, strict=True)
    )
    return shard.model_copy(update={"members": members})


def _overlaps(splits: Mapping[str, Sequence[Item]], by_split: Mapping[str, Sequence[_Record]]) -> list[str]:
    """Sentences about pictures and people that are in two splits."""
    people = {split: {item.identity for item in items if item.identity is not None} for split, items in splits.items()}
    sources = {
        split: {
            digest: splits[split][position_of(member.key)].source
            for record in group
            for member, digest in zip(record.shard.members, record.pictures, strict=True)
        }
        for split, group in by_split.items()
    }
    notes = []
    for split, group in by_split.items():
        shown: dict[str, list[tuple[int, str]]] = {}
        for record in group:
            for member, digest in zip(record.shard.members, record.pictures, strict=True):
                shown.setdefault(digest, []).append((member.label, splits[split][position_of(member.key)].source))
        torn = sorted(sorted(source for _, source in same) for same in shown.values() if len({label for label, _ in same}) > 1)
        if torn:
            notes.append(f"{len(torn)} pictures of {split} are there under several classes, first: {' = '.join(torn[0])}")
    for first, second in combinations(splits, 2):
        same = sorted(people[first] & people[second])
        if same:
            notes.append(f"{len(same)} people are in both {first} and {second}, first: {same[0]}")
        twins = sorted((sources[first][digest], sources[second][digest]) for digest in sources[first].keys() & sources[second].keys())
        if twins:
            notes.append(f"{len(twins)} pictures are in both {first} and {second}, first: {twins[0][0]} = {twins[0][1]}")
    return notes


def _made_with() -> dict[str, str]:
    """Versions of what decides on bytes: another decoder or encoder may round differently."""
    return {
        "bench": __version__,
        "pillow": PIL.__version__,
        "libjpeg": str(features.version_feature("libjpeg_turbo") or features.version_codec("jpg")),
        "numpy": np.__version__,
    }


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
