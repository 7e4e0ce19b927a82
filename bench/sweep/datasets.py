"""Which prepared dataset a name in the configuration means, and preparing the ones that need nothing from the user."""

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
"""Between attempts at a dataset that another run is preparing."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset the run needs: prepared, or with all that is needed to prepare it."""

    name: str
    entry: str
    options: Mapping[str, Any]
    raw: Path | None
    folder: Path
    allow_partial: bool = False
    landmark_weights: Path | None = None
    index: Index | None
    """None = still to be prepared."""

    def reference(self) -> DatasetRef:
        """For the matrix. A dataset still to be prepared has a provisional fingerprint, of what it will be prepared from."""
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
    """Find a dataset by the name used in ``run.datasets``: a prepared folder's path, a ``[datasets.NAME]`` table, or an entry.

    Raises:
        ConfigError: unknown name, options other than those it was prepared with, or not prepared and not preparable
            without the user; the message gives the command to type.
    """
    config, root = settings.config, settings.config.run.data
    if (Path(name) / INDEX_NAME).is_file():
        return _prepared(Path(name), load_index(Path(name)).name)
    section = dict(config.datasets.get(name, {}))
    entry = section.pop("entry", name)
    raw = section.pop("raw", None)
    allow_partial = section.pop("allow_partial", False)
    weights = section.pop("landmark_weights", None)
    where = f"[datasets.{name}]"
    if name not in config.datasets and name not in DATASETS:
        if (root / name / INDEX_NAME).is_file():
            return _prepared(root / name, name)
        there = [p.parent.name for p in root.glob(f"*/{INDEX_NAME}")] if root.is_dir() else []
        raise ConfigError(
            f"{settings.origin('run.datasets')}: unknown dataset {name!r}: no table [datasets.{name}], no registered dataset, "
            f"no prepared folder {root / name}.{did_you_mean(name, {*DATASETS.names(), *config.datasets, *there})}"
        )
    if entry not in DATASETS:
        raise ConfigError(f"{where} entry = {entry!r}: unknown dataset.{did_you_mean(str(entry), DATASETS.names())}")
    options = parse_options(DATASETS, entry, section, where=where).model_dump(mode="json")
    info = DATASETS.get(entry).info
    folder = prepared_folder(root, name=name, entry_name=entry, options=options)
    if (folder / INDEX_NAME).is_file():
        index = load_index(folder)
        if index.entry != entry:
            raise ConfigError(
                f"{where}: {folder} was prepared from the dataset {index.entry!r}, not from {entry!r}. "
                f"Prepare it again with --overwrite, or use another name"
            )
        different = [
            f"{key}: prepared with {index.options.get(key)!r}, configured {options[key]!r}"
            for key in section
            if index.options.get(key) != options[key]
        ]
        if different:
            raise ConfigError(
                f"{where}: {folder} was prepared with other options ({'; '.join(different)}). "
                f"Prepare it again with --overwrite, or use another name"
            )
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


def check_splits(source: Source, *, needed: tuple[str, ...]) -> None:
    """Refuse a dataset without the splits a run needs.

    Raises:
        ConfigError: naming the split and what there is.
    """
    samples = source.reference().samples
    for split in needed:
        if not samples.get(split):
            raise ConfigError(
                f"dataset {source.name!r} has no samples in split {split!r} (it has {', '.join(f'{k}: {v}' for k, v in samples.items())})"
            )


def prepare_missing(sources: Iterable[Source], *, observer: Observer, plugins: Sequence[str], stop: StopRequest | None = None) -> None:
    """Prepare the datasets that still have to be. Called on one process.

    Where another run is preparing the same one, wait for it, and take over if it ends without having finished.

    Raises:
        StoppedError: ``stop`` asked for it; finished shards are kept.
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
            stop.check()  # a signal to the whole process group ends the workers too
            raise
        else:
            break
    observer.end(work)
