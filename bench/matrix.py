"""The matrix: from settings to cells to trainings. Pure functions, without I/O; keys and seeds are derived here and nowhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from bench.backbone import BACKBONES, Backbone, BackboneInfo
from bench.config import Config, ConfigError, Origin, Settings, join_key
from bench.dataset import DATASETS
from bench.method import METHODS, Method, MethodInfo, Variant
from bench.registry import Default, Entry, EntryOptions, OptionError, Registry, check_options, did_you_mean, foreign_code

Guidance = Literal["none", "au"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRef:
    """A prepared dataset as the matrix sees it."""

    name: str
    """The user's name for it. Two folders may have the same name."""
    entry: str
    """Registered dataset."""
    fingerprint: str
    """Identity of its content, see `bench.data.index.Index.fingerprint`."""
    samples: Mapping[str, int]
    """Split -> number of samples."""
    label: str = ""
    """Name in messages and tables of a plan, where two datasets have the same name."""

    @property
    def shown(self) -> str:
        """The label, or the name if there is no label."""
        return self.label or self.name


def tell_apart(datasets: Mapping[str, DatasetRef]) -> dict[str, DatasetRef]:
    """Label datasets that have the same name by their fingerprints: ``faces@1a2b3c4d``.

    Raises:
        ConfigError: two of the datasets have the same content.
    """
    first: dict[str, str] = {}
    for given, dataset in datasets.items():
        twin = first.setdefault(dataset.fingerprint, given)
        if twin != given:
            raise ConfigError(
                f"run.datasets: {twin!r} and {given!r} are the same data (fingerprint {dataset.fingerprint[:8]}); leave one of them out"
            )
    names = Counter(dataset.name for dataset in datasets.values())
    return {
        given: dataset if names[dataset.name] == 1 else dataclasses.replace(dataset, label=f"{dataset.name}@{dataset.fingerprint[:8]}")
        for given, dataset in datasets.items()
    }


SCHEME = 2
"""Version of how weights follow from an identity. Since 2, draws of layers and pairs of CutMix do not depend on the number of processes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training: everything that can change its weights, and nothing else."""

    trains_as: str
    method_options: Mapping[str, Any]
    variant: Variant
    guidance: Guidance
    backbone: str
    backbone_options: Mapping[str, Any]
    dataset: DatasetRef
    seed: int
    settings: Mapping[str, Any]
    """The sections of the configuration that decide the weights, with the defaults of entries."""
    brought: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Dotted key -> source, of the settings that are defaults of entries. The values belong to the identity, their sources do not."""
    scheme: int = SCHEME
    """See `SCHEME`; older records have an older scheme."""
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Code of plugins that train: ``method edge-cam`` -> `bench.registry.foreign_code`. Code of this program has `SCHEME`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that can change the weights, as JSON types."""
        return {
            "kind": f"training/{self.scheme}",
            "trains_as": self.trains_as,
            "method_options": self.method_options,
            "variant": self.variant,
            "guidance": self.guidance,
            "backbone": self.backbone,
            "backbone_options": self.backbone_options,
            "dataset": self.dataset.fingerprint,
            "seed": self.seed,
            "settings": self.settings,
            **({"code": self.code} if self.code else {}),
        }

    @property
    def key(self) -> str:
        """Hash of the identity: equal keys share weights."""
        return digest(self.identity)

    @property
    def label(self) -> str:
        """Short name for logs and errors."""
        return f"{self.dataset.shown}/{self.backbone}/{self.trains_as}/{self.guidance}/seed{self.seed}"

    def derived_seed(self, role: str) -> int:
        """A 63-bit seed for a role (``init``, ``data``, ``step``).

        It depends on the seed and the role only. At equal seeds all methods start alike and see the same pictures in the same order with
        the same augmentation, so comparisons between methods are paired.
        """
        return int(digest({"role": role, "seed": self.seed})[:16], 16) >> 1

    @property
    def seeds(self) -> dict[str, int]:
        """The seed, and the seeds of the roles that every training has, as records keep them."""
        return {"seed": self.seed, **{role: self.derived_seed(role) for role in ("init", "data", "step")}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A row of results: a training, read out by a method."""

    method: str
    method_options: Mapping[str, Any]
    training: Training
    evaluation: Mapping[str, Any]
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Code of a plugin that reads the maps, as `Training.code`."""

    @property
    def key(self) -> str:
        """Hash of the training's key, the read-out and the evaluation settings."""
        return digest(
            {
                "kind": "cell/1",
                "training": self.training.key,
                "method": self.method,
                "method_options": self.method_options,
                "evaluation": self.evaluation,
                **({"code": self.code} if self.code else {}),
            }
        )

    @property
    def path(self) -> str:
        """Folder of the cell below ``<results>/cells``: readable, and unique by its hash."""
        dataset, backbone, method = _safe(self.training.dataset.name), _safe(self.training.backbone), _safe(self.method)
        return f"{dataset}/{backbone}/{method}/{self.training.guidance}/seed{self.training.seed}-{self.key[:10]}"

    @property
    def label(self) -> str:
        """Short name for logs and errors."""
        training = self.training
        return f"{training.dataset.shown}/{training.backbone}/{self.method}/{training.guidance}/seed{training.seed}"


class Planned(NamedTuple):
    """A training with the cells that it serves."""

    training: Training
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """All cells, in order."""

    cells: tuple[Cell, ...]

    @property
    def trainings(self) -> tuple[Planned, ...]:
        """The trainings of the cells, each once, in the order of its first cell."""
        served: dict[str, list[Cell]] = {}
        for cell in self.cells:
            served.setdefault(cell.training.key, []).append(cell)
        return tuple(Planned(cells[0].training, tuple(cells)) for cells in served.values())


def digest(tree: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


def build_matrix(settings: Settings, datasets: Mapping[str, DatasetRef]) -> Matrix:
    """Expand settings into cells, methods outermost in table order, seeds innermost.

    Args:
        settings: the validated configuration.
        datasets: a reference for every dataset the configuration names.

    Raises:
        ValueError: an unknown name or option, a method that can take no backbone of the run, a batch larger than a training split. The
            message names the origin of the value and a valid choice.
    """
    config = settings.config
    methods = select(METHODS, config.run.methods, origin=settings.origin("run.methods"))
    backbones = select(BACKBONES, config.run.backbones, origin=settings.origin("run.backbones"))
    for section, registry in (("methods", METHODS), ("backbones", BACKBONES)):
        check_sections(settings, section, registry.names(), registry)
    pairs = _pair(methods, backbones, origin=settings.origin("run.backbones"))
    cells = [
        Cell(
            method=method.name,
            method_options=_options(settings, "methods", method, datasets[dataset]),
            evaluation=config.evaluation.model_dump(mode="json", exclude={"batch_size"}),
            code=_foreign(method=method),
            training=_training(settings, method, backbone, datasets[dataset], guidance=guidance, seed=seed),
        )
        for dataset in config.run.datasets
        for method, backbone in pairs
        for guidance in config.run.guidance
        for seed in config.run.seeds
    ]
    assert len({cell.label for cell in cells}) == len(cells), "labels tell the cells of a plan apart"
    return Matrix(cells=tuple(cells))


T = TypeVar("T")
I = TypeVar("I", MethodInfo, BackboneInfo)  # noqa: E741


def select(registry: Registry[T, I], names: Sequence[str], *, origin: Origin) -> list[Entry[T, I]]:
    """Resolve names, ``all`` and ``everything`` to entries, each once, in the order given.

    Raises:
        ConfigError: an unknown name; the message proposes the nearest.
    """
    chosen: dict[str, Entry[T, I]] = {}
    for name in names:
        if name in ("all", "everything"):
            chosen.update({entry.name: entry for entry in registry if entry.info.in_all or name == "everything"})
        else:
            try:
                chosen[name] = registry.get(name)
            except ValueError as error:
                raise ConfigError(f"{origin}: {error}") from error
    return list(chosen.values())


def check_sections(settings: Settings, section: str, known: Sequence[str], registry: Registry[Any, Any] | None = None) -> None:
    """Refuse ``[section.NAME]`` tables of unknown entries. With a registry, members of its families are known.

    Raises:
        ConfigError: naming the table, its origin and the nearest entry.
    """
    for name in getattr(settings.config, section):
        if name in known:
            continue
        table = join_key(section, name)
        origin = next((o.text for key, o in settings.origins.items() if key.startswith(f"{table}.")), "")
        if registry is None or ":" not in name:
            raise ConfigError(f"{origin}: unknown {section.removesuffix('s')} {name!r} in [{table}].{did_you_mean(name, known)}")
        try:
            registry.get(name)
        except ValueError as error:
            raise ConfigError(f"{origin}: [{table}]: {error}") from error


def parse_options(registry: Registry[Any, Any], name: str, given: Mapping[str, Any], *, where: str) -> EntryOptions:
    """Validate the options of an entry with its own model.

    Raises:
        ConfigError: an unknown key (with the nearest key), or a value of the wrong type. The message begins with ``where``.
    """
    try:
        return check_options(registry, name, given)
    except OptionError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_world(config: Config, world_size: int) -> None:
    """Refuse a global batch that does not divide over processes and micro-batches.

    Raises:
        ConfigError: with the nearest sizes that divide.
    """
    parts = world_size * config.train.accumulate
    batch = config.train.batch_size
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        near = " or ".join(str(b) for b in (below, above) if b)
        raise ConfigError(
            f"train.batch_size = {batch} does not divide over {world_size} processes x accumulate = {config.train.accumulate}; "
            f"the nearest that do are {near}"
        )


def _training(
    settings: Settings,
    method: Entry[Method, MethodInfo],
    backbone: Entry[Backbone, BackboneInfo],
    dataset: DatasetRef,
    *,
    guidance: Guidance,
    seed: int,
) -> Training:
    trained = METHODS.get(method.info.trains_as) if method.info.trains_as else method
    config, brought = _with_defaults(settings, (DATASETS.get(dataset.entry), backbone, trained), dataset)
    samples, batch_size = dataset.samples.get("train", 0), config.train.batch_size
    if samples < batch_size:
        raise ConfigError(
            f"{settings.origin('train.batch_size')}: train.batch_size = {batch_size} is more than the {samples} training samples of "
            f"{dataset.shown}; try --set train.batch_size={max(1, samples // 4)}"
        )
    resolved: dict[str, Any] = {
        "train": config.train.model_dump(mode="json", exclude={"checkpoint_minutes"}),
        "augment": config.augment.model_dump(mode="json"),
        "images": config.images.model_dump(mode="json"),
        "protocol": config.run.protocol,
    }
    if guidance == "au":
        aligned = config.guidance.model_dump(mode="json")
        resolved["guidance"] = aligned | {"layers": aligned["layers"] or list(backbone.info.guided_layers)}
    return Training(
        trains_as=trained.name,
        method_options=_options(settings, "methods", trained, dataset),
        variant=config.run.variant,
        guidance=guidance,
        backbone=backbone.name,
        backbone_options=_options(settings, "backbones", backbone, dataset),
        dataset=dataset,
        seed=seed,
        settings=resolved,
        code=_foreign(method=trained, backbone=backbone),
        brought={key: source for key, source in brought.items() if guidance == "au" or not key.startswith("guidance.")},
    )


def _foreign(**entries: Entry[Any, Any]) -> dict[str, str]:
    """Code of entries that come from plugins: ``method edge-cam`` -> hash."""
    hashes = {f"{kind} {entry.name}": foreign_code(entry.target) for kind, entry in entries.items()}
    return {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}


def _with_defaults(settings: Settings, entries: Sequence[Entry[Any, Any]], dataset: DatasetRef) -> tuple[Config, dict[str, str]]:
    """The configuration with the defaults of entries wherever the user has set nothing. Later entries win. Also key -> source of these."""
    tree = settings.config.model_dump(mode="json")
    brought: dict[str, str] = {}
    for entry in entries:
        for default in _applicable(entry, settings.config.run.variant, dataset):
            section, _, key = default.key.partition(".")
            if section != "option" and settings.origin(default.key).layer == "default":
                assert key in tree[section], default.key
                tree[section][key] = default.value
                brought[default.key] = f"{entry.name}: {default.source}"
    return (Config.model_validate(tree), brought) if brought else (settings.config, brought)


def _applicable(entry: Entry[Any, Any], variant: Variant, dataset: DatasetRef) -> list[Default]:
    """The defaults of an entry for this dataset and variant. Those for this dataset only come last, and win."""
    fitting = [d for d in entry.info.defaults if d.dataset in (None, dataset.entry) and d.variant in (None, variant)]
    return sorted(fitting, key=lambda d: d.dataset is not None)


def _options(settings: Settings, section: str, entry: Entry[Any, Any], dataset: DatasetRef) -> dict[str, Any]:
    given = getattr(settings.config, section).get(entry.name, {})
    origins = {settings.origin(join_key(section, entry.name, key)).text for key in given}
    registry: Registry[Any, Any] = METHODS if section == "methods" else BACKBONES
    own = {
        d.key.removeprefix("option."): d.value
        for d in _applicable(entry, settings.config.run.variant, dataset)
        if d.key.startswith("option.")
    }
    where = f"[{join_key(section, entry.name)}] ({', '.join(sorted(origins))})"
    return parse_options(registry, entry.name, own | given, where=where).model_dump(mode="json")


def _pair(
    methods: Sequence[Entry[Method, MethodInfo]], backbones: Sequence[Entry[Backbone, BackboneInfo]], *, origin: Origin
) -> list[tuple[Entry[Method, MethodInfo], Entry[Backbone, BackboneInfo]]]:
    """All pairs of a method and a backbone that it can take. Each method must occur, and each backbone that a flag names."""
    pairs = [(m, b) for m in methods for b in backbones if b.info.kind in m.info.backbones]
    for method in methods:
        if not any(m is method for m, _ in pairs):
            possible = [b.name for b in (*BACKBONES, *BACKBONES.families()) if b.info.kind in method.info.backbones]
            raise ConfigError(
                f"{origin}: method {method.name!r} can take none of the backbones {', '.join(b.name for b in backbones)}; "
                f"it can take: {', '.join(possible)}"
            )
    for backbone in backbones if origin.layer in ("set", "flag") else ():  # a profile lists backbones for all methods
        if not any(b is backbone for _, b in pairs):
            possible = [m.name for m in METHODS if backbone.info.kind in m.info.backbones]
            raise ConfigError(
                f"{origin}: backbone {backbone.name!r} serves none of the methods {', '.join(m.name for m in methods)}; "
                f"it serves: {', '.join(possible)}"
            )
    return pairs


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
