"""Options that several verbs share, declared once, and what they become."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from bench.config import Settings

MATRIX = "The matrix"
SETTINGS = "Settings"
PROCESSES = "Processes"

Results = Annotated[Path | None, typer.Option(help="Results folder.", rich_help_panel=SETTINGS)]
Data = Annotated[Path | None, typer.Option(help="Folder of prepared datasets.", rich_help_panel=SETTINGS)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file (default: bench.toml here, if there is one).", rich_help_panel=SETTINGS)
]
Profile = Annotated[str | None, typer.Option(help="Named set of values: quick, paper, or your own.", rich_help_panel=SETTINGS)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.lr=0.01. Repeatable.", rich_help_panel=SETTINGS)]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Module or .py file that registers entries. Repeatable.", rich_help_panel=SETTINGS)
]
Reference = Annotated[str | None, typer.Option(help="Published figures to show beside ours: paper, or a .json file.")]
Device = Annotated[str, typer.Option(help="auto, or cpu to use no accelerator.")]
Nproc = Annotated[
    int | None, typer.Option(help="Processes on this node (default: one per accelerator, else 1).", rich_help_panel=PROCESSES)
]
Nnodes = Annotated[int, typer.Option(help="Nodes; type the same command on each.", rich_help_panel=PROCESSES)]
ProcsPerTraining = Annotated[
    int | None,
    typer.Option(help="Processes of one training; several trainings then run side by side on this node.", rich_help_panel=PROCESSES),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultsFlags:
    """The options of verbs that read a results folder: where it is, and what else the file says."""

    results: Results = None
    config: ConfigFile = None
    profile: Profile = None
    sets: Sets = None
    plugins: Plugins = None

    def settings(self, **more: Any) -> Settings:
        """Load the plugins, then merge all layers of settings with the flags that were given.

        Args:
            more: settings that further flags of the verb give, as ``train__engine``; None = not given.

        Raises:
            ValueError: see `bench.config.load_settings`.
        """
        from bench.config import load_settings, parse_integers
        from bench.registry import load_plugin

        for plugin in self.plugins or ():
            load_plugin(plugin)
        flags: dict[str, Any] = {key.replace("__", "."): value for key, value in more.items()}
        for key, name, parse in (
            ("run.methods", "methods", split_list),
            ("run.datasets", "datasets", split_list),
            ("run.backbones", "backbones", split_list),
            ("run.guidance", "guidance", split_list),
            ("run.seeds", "seeds", lambda text: parse_integers(text, origin=f"--seeds {text}")),
            ("run.variant", "variant", None),
            ("run.protocol", "protocol", None),
            ("run.results", "results", None),
            ("run.data", "data", None),
            ("evaluation.measures", "metrics", split_list),
        ):
            value = getattr(self, name, None)
            flags[key] = value if value is None or parse is None else parse(value)
        given = {key: value for key, value in flags.items() if value is not None}
        return load_settings(file=self.config, profile=self.profile, sets=self.sets or (), flags=given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFlags:
    """The options that choose the cells of a run."""

    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; 'all', 'everything'.", rich_help_panel=MATRIX)] = None
    datasets: Annotated[str | None, typer.Option(help="Datasets: names, or paths of prepared folders.", rich_help_panel=MATRIX)] = None
    backbones: Annotated[str | None, typer.Option(help="Backbones; each method runs on those it can take.", rich_help_panel=MATRIX)] = None
    guidance: Annotated[str | None, typer.Option(help="none, au, or none,au.", rich_help_panel=MATRIX)] = None
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0,1,2 or 0-4.", rich_help_panel=MATRIX)] = None
    variant: Annotated[str | None, typer.Option(help="paper or official.", rich_help_panel=MATRIX)] = None
    protocol: Annotated[str | None, typer.Option(help="val or test-selected.", rich_help_panel=MATRIX)] = None
    metrics: Annotated[
        str | None, typer.Option(help="Optional measures of the maps, comma-separated; 'all'. See docs/metrics.md.", rich_help_panel=MATRIX)
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingsFlags(ResultsFlags, MatrixFlags):
    """The options that decide the settings of a run: the same for ``run``, ``plan``, ``status`` and ``gallery``."""

    data: Data = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessFlags:
    """The options of ``bench run`` that decide how processes are started; no child process gets them."""

    launcher: Annotated[
        str,
        typer.Option(
            help="auto: join the processes this one was started with, else torchrun if there are several accelerators, else inline (this "
            "process alone). slurm: submit a job for each training.",
            rich_help_panel=PROCESSES,
        ),
    ] = "auto"
    nproc: Nproc = None
    nnodes: Nnodes = 1
    procs_per_training: ProcsPerTraining = None
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT of one of the nodes, where all nodes meet.", rich_help_panel=PROCESSES)
    ] = None
    rdzv_id: Annotated[
        str | None, typer.Option(help="Name of this run for the nodes (default: a hash of the settings).", rich_help_panel=PROCESSES)
    ] = None
    rdzv_timeout: Annotated[int, typer.Option(help="Seconds for all nodes to come together.", rich_help_panel=PROCESSES)] = 600
    max_restarts: Annotated[int, typer.Option(help="Times that processes are restarted after a crash.", rich_help_panel=PROCESSES)] = 3
    share_devices: Annotated[
        bool, typer.Option("--share-devices", help="Also use devices on which other programs compute.", rich_help_panel=PROCESSES)
    ] = False


def parse_device(text: str) -> Literal["auto", "cpu"]:
    """The value of ``--device``.

    Raises:
        ValueError: it is neither ``auto`` nor ``cpu``.
    """
    if text not in ("auto", "cpu"):
        raise ValueError(f"--device {text}: choose one of: auto, cpu")
    return "cpu" if text == "cpu" else "auto"


def split_list(text: str | None) -> list[str] | None:
    """The parts of a comma-separated option; None where the option was not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of its dataclass parameters: each field becomes an option, and the command receives the dataclass.

    Typer reads options off a signature; so does this, and writes the longer signature.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            groups[name] = kind
            types = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name])
                for field in dataclasses.fields(kind)
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    del call.__wrapped__  # it would lead to the short signature
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
