"""``record.json``: one cell's result with everything needed to believe it and to repeat it.

Records are read for ever: one of an older schema is brought up to date when it is read, never rewritten.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

import bench
from bench.backbone import BACKBONES
from bench.dataset import DATASETS
from bench.matrix import Cell, DatasetRef, Training
from bench.method import METHODS
from bench.registry import foreign_code, is_foreign
from bench.runtime.environment import arithmetic

SCHEMA: Final = 4
LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "webdataset", "safetensors")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CellName(_Part):
    """The coordinates of a cell."""

    method: str
    guidance: Literal["none", "au"]
    backbone: str
    dataset: str
    seed: int


class DataFacts(_Part):
    """What was evaluated on."""

    entry: str
    fingerprint: str
    """Of the whole prepared dataset, `bench.data.index.Index.fingerprint`."""
    classes: tuple[str, ...]
    split: str
    samples: int
    keys_sha256: str
    """Of the keys that were evaluated: each sample of the split, once."""
    bad_pictures: int
    """Pictures left out when the dataset was prepared."""
    provenance: dict[str, Any]


class CodeFacts(_Part):
    """Which code ran."""

    version: str
    commit: str | None
    """None outside a git checkout."""
    clean: bool | None
    """Whether the code was that of the commit; None where that cannot be known."""
    dirty_diff_sha256: str | None
    """Hash of what the working tree had changed since the commit, untracked files with their content; None if nothing, or not known."""
    source_sha256: str | None
    """Hash of the files of the program as they were when the run began, in a checkout or not; None in older records."""
    entries: dict[str, str | None]
    """Entries that are not the project's own, such as ``method mine`` -> `bench.registry.foreign_code`; None where there is no file."""
    libraries: dict[str, str]


class ProcessFacts(_Part):
    """How the batches of the training were spread, and whether that matters."""

    counts: tuple[int, ...]
    """Numbers of processes that the training ran in, in the order of their first use; several after a start with another number."""
    dependent: tuple[str, ...]
    """What makes the weights depend on that number, in words; empty: nothing but rounding does."""


class Record(_Part):
    """The whole of ``record.json``."""

    schema_version: Literal[4] = SCHEMA
    """Of this form; a record that was written in an older one has been brought up to date."""
    key: str
    training_key: str
    scheme: int
    """`bench.matrix.Training.scheme` of the training's key."""
    cell: CellName
    trains_as: str
    """The method that trained: the cell's own, or the one a post-hoc method reads out."""
    variant: Literal["paper", "official"]
    protocol: Literal["val", "test-selected"]
    """How the checkpoint was selected."""
    method_options: dict[str, Any]
    training_options: dict[str, Any]
    """Options of the method that trained."""
    backbone_options: dict[str, Any]
    keyed_code: dict[str, str] = {}
    """Entries that do not come with this program and whose code is part of the keys, such as ``method mine`` -> hash."""
    settings: dict[str, Any]
    """What decided the weights: train, augment, images, protocol, guidance."""
    brought: dict[str, str]
    """Dotted key -> source, of the settings that the dataset, backbone or method brought along."""
    evaluation: dict[str, Any]
    config: dict[str, Any]
    """The whole configuration of the run."""
    origins: dict[str, str]
    data: DataFacts
    attention_layer: int
    """The layer whose cosine is the cell's ATT-COS: the (first) guided one, or the one guidance would take."""
    metrics: dict[str, Any]
    """See `bench.evaluation.metrics.compute_metrics`."""
    invariance: dict[str, Any] | None
    """Whether logits and maps depend on the batch they are computed in, see `bench.evaluation.invariance.check_invariance`: where
    ``holds`` is false the figures are no property of the network, and are not ranked. None in records older than this check."""
    selection: dict[str, Any]
    """Epoch and accuracy of the selected checkpoint on the selection split."""
    epochs: list[dict[str, Any]]
    """The training's course."""
    processes: ProcessFacts | None
    """Of the training; None in older records."""
    weights_sha256: str
    rows_sha256: str
    """Of ``samples.parquet``."""
    maps_sha256: str | None
    """Of ``maps.safetensors``, the average maps of each class; None in records that have none."""
    code: CodeFacts
    hardware: dict[str, Any]
    cost: dict[str, Any]
    """Parameters, seconds, images per second, peak memory, processes; multiply-accumulates of one picture, see
    `bench.evaluation.evaluator.count_macs`; seconds per map, see `bench.evaluation.evaluator.Evaluated`."""
    seeds: dict[str, int]
    finished: str
    """UTC, ISO 8601."""

    @property
    def training(self) -> Training:
        """The training it is of, as its own fields say: its key must be `training_key`."""
        return Training(
            trains_as=self.trains_as,
            method_options=self.training_options,
            variant=self.variant,
            guidance=self.cell.guidance,
            backbone=self.cell.backbone,
            backbone_options=self.backbone_options,
            dataset=DatasetRef(
                name=self.cell.dataset,
                entry=self.data.entry,
                fingerprint=self.data.fingerprint,
                samples={self.data.split: self.data.samples},
            ),
            seed=self.cell.seed,
            settings=self.settings,
            brought=self.brought,
            scheme=self.scheme,
            code=self._code(f"method {self.trains_as}", f"backbone {self.cell.backbone}"),
        )

    @property
    def as_cell(self) -> Cell:
        """The cell it is of, as its own fields say: its key must be `key`."""
        return Cell(
            method=self.cell.method,
            method_options=self.method_options,
            training=self.training,
            evaluation=self.evaluation,
            code=self._code(f"method {self.cell.method}"),
        )

    def _code(self, *names: str) -> dict[str, str]:
        return {name: self.keyed_code[name] for name in names if name in self.keyed_code}


def parse_record(content: bytes) -> Record:
    """Read the content of a ``record.json`` of any schema version.

    Raises:
        ValueError: it is damaged, edited beyond recognition, or of a schema newer than this program.
    """
    tree = json.loads(content)
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if not isinstance(version, int) or version < 1:
        raise ValueError("it has no schema_version")
    if version > SCHEMA:
        raise ValueError(f"it has schema_version {version}, this program knows up to {SCHEMA}: update bench")
    if version == SCHEMA:
        return Record.model_validate_json(content)  # a third of the time of the way below, and tables read thousands
    for step in range(version, SCHEMA):
        try:
            tree = _MIGRATIONS[step](tree) | {"schema_version": step + 1}
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is not of schema version {version}, as it says: {error!r}") from error
    return Record.model_validate_json(json.dumps(tree))


def _from_1(tree: Mapping[str, Any]) -> dict[str, Any]:
    method = tree["cell"]["method"]
    trains_as = METHODS.get(method).info.trains_as if method in METHODS else None
    return {**tree, "trains_as": trains_as or method, "invariance": None, "maps_sha256": None}


def _from_2(tree: Mapping[str, Any]) -> dict[str, Any]:
    code, cost = tree["code"], dict(tree["cost"])
    # It was the most that the process had held since its start, whatever it had done before.
    cost["training_peak_memory_bytes"] = None
    if tree["hardware"]["device"] == "cpu":
        cost["evaluation_peak_memory_bytes"] = None
    clean = None if code["commit"] is None else code["dirty_diff_sha256"] is None
    return {
        **tree,
        "scheme": 1,
        "code": {**code, "clean": clean, "source_sha256": None, "entries": {}},
        "cost": cost,
        "processes": None,
    }


def _from_3(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree, "keyed_code": {}}


_MIGRATIONS: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2, 3: _from_3}
"""Schema version -> what makes the next one of it. Once released, a step is never changed."""


CODE = ("bench", "methods", "backbones", "datasets", "pyproject.toml")
"""What of a checkout is the running code: results that lie in it, or pages, change nothing."""


@cache
def code_facts() -> CodeFacts:
    """Version, commit and uncommitted changes of the code, hash of its files, versions of what it stands on.

    Looked up once a process: call it when a run begins, for later the files may be other ones than those that were imported.
    """
    root = Path(bench.__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = None if commit is None else _changes(root)
    return CodeFacts(
        version=bench.__version__,
        commit=commit,
        clean=None if changed is None else not changed,
        dirty_diff_sha256=hashlib.sha256(changed).hexdigest() if changed else None,
        source_sha256=_source_hash(),
        entries={},
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )


def foreign_entries(cells: Iterable[Cell]) -> dict[str, str | None]:
    """The methods, backbones and datasets of some cells that do not come with this program: see `CodeFacts.entries`."""
    used: dict[str, type] = {}
    for cell in cells:
        training = cell.training
        for method in (cell.method, training.trains_as):
            used[f"method {method}"] = METHODS.get(method).target
        used[f"backbone {training.backbone}"] = BACKBONES.get(training.backbone).target
        if training.dataset.entry in DATASETS:
            used[f"dataset {training.dataset.entry}"] = DATASETS.get(training.dataset.entry).target
    return {name: foreign_code(target) for name, target in sorted(used.items()) if is_foreign(target)}


def _source_hash() -> str:
    """Of all files of the packages as they lie on the disk, by name: where there is no git, it tells two versions apart all the same."""
    digest = hashlib.sha256()
    for package in ("bench", "bench.methods", "bench.backbones", "bench.datasets"):
        for folder in sorted(importlib.import_module(package).__path__):
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".toml") and "__pycache__" not in path.parts:
                    name = path.relative_to(folder).as_posix()
                    digest.update(f"{package}/{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _changes(root: Path) -> bytes | None:
    """What of the code differs from the commit, untracked files with their content; None where git does not say."""
    diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--", *CODE)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE)
    if diff is None or untracked is None:
        return None
    changed = [diff.encode()] if diff else []
    for name in filter(None, untracked.split("\0")):
        path = root / name
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        changed.append(f"untracked {name} {content}".encode())
    return b"\n".join(changed)


def hardware_facts(device: torch.device, *, world_size: int) -> dict[str, Any]:
    """What it ran on, in words."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **({"environment": told} if (told := arithmetic()) else {}),
    }


def device_name(hardware: Mapping[str, Any]) -> str:
    """What a record's ``hardware`` computed on: on a CPU the number of threads belongs to it."""
    name, threads = str(hardware.get("name", "?")), hardware.get("threads")
    if hardware.get("device") != "cpu" or threads is None:
        return name
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


@cache
def processor_name() -> str:
    """The model of this machine's processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30)  # noqa: S603, S607
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
