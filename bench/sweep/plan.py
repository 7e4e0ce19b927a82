"""From settings to a checked plan. Everything that can be wrong is found here, before a process or a file is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from bench.config import ConfigError, Settings
from bench.dataset import DATASETS
from bench.matrix import Matrix, Planned, Training, build_matrix, check_sections, check_world, tell_apart
from bench.sweep.datasets import Source, check_splits, resolve_dataset
from bench.sweep.store import Store
from bench.training.build import build_classifier, build_reader
from bench.training.engine import check_engine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do."""

    settings: Settings
    sources: Mapping[str, Source]
    matrix: Matrix
    done: frozenset[str]
    """Keys of the cells that are finished."""

    @property
    def to_do(self) -> tuple[Planned, ...]:
        """Trainings with the cells still missing, in order."""
        open_cells = [Planned(t, tuple(c for c in cells if c.key not in self.done)) for t, cells in self.matrix.trainings]
        return tuple(planned for planned in open_cells if planned.cells)


def make_plan(settings: Settings, *, world_size: int = 1, only: Sequence[str] = ()) -> Plan:
    """Resolve and check everything.

    Args:
        settings: validated.
        world_size: processes of one training.
        only: see `only_trainings`; empty = all.

    Raises:
        ConfigError: with origin, key, value, and what would do.
        FileNotFoundError: pretrained weights that are not there.
    """
    config = settings.config
    check_world(config, world_size)
    sources, matrix = read_matrix(settings)
    for source in sources.values():
        check_splits(source, needed=("train", "test") if config.run.protocol == "test-selected" else ("train", "val", "test"))
    matrix = only_trainings(matrix, only) if only else matrix
    check_buildable(matrix)
    check_engine((planned.training for planned in matrix.trainings), config.train)
    store = Store(config.run.results)
    return Plan(settings=settings, sources=sources, matrix=matrix, done=frozenset(c.key for c in matrix.cells if store.is_done(c)))


def read_matrix(settings: Settings) -> tuple[Mapping[str, Source], Matrix]:
    """The datasets by the name or path given, and the cells: all that looking at results needs. Builds no network.

    Raises:
        ConfigError: see `resolve_dataset` and `build_matrix`.
    """
    _check_dataset_tables(settings)
    sources = {name: resolve_dataset(settings, name) for name in settings.config.run.datasets}
    return sources, build_matrix(settings, tell_apart({name: source.reference() for name, source in sources.items()}))


def only_trainings(matrix: Matrix, keys: Sequence[str]) -> Matrix:
    """The part of a matrix that some trainings serve, given by their keys or by beginnings of them, as ``bench plan`` shows.

    Raises:
        ConfigError: a key of no training of the matrix, or a beginning of several.
    """
    known = {planned.training.key: planned.training for planned in matrix.trainings}
    chosen = set()
    for key in keys:
        found = [full for full in known if key and full.startswith(key)]
        if not found:
            raise ConfigError(
                f"--only {key}: the plan has no such training. A key stands for everything that can change the weights: if it was right "
                f"once, settings or data have changed since. bench plan shows the keys of now"
            )
        if len(found) > 1:
            raise ConfigError(f"--only {key}: begins {len(found)} keys: {', '.join(f'{k[:12]} ({known[k].label})' for k in found)}")
        chosen.update(found)
    return Matrix(cells=tuple(cell for cell in matrix.cells if cell.training.key in chosen))


def check_buildable(matrix: Matrix) -> None:
    """Build every different network of the plan once, without memory where it has no pretrained weights to load.

    Raises:
        ConfigError: an option, image size or guided layer that the network does not have.
        FileNotFoundError: pretrained weights that are not there.
    """
    seen: set[str] = set()
    for training, cells in matrix.trainings:
        for cell in cells:
            build_reader(cell)
        identity = repr(
            (training.trains_as, training.method_options, training.backbone, training.backbone_options, training.settings["images"])
        )
        layers = _layers(training) if identity not in seen or "guidance" in training.settings else None
        seen.add(identity)
        wanted = training.settings.get("guidance", {}).get("layers", ())
        absent = [layer for layer in wanted if layers is not None and layer not in layers]
        if layers is not None and absent:
            raise ConfigError(
                f"guidance.layers = {wanted}: {training.backbone} has no layer {absent[0]}; it has {', '.join(map(str, sorted(layers)))}"
            )


def _layers(training: Training) -> set[int]:
    pretrained = training.backbone_options.get("weights", "random") != "random"
    try:
        if pretrained:
            return set(build_classifier(training, num_classes=7).backbone.channels)
        with torch.device("meta"):
            return set(build_classifier(training, num_classes=7).backbone.channels)
    except ValueError as error:
        raise ConfigError(f"{training.trains_as} on {training.backbone}: {error}") from error


def _check_dataset_tables(settings: Settings) -> None:
    for name, table in settings.config.datasets.items():
        if "entry" not in table:
            known = settings.config.datasets.keys() - {name}
            if name not in DATASETS and name not in settings.config.run.datasets:
                check_sections(settings, "datasets", [*DATASETS.names(), *known])
