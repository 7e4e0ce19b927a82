"""Options shared by several verbs, declared once, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bench.config import Settings

MATRIX = "The matrix"
SETTINGS = "Settings"

Methods = Annotated[str | None, typer.Option(help="Methods, comma-separated; 'all', 'everything'.", rich_help_panel=MATRIX)]
Datasets = Annotated[str | None, typer.Option(help="Datasets: names, or paths of prepared folders.", rich_help_panel=MATRIX)]
Backbones = Annotated[str | None, typer.Option(help="Backbones; each method runs on those it can take.", rich_help_panel=MATRIX)]
Guidance = Annotated[str | None, typer.Option(help="none, au, or none,au.", rich_help_panel=MATRIX)]
Seeds = Annotated[str | None, typer.Option(help="Seeds: 0,1,2 or 0-4.", rich_help_panel=MATRIX)]
Variant = Annotated[str | None, typer.Option(help="paper or official.", rich_help_panel=MATRIX)]
Protocol = Annotated[str | None, typer.Option(help="val or test-selected.", rich_help_panel=MATRIX)]
Metrics = Annotated[
    str | None, typer.Option(help="Optional measures of the maps, comma-separated; 'all'. See docs/metrics.md.", rich_help_panel=MATRIX)
]
Engine = Annotated[str | None, typer.Option("--engine", help="ddp or deepspeed: short for --set train.engine=.", rich_help_panel=SETTINGS)]
Results = Annotated[Path | None, typer.Option(help="Results folder.", rich_help_panel=SETTINGS)]
Data = Annotated[Path | None, typer.Option(help="Folder of prepared datasets.", rich_help_panel=SETTINGS)]
Reference = Annotated[str | None, typer.Option(help="Published figures to put beside ours: paper, or a .json file.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file [default: bench.toml here, if there is one].", rich_help_panel=SETTINGS)
]
Profile = Annotated[str | None, typer.Option(help="Named set of values: quick, paper, or your own.", rich_help_panel=SETTINGS)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.lr=0.01. Repeatable.", rich_help_panel=SETTINGS)]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Module or .py file that registers entries. Repeatable.", rich_help_panel=SETTINGS)
]


MATRIX_FLAGS = ("methods", "datasets", "backbones", "guidance", "seeds", "variant", "protocol", "results", "data")


def settings_from(context: typer.Context) -> Settings:
    """Load plugins, then merge all layers of settings, with the flags of the running command that were given.

    Raises:
        ValueError: whatever cannot be, see `bench.config.load_settings`.
    """
    from bench.config import load_settings
    from bench.registry import load_plugin

    given = context.params
    for plugin in given.get("plugins") or ():
        load_plugin(plugin)
    flags = {f"run.{name}": _value(name, given[name]) for name in MATRIX_FLAGS if given.get(name) is not None}
    if given.get("metrics") is not None:
        flags["evaluation.measures"] = _value("metrics", given["metrics"])
    if given.get("engine_name") is not None:
        flags["train.engine"] = given["engine_name"]
    return load_settings(file=given.get("config"), profile=given.get("profile"), sets=given.get("sets") or (), flags=flags)


def _value(name: str, value: str | Path) -> Any:
    if isinstance(value, Path):
        return value
    if name == "seeds":
        from bench.config import parse_integers

        return parse_integers(value, origin=f"--seeds {value}")
    if name in ("methods", "datasets", "backbones", "guidance", "metrics"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value
