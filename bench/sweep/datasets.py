"""Find the prepared dataset that a name in the configuration means, and prepare the datasets that need nothing from the user."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.config import ConfigError, Settings
from bench.data.index import INDEX_NAME, Index, load_index
from bench.dataset import DATASETS
from bench.matrix import DatasetRef, digest, parse_options
from bench.prepare.pack import BusyError, Progress, prepare, prepared_folder
from bench.registry import did_you_mean
from bench.runtime.interruption import StopRequest
from bench.runtime.observer import Observer, Work

BUSY_SECONDS = 1.0
"""Time between two looks at a dataset that another run prepares."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset of a run: prepared, or with all that is needed to prepare it."""

    name: str
    entry: str
    """Registered dataset."""
    options: Mapping[str, Any]
    raw: Path | None
    """Folder of the download, if the dataset needs one."""
    folder: Path
    """Folder of the shards."""
    allow_partial: bool = False
    landmark_weights: Path | None = None
    index: Index | None
    """None: not prepared yet."""

    def reference(self) -> DatasetRef:
        """The dataset as the matrix sees it. Before it is prepared, its fingerprint is provisional: a hash of what it is prepared from."""
        if self.index is not None:
            return DatasetRef(
                name=self.name,
                entry=self.entry,
                fingerprint=self.index.fingerprint,
                samples={k: s.samples for k, s in self.index.splits.items()},
            )
        target = DATASETS.get(self.entry).target
        splits = target(target.Options.model_validate(self.options), raw=self.raw).splits()
        return DatasetRef(
            name=self.name,
            entry=self.entry,
            fingerprint=digest(["unprepared", self.entry, self.options, str(self.raw)]),
            samples={split: len(items) for split, items in splits.items()},
        )


def resolve_dataset(settings: Settings, name: str) -> Source:
    """Find a dataset by its name in ``run.datasets``: the path of a prepared folder, a ``[datasets.NAME]`` table, or an entry.

    Raises:
        ConfigError: an unknown name, options that differ from those it was prepared with, or a dataset that only the user can prepare;
            the message gives the command to type.
    """
    config, root = settings.config, settings.config.run.data
    if (Path(name) / INDEX_NAME).is_file():
        return _prepared(Path(name), load_index(Path(name)).name)
    if name not in config.datasets and name not in DATASETS:
        return _prepared_in(root, name, settings)
    section = dict(config.datasets.get(name, {}))
    entry = section.pop("entry", name)
    raw = section.pop("raw", None)
    allow_partial = section.pop("allow_partial", False)
    weights = section.pop("landmark_weights", None)
    where = f"[datasets.{name}]"
    if entry not in DATASETS:
        raise ConfigError(f"{where} entry = {entry!r}: unknown dataset.{did_you_mean(str(entry), DATASETS.names())}")
    options = parse_options(DATASETS, entry, section, where=where).model_dump(mode="json")
    info = DATASETS.get(entry).info
    folder = prepared_folder(root, name=name, entry_name=entry, options=options)
    if (folder / INDEX_NAME).is_file():
        index = load_index(folder)
        _check_prepared(index, folder=folder, where=where, entry=entry, options={key: options[key] for key in section})
        return Source(name=name, entry=entry, options=index.options, raw=None, folder=folder, index=index)
    if not info.embedded and raw is None:
        raise ConfigError(
            f"dataset {name!r} is not prepared: {folder} has no {INDEX_NAME}. Type: bench data prepare {name} --raw DIR --out {folder}"
            + (f" --entry {entry}" if entry != name else "")
        )
    return Source(
        name=name,
        entry=entry,
        options=options,
        raw=Path(raw) if raw else None,
        folder=folder,
        allow_partial=bool(allow_partial),
        landmark_weights=Path(weights) if weights else None,
        index=None,
    )


def _prepared(folder: Path, name: str) -> Source:
    index = load_index(folder)
    return Source(name=name, entry=index.entry, options=index.options, raw=None, folder=folder, index=index)


def _prepared_in(root: Path, name: str, settings: Settings) -> Source:
    """A prepared folder that no table and no entry names."""
    if (root / name / INDEX_NAME).is_file():
        return _prepared(root / name, name)
    prepared = [path.parent.name for path in root.glob(f"*/{INDEX_NAME}")] if root.is_dir() else []
    raise ConfigError(
        f"{settings.origin('run.datasets')}: unknown dataset {name!r}: no table [datasets.{name}], no registered dataset, "
        f"no prepared folder {root / name}.{did_you_mean(name, {*DATASETS.names(), *settings.config.datasets, *prepared})}"
    )


def _check_prepared(index: Index, *, folder: Path, where: str, entry: str, options: Mapping[str, Any]) -> None:
    """Refuse a folder that was prepared from another entry, or with options that differ from the configured ones."""
    if index.entry != entry:
        raise ConfigError(
            f"{where}: {folder} was prepared from the dataset {index.entry!r}, not from {entry!r}. "
            f"Prepare it again with --overwrite, or use another name"
        )
    differences = [
        f"{key}: prepared with {index.options.get(key)!r}, configured {value!r}"
        for key, value in options.items()
        if index.options.get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"{where}: {folder} was prepared with other options ({'; '.join(differences)}). "
            f"Prepare it again with --overwrite, or use another name"
        )


def check_splits(source: Source, *, needed: tuple[str, ...]) -> None:
    """Refuse a dataset without the splits that a run needs.

    Raises:
        ConfigError: naming the split and the splits of the dataset.
    """
    samples = source.reference().samples
    for split in needed:
        if not samples.get(split):
            raise ConfigError(
                f"dataset {source.name!r} has no samples in split {split!r} (it has {', '.join(f'{k}: {v}' for k, v in samples.items())})"
            )


def prepare_missing(sources: Iterable[Source], *, observer: Observer, plugins: Sequence[str], stop: StopRequest | None = None) -> None:
    """Prepare the datasets that are not prepared. Call it on one process.

    If another run prepares the same dataset, wait for it, and take over if it ends before it has finished.

    Raises:
        StoppedError: a request to stop; finished shards are kept.
    """
    for source in sources:
        if source.index is None:
            _prepare(source, observer=observer, plugins=plugins, stop=stop or StopRequest())


def _prepare(source: Source, *, observer: Observer, plugins: Sequence[str], stop: StopRequest) -> None:
    work = Work(source.name, "preparing")
    observer.begin(work, steps=sum(source.reference().samples.values()), done=0)
    seen = 0

    def report(progress: Progress) -> None:
        nonlocal seen
        observer.advance(work, steps=progress.done - seen, note=f"{progress.bad} bad" if progress.bad else "")
        seen = progress.done
        stop.check()

    waiting = False
    while True:
        stop.check()
        try:
            prepare(
                source.entry,
                name=source.name,
                options=source.options,
                raw=source.raw,
                out=source.folder,
                workers=min(4, len(os.sched_getaffinity(0))),
                allow_partial=source.allow_partial,
                landmark_weights=source.landmark_weights,
                plugins=plugins,
                on_progress=report,
            )
        except BusyError as error:
            if not waiting:
                _log.info("waiting: %s", str(error).partition(". ")[0])
            waiting = True
            time.sleep(BUSY_SECONDS)
        except RuntimeError:
            stop.check()  # a signal to the process group ends the workers, too
            raise
        else:
            break
    observer.end(work)
