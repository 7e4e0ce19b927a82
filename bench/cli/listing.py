"""``bench list``: what is registered."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from bench.cli import options
from bench.cli.console import table_console


class What(StrEnum):
    """The three registries."""

    METHODS = "methods"
    BACKBONES = "backbones"
    DATASETS = "datasets"


class ListFormat(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


def list_entries(
    what: Annotated[What, typer.Argument(help="methods, backbones or datasets.")],
    fmt: Annotated[ListFormat, typer.Option("--format", help="table or json.")] = ListFormat.TABLE,
    plugins: options.Plugins = None,
) -> None:
    """List methods, backbones or datasets with their papers; with --format json all their data and options."""
    from rich.table import Table

    from bench.backbone import BACKBONES
    from bench.dataset import DATASETS
    from bench.method import METHODS
    from bench.registry import Registry, load_plugin

    for plugin in plugins or ():
        load_plugin(plugin)
    registries: dict[What, Registry[Any, Any]] = {What.METHODS: METHODS, What.BACKBONES: BACKBONES, What.DATASETS: DATASETS}
    entries = [*registries[what], *registries[what].families()]
    if fmt is ListFormat.JSON:
        listed = [
            {
                "name": e.name,
                **dataclasses.asdict(e.info),
                "origin": e.origin,
                "options": e.target.Options.model_json_schema().get("properties", {}),
            }
            for e in entries
        ]
        typer.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    extra = {What.METHODS: ("kind", "trains_as", "variants", "backbones"), What.BACKBONES: ("kind",), What.DATASETS: ("license",)}[what]
    table = Table()
    for number, heading in enumerate(("name", "title", *(name.replace("_", " ") for name in extra), "paper", "year")):
        table.add_column(heading, no_wrap=number < 2)
    for entry in entries:
        facts = [getattr(entry.info, name) for name in extra]
        cells = [", ".join(f) if isinstance(f, tuple) else str(f or "") for f in facts]
        table.add_row(entry.name, entry.info.title, *cells, entry.info.paper, str(entry.info.year or ""))
    table_console().print(table)
