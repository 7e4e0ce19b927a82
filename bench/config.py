"""From ``bench.toml`` to typed, frozen, validated settings. Every value knows where it came from.

There are layers, and a later layer wins: defaults (the classes below), the profile shipped with the package, the file, the profile of
that name in the file, the environment (``BENCH_TRAIN__LR=0.01``), ``--set train.lr=0.01``, command-line flags.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench.registry import did_you_mean

CONFIG_NAME = "bench.toml"
ENV_PREFIX = "BENCH_"
MEASURES = ("au", "energy", "pointing", "ap", "deletion", "insertion", "drop", "road", "randomisation")
"""Names of the optional measures, see `bench.evaluation.measures`."""
FLAGS = {"evaluation.measures": "--metrics"}
"""Keys whose command-line flag is not named like the key."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class ContradictionError(ValueError):
    """Values of a section contradict each other.

    Args:
        message: what is wrong.
        keys: keys of the values, below the section.
    """

    def __init__(self, message: str, *, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(_Section):
    """What to run, and where its files are."""

    methods: tuple[str, ...] = ("all",)
    """Names of methods; ``all`` = the rows of the published table, ``everything`` = every registered method."""
    datasets: tuple[str, ...] = ("synthetic",)
    """Names of datasets, or paths of prepared folders."""
    backbones: tuple[str, ...] = ("resnet50",)
    """Each method runs on every listed backbone it can take."""
    guidance: tuple[Literal["none", "au"], ...] = ("none", "au")
    """``none``: the method's own loss. ``au``: the loss of ``[guidance]`` is added."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """A training for each seed. A seed decides the initial weights, the order of the pictures and their augmentation."""
    variant: Literal["paper", "official"] = "paper"
    """``paper``: each method as its own paper says. ``official``: each method as the published FER code computes it."""
    protocol: Literal["val", "test-selected"] = "val"
    """Split whose accuracy selects the checkpoint. ``test-selected`` repeats what the published tables did, and is optimistic."""
    results: Path = Path("results")
    """Folder of records, weights and failures."""
    data: Path = Path("data")
    """Folder of prepared datasets."""

    @model_validator(mode="after")
    def _no_repeats(self) -> RunConfig:
        for key in ("methods", "datasets", "backbones", "guidance", "seeds"):
            values = getattr(self, key)
            if not values:
                raise ContradictionError(f"{key}: empty list; name at least one", keys=[key])
            repeated = sorted({str(v) for v in values if values.count(v) > 1})
            if repeated:
                raise ContradictionError(f"{key}: {', '.join(repeated)} is listed more than once", keys=[key])
        return self


class TrainConfig(_Section):
    """Optimisation. The defaults are those of the published command."""

    epochs: Positive = 20
    """Passes over the training split."""
    batch_size: Positive = 224
    """Pictures of a step, over all processes and accumulated micro-batches."""
    accumulate: Positive = 1
    """Micro-batches of a step, in each process."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """``sgd`` with Nesterov momentum, or ``adamw``."""
    lr: Annotated[float, Field(gt=0)] = 0.002
    """Learning rate of the backbone, after the warm-up."""
    head_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the head, divided by that of the backbone."""
    momentum: Fraction = 0.9
    """Momentum of SGD; AdamW ignores it."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of all parameters."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """How the learning rate falls: in steps, along a cosine, or not at all."""
    step_epochs: Positive = 4
    """``step``: number of epochs after which the learning rate is multiplied by ``gamma``."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    """``step``: factor of the learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-7
    """Smallest learning rate of the schedule."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises linearly from 0 to ``lr``."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient. 0 disables clipping."""
    balance: Literal["none", "class"] = "none"
    """``class``: samples are drawn so that each class occurs equally often."""
    engine: Literal["ddp", "deepspeed"] = "ddp"
    """Library that runs the processes of a training. ``deepspeed`` needs the extra ``deepspeed``."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed: 1 = each process keeps its part of the optimiser's state; 2 = its part of the gradients, too."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast in training. Evaluation and maps are always computed in float32."""
    tf32: bool = False
    """CUDA: TensorFloat-32 in the matrix products and convolutions of training. Without it they are exact float32."""
    channels_last: bool = False
    """Channels-last memory order of weights and pictures in training, which is faster on tensor cores."""
    compile: bool = False
    """``torch.compile`` of the training step. Evaluation and maps use the uncompiled network."""
    sync_batchnorm: bool = False
    """Batch statistics over all processes of a training. GPUs only."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Per-step EMA decay. The averaged weights are selected, evaluated and saved. 0 disables it."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time. An operation without such an algorithm is an error."""
    select_every: Positive = 1
    """Epochs between evaluations that may select the checkpoint."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Longest time between checkpoints, in minutes. A checkpoint is made at the end of each epoch, too."""

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ContradictionError(
                f"batch_size = {self.batch_size} is not a multiple of accumulate = {self.accumulate}", keys=["batch_size", "accumulate"]
            )
        if self.warmup_epochs >= self.epochs:
            raise ContradictionError(
                f"warmup_epochs = {self.warmup_epochs} takes all of epochs = {self.epochs}", keys=["warmup_epochs", "epochs"]
            )
        if self.min_lr > self.lr:
            raise ContradictionError(f"min_lr = {self.min_lr} is above lr = {self.lr}", keys=["min_lr", "lr"])
        if self.engine == "ddp" and self.zero_stage:
            raise ContradictionError(
                f"zero_stage = {self.zero_stage} is DeepSpeed's; it needs engine = deepspeed", keys=["zero_stage", "engine"]
            )
        if self.engine == "deepspeed":
            if self.precision == "fp16":
                raise ContradictionError(
                    "precision = fp16 does not go with engine = deepspeed; use precision = bf16 or no, or engine = ddp",
                    keys=["precision", "engine"],
                )
            for key in ("compile", "channels_last"):
                if getattr(self, key):
                    raise ContradictionError(f"{key} = true does not go with engine = deepspeed; use engine = ddp", keys=[key, "engine"])
        return self


class GuidanceConfig(_Section):
    """Training with action units: loss += weight * mean(1 - cosine(layer attention, AU map))."""

    weight: Annotated[float, Field(gt=0)] = 9.0
    """Lambda of the loss. 9 is published for AffectNet; 4 fits the published RAF-DB figures."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Layers to align. Empty: the choice of the backbone (the last stage of a CNN)."""
    au_maps: Literal["official", "symmetric"] = "symmetric"
    """Geometry of the AU maps in training: as published, or the same on both sides of the face."""
    grid: Positive = 28
    """Side of the grid of the AU maps."""


class AugmentConfig(_Section):
    """Augmentation of the training pictures. The defaults are the published recipe; a name that ends in ``_p`` is a probability."""

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 6.0
    """Largest angle of a rotation, to either side."""
    rotation_p: Fraction = 0.5
    """Probability of a rotation."""
    crop_scale: tuple[Fraction, Fraction] = (0.8, 1.0)
    """Range of the area of the random square crop, as a share of the picture."""
    flip_p: Fraction = 0.5
    """Probability of a horizontal flip."""
    grayscale_p: Fraction = 0.2
    """Probability of a grey picture."""
    jitter_p: Fraction = 0.8
    """Probability of a change of brightness, contrast, saturation and hue."""
    brightness: Fraction = 0.4
    """Largest relative change of the brightness."""
    contrast: Fraction = 0.4
    """Largest relative change of the contrast."""
    saturation: Fraction = 0.4
    """Largest relative change of the saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift of the hue, as a share of the colour circle."""
    erase_p: Fraction = 0.5
    """Probability of an erased rectangle."""
    erase_area: tuple[Fraction, Fraction] = (0.02, 0.33)
    """Range of the area of the erased rectangle, as a share of the picture."""
    erase_ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.3, 3.3)
    """Range of the ratio of its sides."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for key in ("crop_scale", "erase_area", "erase_ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ContradictionError(f"{key}: the first value, {low}, is above the second, {high}", keys=[key])
        if self.crop_scale[0] <= 0:
            raise ContradictionError("crop_scale: the smallest crop needs an area above 0", keys=["crop_scale"])
        return self


class ImagesConfig(_Section):
    """The network's input."""

    size: Annotated[int, Field(ge=16)] = 224
    """Side of the square input in pixels."""


class EvaluationConfig(_Section):
    """The pass over the test split that serves all cells of a training."""

    batch_size: Positive = 64
    """Pictures of a batch. No result depends on it."""
    au_maps: Literal["official", "symmetric"] = "symmetric"
    """Geometry of the AU maps that maps and attentions are compared with."""
    measures: tuple[str, ...] = ()
    """Optional measures besides the cosines: names, or ``all``. See docs/metrics.md."""
    measure_samples: Annotated[int, Field(ge=0)] = 0
    """Number of test samples, evenly spread, for the optional measures. 0 = all."""

    @field_validator("measures", mode="after")
    @classmethod
    def _resolved(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Bring the names into the order of the table, each once: another spelling is the same evaluation."""
        for name in names:
            if name not in (*MEASURES, "all"):
                raise ValueError(f"unknown measure {name!r}.{did_you_mean(name, (*MEASURES, 'all'))}")
        return tuple(name for name in MEASURES if name in names or "all" in names)


class LoaderConfig(_Section):
    """How shards are read. Nothing here can change a result."""

    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode pictures, for each process of a training."""
    cache_gib: Annotated[float, Field(ge=0)] = 2.0
    """Memory for decoded pictures, in GiB. A split that fits is decoded once."""
    verify: bool = True
    """Check the sha256 of every shard when a run opens it first."""


class SlurmConfig(_Section):
    """What ``--launcher slurm`` asks the cluster for, for each training. Nothing here can change a result."""

    cluster: Literal["slurm", "local"] = "slurm"
    """``local``: the same jobs on this machine without Slurm, for a trial."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    constraint: str | None = None
    """sbatch --constraint."""
    minutes: Positive = 240
    """Time limit of a job, in minutes. A longer training is requeued and goes on from its checkpoint."""
    max_requeues: Annotated[int, Field(ge=0)] = 10
    """Times that a job is requeued after its time limit. Preemptions do not count."""
    signal_seconds: Annotated[int, Field(ge=30)] = 120
    """Seconds before the time limit at which a job is asked to save. Must exceed a step and a checkpoint."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a node. None: as many as processes; with ``--device cpu`` none."""
    cpus_per_task: Positive | None = None
    """CPU cores of a process and of the workers of its loader."""
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of a node, in GB."""
    parallel: Positive | None = None
    """Most jobs at a time. None: as many as Slurm lets run; ``local``: 1."""
    extra: dict[str, str | int | bool] = {}
    """Further sbatch options: ``[slurm.extra]`` with ``reservation = "faces"`` becomes ``--reservation=faces``."""

    @model_validator(mode="after")
    def _possible(self) -> SlurmConfig:
        for name in self.extra:
            flag = name.replace("_", "-")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
                raise ContradictionError(
                    f"extra: {name!r} is not the long name of an sbatch option, like reservation", keys=[join_key("extra", name)]
                )
            if flag in SLURM_OWN:
                raise ContradictionError(f"extra: {name!r} is set by {SLURM_OWN[flag]}", keys=[join_key("extra", name)])
        # Slurm may send the signal up to a minute early (man sbatch).
        if self.signal_seconds + 60 >= 60 * self.minutes:
            raise ContradictionError(
                f"signal_seconds = {self.signal_seconds} leaves no time to work in minutes = {self.minutes}: "
                f"the signal may come up to 60 s earlier",
                keys=["signal_seconds", "minutes"],
            )
        return self


SLURM_OWN = {
    "nodes": "--nnodes",
    "ntasks": "--nproc",
    "ntasks-per-node": "--nproc",
    "time": "slurm.minutes",
    "signal": "slurm.signal_seconds",
    "array": "slurm.parallel",
    "mem": "slurm.mem_gb",
    **{name: f"slurm.{name.replace('-', '_')}" for name in ("partition", "account", "qos", "constraint", "gpus-per-node", "cpus-per-task")},
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "requeue", "chdir"), "bench itself"),
}
"""sbatch options that `SlurmConfig.extra` may not hold -> what sets them."""


class SweepConfig(_Section):
    """How several runs share a results folder. Nothing here can change a result."""

    lease_heartbeat_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between two signs of life of the run that works on a training."""
    lease_stale_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds without a sign of life after which another run takes the training over. At once if the process is known to have ended."""

    @model_validator(mode="after")
    def _patient(self) -> SweepConfig:
        if self.lease_stale_s < 2 * self.lease_heartbeat_s:
            raise ContradictionError(
                f"lease_stale_s = {self.lease_stale_s} is less than two lease_heartbeat_s = {self.lease_heartbeat_s}: "
                f"a run that is alive would lose its training",
                keys=["lease_stale_s", "lease_heartbeat_s"],
            )
        return self


class Config(_Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    augment: AugmentConfig = AugmentConfig()
    images: ImagesConfig = ImagesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loader: LoaderConfig = LoaderConfig()
    sweep: SweepConfig = SweepConfig()
    slurm: SlurmConfig = SlurmConfig()
    methods: dict[str, dict[str, Any]] = {}
    """``[methods.NAME]``: options of a method, checked by the method itself."""
    backbones: dict[str, dict[str, Any]] = {}
    """``[backbones.NAME]``: options of a backbone, checked by the backbone itself."""
    datasets: dict[str, dict[str, Any]] = {}
    """``[datasets.NAME]``: options of a dataset. ``entry`` names the registered dataset if NAME is the user's; ``raw`` is the folder of the
    download; ``allow_partial`` and ``landmark_weights`` are those of ``bench data prepare``."""


class ConfigError(ValueError):
    """A setting that cannot be used. The message names its place, its key, its value and a valid choice."""


Layer = Literal["default", "profile", "file", "environment", "set", "flag"]


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    layer: Layer
    text: str
    """Its text in messages and records."""

    def __str__(self) -> str:
        return self.text


DEFAULT = Origin("default", "default")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A validated configuration and where each of its values came from."""

    config: Config
    origins: Mapping[str, Origin]
    """Dotted key -> origin, for every value."""

    def origin(self, key: str) -> Origin:
        """Where the value of a dotted key came from."""
        return self.origins.get(key, DEFAULT)


def load_settings(
    *,
    file: Path | None = None,
    profile: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge all layers and validate the result.

    Args:
        file: a TOML file. None: ``bench.toml`` in the working directory, if it exists.
        profile: name of a set of values. None: the ``profile`` key of the file, if it has one.
        sets: ``a.b=value`` strings, the value in TOML notation (a bare word is a string).
        flags: dotted key -> value, of the command-line flags that were given.
        environ: the environment. None: that of this process.

    Raises:
        ConfigError: naming origin, key, value and the nearest valid choice.
    """
    if file is not None and not file.is_file():
        raise ConfigError(f"--config {file}: there is no such file")
    path = file or (Path(CONFIG_NAME) if Path(CONFIG_NAME).is_file() else None)
    content = _read_toml(_read_text(path), origin=str(path)) if path else {}
    shipped = _read_toml(files("bench").joinpath("profiles.toml").read_text(encoding="utf-8"), origin="profiles.toml")

    own_profiles = _table(content.pop("profiles", {}), key="profiles", origin=str(path))
    profile = profile or content.pop("profile", None)
    content.pop("profile", None)
    merged: dict[str, tuple[Any, Origin]] = {}
    if profile is not None:
        if not isinstance(profile, str) or profile not in {*shipped, *own_profiles}:
            raise ConfigError(f"unknown profile {profile!r}.{did_you_mean(str(profile), {*shipped, *own_profiles})}")
        merged.update(_flatten(shipped.get(profile, {}), origin=Origin("profile", f"shipped profile {profile}")))
    merged.update(_flatten(content, origin=Origin("file", str(path))))
    if profile is not None and profile in own_profiles:
        table = _table(own_profiles[profile], key=f"profiles.{profile}", origin=str(path))
        merged.update(_flatten(table, origin=Origin("profile", f"{path} [profiles.{profile}]")))
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            origin = Origin("environment", f"environment {name}")
            merged[key] = (_parse_value(value, key=key, origin=origin), origin)
    for assignment in sets:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: write it as key=value, for example --set train.lr=0.01")
        origin = Origin("set", f"--set {assignment}")
        merged[join_key(*split_key(key.strip()))] = (_parse_value(value.strip(), key=key.strip(), origin=origin), origin)
    for key, value in (flags or {}).items():
        merged[key] = (value, Origin("flag", FLAGS.get(key, f"--{key.rsplit('.', 1)[-1].replace('_', '-')}")))
    return _validate({key: (_with_home(value), origin) for key, (value, origin) in merged.items()})


def _with_home(value: Any) -> Any:
    """Replace a leading ``~`` of a path by the home folder, in a list too: no shell expands what a file says."""
    if isinstance(value, list | tuple):
        return [_with_home(part) for part in value]
    if isinstance(value, str | Path) and re.match(r"~(/|$)", str(value)):
        return type(value)(Path(value).expanduser())
    return value


def _validate(merged: Mapping[str, tuple[Any, Origin]]) -> Settings:
    tree: dict[str, Any] = {}
    for key, (value, origin) in merged.items():
        node = tree
        *parents, leaf = split_key(key)
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{origin}: key {key!r}: {parent!r} is a value, not a table")
        node[leaf] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, merged)) from None
    origins = {key: merged[key][1] if key in merged else DEFAULT for key, _ in walk(config.model_dump(mode="json"))}
    return Settings(config=config, origins=origins)


def join_key(*parts: str) -> str:
    """Dotted key of nested tables. A part with dots is quoted as in TOML: ``backbones."timm:resnet50.a1_in1k".weights``."""
    return ".".join(f'"{part}"' if "." in part else part for part in parts)


def split_key(key: str) -> list[str]:
    """Inverse of `join_key`.

    Raises:
        ConfigError: an empty part, or an open quote.
    """
    if not re.fullmatch(r'(?:"[^"]+"|[^".]+)(?:\.(?:"[^"]+"|[^".]+))*', key):
        raise ConfigError(f"key {key!r}: separate its parts by dots, and put a part that contains dots in double quotes")
    return [quoted or bare for quoted, bare in re.findall(r'"([^"]+)"|([^".]+)', key)]


def walk(tree: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf of nested tables, see `join_key`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk(value, (*parents, key))
        else:
            yield join_key(*parents, key), value


def _flatten(tree: Mapping[str, Any], *, origin: Origin) -> dict[str, tuple[Any, Origin]]:
    return {key: (value, origin) for key, value in walk(tree)}


def _explain(error: ValidationError, merged: Mapping[str, tuple[Any, Origin]]) -> str:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        # The location of a problem inside a list ends with a position; the origin belongs to the list.
        leading = [join_key(*location[:n]) for n in range(len(location), 0, -1)]
        key = next((k for k in leading if k in merged), join_key(*location))
        value, origin = merged.get(key, (problem["input"], None))
        place = f"{origin}: " if origin else ""
        if problem["type"] == "extra_forbidden":
            section, name = join_key(*location[:-1]), location[-1]
            where = origin or next((o for k, (_, o) in merged.items() if k.startswith(join_key(*location) + ".")), None)
            assert where is not None
            lines.append(f"{where}: unknown key {join_key(*location)!r}.{did_you_mean(name, _fields(section))}")
        elif problem["type"] == "value_error":
            contradiction = problem["ctx"]["error"]
            names = contradiction.keys if isinstance(contradiction, ContradictionError) else ()
            keys = [f"{key}.{name}" for name in names]
            involved = [f"{k} from {merged[k][1] if k in merged else DEFAULT}" for k in keys]
            beside = f" ({'; '.join(involved)})" if involved else ""
            lines.append(f"{place}[{key}] {problem['msg'].removeprefix('Value error, ')}{beside}")
        else:
            lines.append(f"{place}{key} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "\n".join(lines)


def _fields(section: str) -> list[str]:
    if not section:
        return list(Config.model_fields)
    annotation = Config.model_fields[section.split(".")[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8; TOML files are UTF-8, so save the file in that encoding") from error


def _read_toml(text: str, *, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error


def _table(value: Any, *, key: str, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: {key} = {value!r}: expected a table")
    return value


def parse_integers(text: str, *, origin: str) -> list[int]:
    """``0,2`` or ``0-4`` or ``0-2,7`` -> the numbers.

    Raises:
        ConfigError: not of that form.
    """
    numbers: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{origin}: {part!r} is not a whole number or a range; write 0,1,2 or 0-4")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _parse_value(text: str, *, key: str, origin: Origin) -> Any:
    """Parse a typed value by the type of its key: a text stays a text, and a list may be written as for flags (0,1 or 0-4).

    The type of an option of an entry is not known here. Such a value is read as TOML, except dates and numbers with underscores, which are
    texts.
    """
    annotation = _annotation(split_key(key))
    kinds = _kinds(annotation)
    quoted = text[:1] in ("'", '"')
    if get_origin(annotation) is tuple and not text.startswith("["):
        parts = _kinds(get_args(annotation)[0])
        if str in parts:
            return [part.strip() for part in text.split(",") if part.strip()]
        return parse_integers(text, origin=origin.text) if int in parts and Ellipsis in get_args(annotation) else _toml(f"[{text}]")
    if (str in kinds or Path in kinds) and not quoted:
        if type(None) in kinds and text in ("", "None", "none"):
            return None
        return text == "true" if bool in kinds and text in ("true", "false") else text
    value = _toml(text)
    if kinds or isinstance(value, str | bool | list | dict):
        return value
    return value if isinstance(value, int | float) and "_" not in text else text


def _annotation(key: Sequence[str]) -> Any:
    """The declared type of a dotted key. None for an unknown key and for options of entries."""
    annotation: Any = Config
    for part in key:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            return None
    return None if annotation is Any else annotation


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a value of an annotation can have."""
    if annotation is None or annotation is Any:
        return set()
    outer = get_origin(annotation)
    if outer is Annotated:
        return _kinds(get_args(annotation)[0])
    if outer is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if outer is Union or outer is UnionType:
        return set().union(*(_kinds(part) if part is not type(None) else {part} for part in get_args(annotation)))
    return {outer or annotation}


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
