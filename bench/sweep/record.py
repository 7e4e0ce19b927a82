"""``record.json``: the result of a cell, with everything that is needed to believe it and to repeat it.

A record of an older schema stays readable for ever. It is brought up to date when it is read, and its file is never rewritten.
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
from bench.io import file_sha256
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
    """The data of the evaluation."""

    entry: str
    fingerprint: str
    """Identity of the prepared dataset, see `bench.data.index.Index.fingerprint`."""
    classes: tuple[str, ...]
    split: str
    samples: int
    keys_sha256: str
    """Hash of the keys of the evaluated samples: each sample of the split, once."""
    bad_pictures: int
    """Pictures left out when the dataset was prepared."""
    provenance: dict[str, Any]


class CodeFacts(_Part):
    """The code that ran."""

    version: str
    commit: str | None
    """None outside a git checkout."""
    clean: bool | None
    """Whether the code was that of the commit. None where that is not known."""
    dirty_diff_sha256: str | None
    """Hash of the changes since the commit, with the content of untracked files. None without changes, or where they are not known."""
    source_sha256: str | None
    """Hash of the program's files when the run began. None in older records."""
    entries: dict[str, str | None]
    """Entries of plugins, such as ``method edge-cam`` -> `bench.registry.foreign_code`. None where there is no file."""
    libraries: dict[str, str]


class ProcessFacts(_Part):
    """The numbers of processes of a training, and whether the weights depend on them."""

    counts: tuple[int, ...]
    """Numbers of processes, in the order of their first use. Several numbers after a restart with another number."""
    dependent: tuple[str, ...]
    """What makes the weights depend on the number, in words. Empty: only rounding does."""


class Record(_Part):
    """The whole of ``record.json``."""

    schema_version: Literal[4] = SCHEMA
    """Schema of this form. A record of an older schema has been brought up to date."""
    key: str
    training_key: str
    scheme: int
    """`bench.matrix.Training.scheme` of the training's key."""
    cell: CellName
    trains_as: str
    """The method that trained: the method of the cell, or the method whose network a post-hoc method reads."""
    variant: Literal["paper", "official"]
    protocol: Literal["val", "test-selected"]
    """How the checkpoint was selected."""
    method_options: dict[str, Any]
    training_options: dict[str, Any]
    """Options of the method that trained."""
    backbone_options: dict[str, Any]
    keyed_code: dict[str, str] = {}
    """Entries of plugins whose code is part of the keys, such as ``method edge-cam`` -> hash."""
    settings: dict[str, Any]
    """The settings that decided the weights: train, augment, images, protocol, guidance."""
    brought: dict[str, str]
    """Dotted key -> source, of settings that are defaults of the dataset, backbone or method."""
    evaluation: dict[str, Any]
    config: dict[str, Any]
    """The whole configuration of the run."""
    origins: dict[str, str]
    data: DataFacts
    attention_layer: int
    """The layer whose cosine is ATT-COS: the first guided layer, or the layer that guidance would take."""
    metrics: dict[str, Any]
    """See `bench.evaluation.metrics.compute_metrics`."""
    invariance: dict[str, Any] | None
    """Whether logits and maps depend on the batch, see `bench.evaluation.invariance.check_invariance`. Where ``holds`` is false, the
    figures are no property of the network and are not ranked. None in records older than this check."""
    selection: dict[str, Any]
    """Epoch and accuracy of the selected checkpoint on the selection split."""
    epochs: list[dict[str, Any]]
    """Losses and accuracies of each epoch."""
    processes: ProcessFacts | None
    """Processes of the training. None in older records."""
    weights_sha256: str
    rows_sha256: str
    """Hash of ``samples.parquet``."""
    maps_sha256: str | None
    """Hash of ``maps.safetensors``, the average maps of each class. None without such maps."""
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
        """The training of the record, from its fields. Its key must be `training_key`."""
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
        """The cell of the record, from its fields. Its key must be `key`."""
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
        ValueError: the content is damaged, or of a schema newer than this program.
    """
    tree = json.loads(content)
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if not isinstance(version, int) or version < 1:
        raise ValueError("it has no schema_version")
    if version > SCHEMA:
        raise ValueError(f"it has schema_version {version}, and this program knows versions up to {SCHEMA}: update bench")
    if version == SCHEMA:
        return Record.model_validate_json(content)  # three times as fast as below, and tables read thousands of records
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
    # Schema 2 recorded the peak of the process since its start, which was not that of the training.
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
"""Schema version -> function that makes the next version. A released function is never changed."""


CODE = ("bench", "methods", "backbones", "datasets", "pyproject.toml")
"""The parts of a checkout that are running code."""


@cache
def code_facts() -> CodeFacts:
    """Version, commit and uncommitted changes of the code, hash of its files, versions of its libraries.

    The facts are read once a process. Call it when a run begins: later, the files may differ from those that were imported.
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
    """The methods, backbones and datasets of cells that come from plugins, see `CodeFacts.entries`."""
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
    """Hash of all files of the packages, by name. It tells two versions apart where there is no git."""
    digest = hashlib.sha256()
    for package in ("bench", "bench.methods", "bench.backbones", "bench.datasets"):
        for folder in sorted(importlib.import_module(package).__path__):
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".toml") and "__pycache__" not in path.parts:
                    name = path.relative_to(folder).as_posix()
                    digest.update(f"{package}/{name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _changes(root: Path) -> bytes | None:
    """What of the code differs from the commit, with the content of untracked files. None where git gives no answer."""
    diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--", *CODE)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE)
    if diff is None or untracked is None:
        return None
    changed = [diff.encode()] if diff else []
    for name in filter(None, untracked.split("\0")):
        path = root / name
        content = file_sha256(path) if path.is_file() else "no file"
        changed.append(f"untracked {name} {content}".encode())
    return b"\n".join(changed)


def hardware_facts(device: torch.device, *, world_size: int) -> dict[str, Any]:
    """The hardware of a run."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **({"environment": switches} if (switches := arithmetic()) else {}),
    }


def device_name(hardware: Mapping[str, Any]) -> str:
    """Name of the device in a record's ``hardware``. On a CPU the number of threads belongs to the name."""
    name, threads = str(hardware.get("name", "?")), hardware.get("threads")
    if hardware.get("device") != "cpu" or threads is None:
        return name
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


@cache
def processor_name() -> str:
    """Model of this machine's processor, or its architecture where the model is not known."""
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
