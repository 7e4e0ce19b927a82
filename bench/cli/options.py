"""Options shared by several verbs, declared once, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
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
Results = Annotated[Path | None, typer.Option(help="Results folder.", rich_help_panel=SETTINGS)]
Data = Annotated[Path | None, typer.Option(help="Folder of prepared datasets.", rich_help_panel=SETTINGS)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file [default: bench.toml here, if there is one].", rich_help_panel=SETTINGS)
]
Profile = Annotated[str | None, typer.Option(help="Named set of values: quick, paper, or your own.", rich_help_panel=SETTINGS)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.lr=0.01. Repeatable.", rich_help_panel=SETTINGS)]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Module or .py file that registers entries. Repeatable.", rich_help_panel=SETTINGS)
]


def settings_from(
    *,
    config: Path | None,
    profile: str | None,
    sets: Sequence[str] | None,
    plugins: Sequence[str] | None = None,
    **flags: str | Path | None,
) -> Settings:
    """Load plugins, then merge all layers of settings; flags that were not given are left out.

    Raises:
        ValueError: whatever cannot be, see `bench.config.load_settings`.
    """
    from bench.config import load_settings
    from bench.registry import load_plugin

    for plugin in plugins or ():
        load_plugin(plugin)
    given: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            given[f"run.{name}"] = _value(name, value)
    return load_settings(file=config, profile=profile, sets=sets or (), flags=given)


def _value(name: str, value: str | Path) -> Any:
    if isinstance(value, Path):
        return value
    if name == "seeds":
        return parse_seeds(value)
    if name in ("methods", "datasets", "backbones", "guidance"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def parse_seeds(text: str) -> list[int]:
    """``0,2`` or ``0-4`` or ``0-2,7`` -> list of seeds.

    Raises:
        ValueError: not of that form.
    """
    seeds: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"--seeds {text}: {part!r} is not a seed; write 0,1,2 or 0-4")
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds
