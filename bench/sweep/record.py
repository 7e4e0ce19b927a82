"""``record.json``: one cell's result with everything needed to believe it and to repeat it.

Records are read for ever: one of an older schema is brought up to date when it is read, never rewritten.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

import bench
from bench.matrix import Cell, DatasetRef, Training
from bench.method import METHODS

SCHEMA: Final = 2
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
    dirty_diff_sha256: str | None
    """Hash of what the working tree had changed since the commit; None if nothing."""
    libraries: dict[str, str]


class Record(_Part):
    """The whole of ``record.json``."""

    schema_version: Literal[2] = SCHEMA
    """Of this form; a record that was written in an older one has been brought up to date."""
    key: str
    training_key: str
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
        )

    @property
    def as_cell(self) -> Cell:
        """The cell it is of, as its own fields say: its key must be `key`."""
        return Cell(method=self.cell.method, method_options=self.method_options, training=self.training, evaluation=self.evaluation)


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


_MIGRATIONS: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {1: _from_1}
"""Schema version -> what makes the next one of it. Once released, a step is never changed."""


CODE = ("bench", "methods", "backbones", "datasets", "pyproject.toml")
"""What of a checkout is the running code: results that lie in it, or pages, change nothing."""


@cache
def code_facts() -> CodeFacts:
    """Version, commit and uncommitted changes of the running code, versions of what it stands on."""
    root = Path(bench.__file__).resolve().parent.parent
    commit = diff = None
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        changed = (_git(root, "diff", "HEAD", "--no-ext-diff", "--", *CODE) or "") + (
            _git(root, "status", "--porcelain", "--untracked-files=normal", "--", *CODE) or ""
        )
        diff = hashlib.sha256(changed.encode()).hexdigest() if changed else None
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return CodeFacts(version=bench.__version__, commit=commit, dirty_diff_sha256=diff, libraries=versions)


def hardware_facts(device: torch.device, *, world_size: int) -> dict[str, Any]:
    """What it ran on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30)  # noqa: S603, S607
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
