"""One registry class, three instances: methods, backbones, datasets.

Entries are found in three ways, all through the same door:

* entry points of installed packages (groups ``bench.methods``, ``bench.backbones``, ``bench.datasets``); the built-in
  entries are declared in this project's own ``pyproject.toml`` in just this way;
* ``--plugin module_or_file.py`` (see `load_plugin`);
* a direct import of a module that uses the decorator.

A *family* is an entry that stands for many: all names ``PREFIX:NAME`` (``timm:convnext_tiny``), which its class turns into
entries one by one. Entry points of families have groups of their own (``bench.backbones.families``).

Names are known without importing an entry; the entry's module is imported when it is first asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.io import file_sha256


class EntryOptions(BaseModel):
    """Base of the options an entry accepts in ``[methods.NAME]``, ``[backbones.NAME]`` or ``[datasets.NAME]``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Default(NamedTuple):
    """A value that an entry brings along, used where the configuration has only its own default."""

    key: str
    """Dotted key of the sections train, augment, images or guidance, or ``option.NAME`` for an option of the entry."""
    value: Any
    dataset: str | None
    """Registered dataset the value is for, None for all."""
    source: str
    """Where the figure is published, or ``our choice`` and why."""
    variant: Literal["paper", "official"] | None = None
    """Variant the value is for, None for both."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EntryInfo:
    """What a reader of a table may ask about any entry."""

    title: str
    """Name as printed in tables."""
    paper: str = ""
    """Authors, venue and year of the source."""
    year: int | None = None
    doi: str = ""
    url: str = ""
    in_all: bool = True
    """Whether ``all`` on the command line includes the entry (``everything`` always does)."""
    defaults: tuple[Default, ...] = ()
    """Values of the configuration that this entry wants otherwise, each with its source."""


class OptionError(ValueError):
    """An option that an entry does not have, or a value that it does not take."""


T = TypeVar("T")
I = TypeVar("I", bound=EntryInfo)  # noqa: E741 - the info record that belongs to T
C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[T, I]):
    """A registered name: the class behind it, its data, and where it was defined (``file:line``)."""

    name: str
    target: type[T]
    info: I
    origin: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member(Generic[T]):
    """What a family makes of one of its names."""

    target: type[T]
    info: Mapping[str, Any]
    """Fields of the entry's data in which the member differs from the family."""


class UnknownEntryError(ValueError):
    """A name that no entry has."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint sentence for a mistyped name: close matches first, then what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    shown = ", ".join(names[:30]) + (f", ... ({len(names)} in all)" if len(names) > 30 else "")
    return f"{hint} Available: {shown or 'none'}."


def check_options(registry: Registry[Any, Any], name: str, given: Mapping[str, Any]) -> EntryOptions:
    """Validate the options of one entry with its own model, and fill in defaults.

    Strings are taken for numbers and booleans where the model wants those.

    Raises:
        UnknownEntryError: the registry has no such entry.
        OptionError: an unknown key (with the nearest), or a value that the option does not take.
    """
    model: type[EntryOptions] = registry.get(name).target.Options
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        who = f"{registry.noun} {name!r}"
        if problem["type"] == "extra_forbidden":
            raise OptionError(f"{who} has no option {key!r}.{did_you_mean(key, model.model_fields)}") from None
        reason = problem["msg"].removeprefix("Value error, ")
        if not key:  # a rule about several options
            raise OptionError(f"{who}: {reason}") from None
        raise OptionError(f"option {key} = {problem['input']!r} of {who}: {reason}") from None


class Registry(Generic[T, I]):
    """Names to classes of one kind, lazily imported, each defined exactly once."""

    def __init__(self, noun: str, *, group: str, base: Callable[[], type[T]], info: type[I]) -> None:
        self.noun = noun
        self.group = group
        self._base = base
        self._info = info
        self._entries: dict[str, Entry[T, I]] = {}
        self._families: dict[str, Entry[T, I]] = {}
        self._members: dict[str, Entry[T, I]] = {}
        self._lazy: dict[str, dict[str, EntryPoint]] = {}

    def register(self, name: str, /, **info: Any) -> Callable[[C], C]:
        """Class decorator: enter the class under ``name`` with its data.

        Raises:
            ValueError: the name is taken by a class defined elsewhere, or is not lower case without spaces.
            TypeError: the class does not derive from the registry's base, or a field of the data is unknown.
        """
        return self._register(self._entries, name, info)

    def register_family(self, prefix: str, /, **info: Any) -> Callable[[C], C]:
        """Class decorator: the class makes the entry of every name ``PREFIX:NAME``.

        It has a class method ``member(name: str) -> Member`` for that, which raises `UnknownEntryError` with a proposal for a
        name it does not have. ``info`` is the data of the family, and of its members where they do not say otherwise.

        Raises:
            ValueError, TypeError: as `register`; or the class has no ``member``.
        """
        enter = self._register(self._families, prefix, info)

        def enter_family(cls: C) -> C:
            if not callable(getattr(cls, "member", None)):
                raise TypeError(f"{self.noun} family {prefix!r}: {cls.__qualname__} has no class method 'member'")
            return enter(cls)

        return enter_family

    def _register(self, table: dict[str, Entry[T, I]], name: str, info: Mapping[str, Any]) -> Callable[[C], C]:
        if name != name.lower() or any(c.isspace() or c in ",/[]:" for c in name):
            raise ValueError(f"{self.noun} name {name!r}: use lower case without spaces, commas, slashes, colons or brackets")

        def enter(cls: C) -> C:
            target: type = cls
            if not issubclass(target, self._base()):
                raise TypeError(f"{self.noun} {name!r}: {cls.__qualname__} does not derive from {self._base().__qualname__}")
            origin = _origin(cls)
            taken = table.get(name)
            if taken is not None and taken.origin != origin:
                raise ValueError(f"{self.noun} {name!r} is defined twice: in {taken.origin} and in {origin}")
            table[name] = Entry(name=name, target=target, info=self._info(**info), origin=origin)
            return cls

        return enter

    def names(self) -> tuple[str, ...]:
        """All known names, sorted, without importing any entry."""
        return tuple(sorted(self._entries.keys() | self._entry_points().keys()))

    def get(self, name: str) -> Entry[T, I]:
        """Return the entry of this name, importing its module if that has not happened yet.

        Raises:
            UnknownEntryError: no such name; the message proposes the nearest ones.
            ValueError: two packages define the name, or a module does not register what its entry point promises.
        """
        prefix, colon, rest = name.partition(":")
        if not colon:
            return self._load(name, self._entries, self._entry_points(), known=(*self.names(), *self._family_names()))
        if name not in self._members:
            family = self._load(prefix, self._families, self._family_points(), known=(*self._family_names(), *self.names()), asked=name)
            maker: Any = family.target
            member: Member[T] = maker.member(rest)
            info = dataclasses.replace(family.info, **member.info)
            self._members[name] = Entry(name=name, target=member.target, info=info, origin=family.origin)
        return self._members[name]

    def families(self) -> tuple[Entry[T, I], ...]:
        """The families, each as an entry with the name ``PREFIX:NAME``, for lists."""
        prefixes = sorted(self._families.keys() | self._family_points().keys())
        members = (self._load(prefix, self._families, self._family_points(), known=()) for prefix in prefixes)
        return tuple(dataclasses.replace(entry, name=f"{entry.name}:NAME") for entry in members)

    def __iter__(self) -> Iterator[Entry[T, I]]:
        """All entries in order of their names; families have no end and are left out."""
        return (self.get(name) for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _load(
        self, name: str, table: dict[str, Entry[T, I]], points: Mapping[str, EntryPoint], *, known: Iterable[str], asked: str | None = None
    ) -> Entry[T, I]:
        point = points.get(name)
        if name not in table and point is not None:
            try:
                importlib.import_module(point.module)
            except ImportError as error:
                raise ValueError(f"{self.noun} {name!r} cannot be imported from {_describe(point)}: {error}") from error
            if name not in table:
                raise ValueError(f"{_describe(point)} names {self.noun} {name!r}, but {point.module} does not register it")
        try:
            entry = table[name]
        except KeyError:
            raise UnknownEntryError(f"unknown {self.noun} {(asked or name)!r}.{did_you_mean(asked or name, known)}") from None
        if point is not None and point.module != entry.target.__module__:
            raise ValueError(f"{self.noun} {name!r} is defined twice: in {_describe(point)} and in {entry.origin}")
        return entry

    def _family_names(self) -> tuple[str, ...]:
        return tuple(f"{prefix}:NAME" for prefix in sorted(self._families.keys() | self._family_points().keys()))

    def _family_points(self) -> dict[str, EntryPoint]:
        return self._entry_points(".families")

    def _entry_points(self, suffix: str = "") -> dict[str, EntryPoint]:
        if suffix not in self._lazy:
            points: dict[str, EntryPoint] = {}
            for point in entry_points(group=self.group + suffix):
                earlier = points.get(point.name)
                if earlier is not None and earlier.value != point.value:
                    raise ValueError(f"{self.noun} {point.name!r} is defined twice: in {_describe(earlier)} and in {_describe(point)}")
                points[point.name] = point
            self._lazy[suffix] = points
        return self._lazy[suffix]


def load_plugin(target: str) -> None:
    """Import a module by name, or a ``.py`` file by path, so that its decorators register their entries.

    Raises:
        ValueError: there is no such module or file, or importing it fails; the cause is chained.
    """
    path = Path(target)
    if target.endswith(".py"):
        if not path.is_file():
            raise ValueError(f"--plugin {target}: no such file")
        path = path.resolve()
        # The name is a function of the path, so that loading the same file twice is one module, not two.
        name = f"bench_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        if name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(f"--plugin {target}: {type(error).__name__}: {error}") from error
        return
    try:
        importlib.import_module(target)
    except ImportError as error:
        raise ValueError(f"--plugin {target}: {error}. Give an importable module, or a path that ends in .py") from error


def _written(target: type) -> type:
    """The class that somebody has written: a member of a family is made by calling a metaclass, in whose module it then lies."""
    return next(cls for cls in target.__mro__ if cls.__module__ != "abc")


def is_foreign(target: type) -> bool:
    """Whether an entry does not come with this program."""
    return _written(target).__module__.partition(".")[0] != __name__.partition(".")[0]


def foreign_code(target: type) -> str | None:
    """sha256 of the code of an entry that does not come with this program; None for ours, and for what has no file (a notebook's cell).

    The code is the file that defines it; where that lies in a package, all Python files of the package's folder, by name. It is read once a
    process: what was imported is what was there then.
    """
    owner = _written(target)
    if not is_foreign(target):
        return None
    try:
        path = Path(inspect.getfile(owner)).resolve()
    except (OSError, TypeError):
        return None
    return _code_hash(path)


@cache
def _code_hash(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        if not (path.parent / "__init__.py").is_file():
            return file_sha256(path)
        for file in sorted(path.parent.rglob("*.py")):
            digest.update(f"{file.relative_to(path.parent).as_posix()} {file_sha256(file)}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def _origin(cls: type) -> str:
    try:
        path = inspect.getsourcefile(cls) or cls.__module__
        _, line = inspect.getsourcelines(cls)
    except (OSError, TypeError):  # defined interactively
        return f"{cls.__module__}.{cls.__qualname__}"
    return f"{path}:{line}"


def _describe(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "an unknown package"
    return f"{package} (entry point {point.name} = {point.value})"
