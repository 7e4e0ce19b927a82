"""From settings to a checked plan. Every error that can be known appears here, before a process or a file is made."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

from bench.au.maps import expression_ids
from bench.config import ConfigError, Settings
from bench.dataset import DATASETS, EXPRESSIONS
from bench.matrix import Matrix, Planned, build_matrix, check_sections, check_world, tell_apart
from bench.runtime.engine import Engine, check_engine
from bench.runtime.interruption import StopRequest
from bench.runtime.observer import Observer
from bench.sweep.datasets import Source, check_splits, prepare_missing, resolve_dataset
from bench.sweep.store import Store
from bench.sweep.trial import outline, try_out
from bench.training.build import build_reader

FEW = 0.5
"""Share of the training faces with an AU map below which a warning says that guidance has little to work on."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does."""

    settings: Settings
    sources: Mapping[str, Source]
    matrix: Matrix
    done: frozenset[str]
    """Keys of the finished cells."""
    world_size: int = 1
    """Processes of one training."""
    only: tuple[str, ...] = ()
    """See `only_trainings`; empty = all trainings."""

    @property
    def to_do(self) -> tuple[Planned, ...]:
        """Trainings with their missing cells, in order."""
        open_cells = [Planned(t, tuple(c for c in cells if c.key not in self.done)) for t, cells in self.matrix.trainings]
        return tuple(planned for planned in open_cells if planned.cells)


def make_plan(settings: Settings, *, world_size: int = 1, only: Sequence[str] = (), trial: bool = True) -> Plan:
    """Resolve and check everything.

    Args:
        settings: validated.
        world_size: processes of one training.
        only: see `only_trainings`; empty = all.
        trial: whether to try the networks still to be trained, see `bench.sweep.trial`; this takes seconds for a network of usual size.

    Raises:
        ConfigError: with origin, key, value, and a valid choice.
        FileNotFoundError: missing pretrained weights.
    """
    config = settings.config
    check_world(config, world_size)
    sources, matrix = read_matrix(settings)
    for source in sources.values():
        check_splits(source, needed=("train", "test") if config.run.protocol == "test-selected" else ("train", "val", "test"))
    matrix = only_trainings(matrix, only) if only else matrix
    check_readers(matrix)
    check_guidance(sources.values(), matrix)
    check_engine((planned.training for planned in matrix.trainings), config.train)
    store = Store(config.run.results)
    done = frozenset(cell.key for cell in matrix.cells if store.is_done(cell))
    plan = Plan(settings=settings, sources=sources, matrix=matrix, done=done, world_size=world_size, only=tuple(only))
    check_layers(matrix)
    if trial:
        try_out((planned, _count_classes(planned, sources)) for planned in plan.to_do)
    return plan


def ready_plan(
    plan: Plan,
    *,
    observer: Observer,
    plugins: Sequence[str] = (),
    stop: StopRequest | None = None,
    engine: Engine | None = None,
    trial: bool = True,
) -> Plan:
    """Prepare the datasets that a plan still misses, and make the plan again: keys of cells depend on the content of the data.

    Args:
        plan: as `make_plan` made it; returned as it is if its datasets are prepared.
        observer: receives the progress.
        plugins: modules that the workers of the preparation load.
        stop: a request to stop ends the preparation; finished shards are kept.
        engine: the processes that call this together: the main one prepares, all make the plan again. None = this process alone.
        trial: see `make_plan`.

    Raises:
        ConfigError: see `make_plan`.
        StoppedError: ``stop`` asked for it.
    """
    missing = any(source.index is None for source in plan.sources.values())
    if not (engine.any(missing) if engine else missing):
        return plan
    with engine.together() if engine else nullcontext():
        if engine is None or engine.is_main:
            prepare_missing(plan.sources.values(), observer=observer, plugins=plugins, stop=stop)
    return make_plan(plan.settings, world_size=plan.world_size, only=plan.only, trial=trial)


def read_matrix(settings: Settings) -> tuple[Mapping[str, Source], Matrix]:
    """The datasets by the names or paths given, and the cells. Enough to look at results: no network is built.

    Raises:
        ConfigError: see `resolve_dataset` and `build_matrix`.
    """
    _check_dataset_tables(settings)
    sources = {name: resolve_dataset(settings, name) for name in settings.config.run.datasets}
    return sources, build_matrix(settings, tell_apart({name: source.reference() for name, source in sources.items()}))


def only_trainings(matrix: Matrix, keys: Sequence[str]) -> Matrix:
    """The part of a matrix that some trainings serve.

    Args:
        matrix: all cells.
        keys: keys of trainings, or beginnings of keys, as ``bench plan`` shows them.

    Raises:
        ConfigError: a key of no training of the matrix, or the beginning of several keys.
    """
    known = {planned.training.key: planned.training for planned in matrix.trainings}
    chosen = set()
    for key in keys:
        matches = [full for full in known if key and full.startswith(key)]
        if not matches:
            raise ConfigError(
                f"--only {key}: the plan has no such training. A key stands for everything that can change the weights: if the key was "
                f"right before, settings or data have changed since. bench plan shows the present keys"
            )
        if len(matches) > 1:
            raise ConfigError(
                f"--only {key}: {len(matches)} keys begin with it: {', '.join(f'{full[:12]} ({known[full].label})' for full in matches)}"
            )
        chosen.update(matches)
    return Matrix(cells=tuple(cell for cell in matrix.cells if cell.training.key in chosen))


def check_readers(matrix: Matrix) -> None:
    """Build every read-out of the plan with its options.

    Raises:
        ConfigError: an option that the method refuses.
    """
    for cell in matrix.cells:
        build_reader(cell)


def check_layers(matrix: Matrix) -> None:
    """Check that every network of the plan can be built and has the guided layers. No memory is taken for the weights.

    Raises:
        ConfigError: an option or image size that a network refuses, or a guided layer that it does not have.
    """
    seen: dict[str, set[int]] = {}
    for training, _ in matrix.trainings:
        identity = repr([getattr(training, name) for name in ("trains_as", "method_options", "variant", "backbone", "backbone_options")])
        identity += repr(training.settings["images"])
        if identity not in seen:
            seen[identity] = set(outline(training).backbone.channels)
        wanted = training.settings.get("guidance", {}).get("layers", ())
        absent = [layer for layer in wanted if layer not in seen[identity]]
        if absent:
            known = ", ".join(map(str, sorted(seen[identity])))
            raise ConfigError(f"guidance.layers = {wanted}: {training.backbone} has no layer {absent[0]}; it has {known}")


def check_guidance(sources: Iterable[Source], matrix: Matrix) -> None:
    """Check that the guided cells of a plan have AU maps to be guided by. A warning says where fewer than half of the faces have one.

    Raises:
        ConfigError: a dataset whose training split has no AU map.
    """
    guided = {planned.training.dataset.fingerprint for planned in matrix.trainings if planned.training.guidance != "none"}
    for source in sources:
        if source.index is None or source.index.fingerprint not in guided:
            continue
        index = source.index
        counts = index.splits["train"].class_counts
        ids = dict(zip(index.classes, expression_ids(index.classes).tolist(), strict=True))
        faces = sum(counts[name] for name in index.classes if ids[name] > 0)
        without = int(index.provenance.get("samples_without_landmarks", {}).get("train", 0))
        if not faces or without >= sum(counts.values()):
            why = (
                f"none of its classes ({', '.join(index.classes)}) is an expression with action units; those are "
                f"{', '.join(EXPRESSIONS[1:])}: name the classes so and prepare it again"
                if not faces
                else "no picture of its training split has landmarks: prepare it with landmarks (bench data prepare --help)"
            )
            raise ConfigError(f"dataset {source.name} has no AU map to guide by: {why}, or leave guidance out: --guidance none")
        # Missing landmarks are counted for the whole split; the share assumes that they are missing in all classes alike.
        share = faces / sum(counts[name] for name in index.classes if ids[name] != 0) * (1 - without / sum(counts.values()))
        if share < FEW:
            _log.warning("dataset %s: about %.0f %% of its training faces have an AU map to be guided by", source.name, 100 * share)


def _count_classes(planned: Planned, sources: Mapping[str, Source]) -> int:
    fingerprint = planned.training.dataset.fingerprint
    counts = [len(source.index.classes) for source in sources.values() if source.index and source.index.fingerprint == fingerprint]
    return counts[0] if counts else len(EXPRESSIONS)  # not prepared yet; the plan is made again afterwards


def _check_dataset_tables(settings: Settings) -> None:
    for name, table in settings.config.datasets.items():
        if "entry" not in table:
            known = settings.config.datasets.keys() - {name}
            if name not in DATASETS and name not in settings.config.run.datasets:
                check_sections(settings, "datasets", [*DATASETS.names(), *known])
