"""The structure of the code: imports run downhill, functions stay short, names say what a thing is, private names are counted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = tuple(path for top in ("bench", "methods", "backbones", "datasets") for path in sorted((ROOT / top).rglob("*.py")))
TESTS = tuple(sorted((ROOT / "tests").rglob("*.py")))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (*CODE, *TESTS)}

ROOMS = ("cli", "reporting", "audit", "launch", "sweep", "evaluation", "training", "runtime", "prepare", "data", "au")
"""From the top to the ground. A room imports from itself, from rooms below, and from the modules of `bench` itself."""
LONG = {"bench/prepare/pack.py prepare", "bench/cli/data.py prepare"}
"""Functions of more than 60 lines that still have to be cut."""
VAGUE = {"one", "other", "others", "told", "found", "there", "mine", "theirs"}
PRIVATE = {
    "backbones/timm_any.py": {"timm.models._features"},  # timm: the wrappers of features_only; checked with 1.0.22 to 1.0.31
    "backbones/deit.py": {"_pos_embed"},  # timm: position embeddings with class token; checked with 1.0.22 to 1.0.31
    "bench/launch/torchrun.py": {"_rendezvous", "_start_workers", "_monitor_workers", "_remaining_restarts"},  # torch elastic 2.15
    "bench/launch/slurm.py": {"_make_submission_file_text", "_submitit_command_str"},  # submitit 1.5: the text of --dry-run
    "bench/prepare/published.py": {"_Hash"},  # hashlib: the type of a hash
    "bench/training/ema.py": {"_foreach_lerp_"},  # torch: the moving average of all weights in one call
    "bench/runtime/agreement.py": {"_get_default_store"},  # torch.distributed 2.15
    "bench/runtime/deepspeed_strategy.py": {"_hp_mapping"},  # DeepSpeed 0.19: its universal checkpoints
}
"""Private names of dependencies, with the versions that the tests have run with."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module,) if node.module != "bench" else (f"bench.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(module: str) -> str | None:
    first, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if first == "bench" and room in ROOMS else None


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rooms_below_only(room):
    upward = [
        f"{name_of(path)} imports {module}"
        for path in sorted((ROOT / "bench" / room).rglob("*.py"))
        for module in imports(path)
        if (target := room_of(module)) and ROOMS.index(target) < ROOMS.index(room)
    ]
    assert upward == []


def test_every_folder_of_the_package_is_a_room():
    assert {path.name for path in (ROOT / "bench").iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)


def test_no_function_has_more_than_60_lines():
    functions = [(path, node) for path in CODE for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]
    long = {f"{name_of(path)} {node.name}" for path, node in functions if (node.end_lineno or 0) - node.lineno >= 60}
    assert long <= LONG, sorted(long - LONG)


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_names_say_what_a_thing_is():
    vague = [f"{name_of(path)}: {name}" for path, tree in TREES.items() for name in sorted(VAGUE.intersection(identifiers(tree)))]
    assert vague == []


def private_names(path: Path) -> Iterator[str]:
    """Private modules that are imported, and private attributes that no class of ours defines."""
    yield from (module for module in imports(path) if any(re.match("_[^_]", part) for part in module.split(".")[1:]))
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in OWN:
            yield node.attr


def definitions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            yield node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            if isinstance(node.ctx, ast.Store):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


OWN = {name for path in CODE for name in definitions(TREES[path])} - {
    "_rendezvous",
    "_start_workers",
    "_monitor_workers",
    "_remaining_restarts",
}


def test_private_names_of_dependencies_are_the_listed_ones():
    ordinary = {"_asdict", "_replace", "_exit", "_fields"}  # of named tuples, and os._exit
    names = {name_of(path): set(private_names(path)) - ordinary for path in CODE}
    assert {path: used for path, used in names.items() if used} == PRIVATE
