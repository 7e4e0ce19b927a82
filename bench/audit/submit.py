"""``bench submit``: pack the records of a method for a pull request to a results repository.

Nothing in a record is altered, its hashes would not allow it: of what tells of a person or machine the sender is warned.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
import shutil
import socket
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import __version__
from bench.audit.verify import Report, verify
from bench.audit.verify_record import Problem, read_checked
from bench.io import atomic_file, temporary_folder
from bench.method import METHODS
from bench.registry import did_you_mean
from bench.sweep.record import Record
from bench.sweep.store import DONE, MAPS, RECORD, ROWS

DESCRIPTION = "SUBMISSION.md"
ARCHIVES = (".tar.gz", ".tgz")
_PACKED = (RECORD, ROWS, MAPS, DONE)
"""No weights, no pictures; and no stamp, which is for the receiver to give."""
_PATH = re.compile(r"(?:^|[\s=:'\"(\[])(?:/[^/\s]|~[\w.-]*/|[A-Za-z]:[\\/])")
"""An absolute path, or one from a home folder, at the start of a text or inside it."""
_TELLING = ("config.slurm.account", "config.slurm.partition", "config.slurm.qos", "config.slurm.constraint")


class UnsoundError(ValueError):
    """Records that are not submitted, for the problems they have."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(f"{len(problems)} problems: nothing was packed. Mend them, or move the records away, and try again")
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """A field that tells of a person or machine."""

    field: str
    """Dotted."""
    value: str
    records: int
    """In how many of the records, with this or another value."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is to be packed."""

    cells: tuple[tuple[Path, Record], ...]
    """Folder and record, by the path of the cell."""
    personal: tuple[Personal, ...]


def make_submission(results: Path, *, methods: Sequence[str] | None = None) -> Submission:
    """Verify a results folder and choose from it.

    Args:
        results: the folder; all of it must be sound, since records are checked against each other.
        methods: names, None = all there are.

    Raises:
        FileNotFoundError: no record there.
        UnsoundError: with the problems.
        ValueError: a method without a record.
    """
    report: Report = verify([results])
    if report.problems:
        raise UnsoundError(report.problems)
    present = {fact.method for fact in report.facts}
    for name in methods or ():
        if name not in present:
            raise ValueError(f"--methods {name}: {results} has no record of it.{did_you_mean(name, present)}")
    chosen = [(fact.folder, read_checked(fact.folder)) for fact in report.facts if methods is None or fact.method in methods]
    chosen.sort(key=lambda cell: cell[1].as_cell.path)
    return Submission(cells=tuple(chosen), personal=tuple(_personal(record for _, record in chosen)))


def write_submission(submission: Submission, out: Path) -> None:
    """Write an archive (``.tar.gz``: the same records give the same bytes) or a folder.

    Raises:
        FileExistsError: the folder is there already and not empty.
        OSError: it cannot be written.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if out.name.endswith(ARCHIVES):
        with (
            atomic_file(out) as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, content in _files(submission):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is there already; give a new folder, or a name that ends in .tar.gz")
    temporary = temporary_folder(out)
    try:
        for name, content in _files(submission):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _files(submission: Submission) -> Iterator[tuple[str, bytes]]:
    """Name inside the submission, and content; in order."""
    yield DESCRIPTION, describe(submission).encode()
    for folder, record in submission.cells:
        for name in sorted(_PACKED):
            if (folder / name).is_file():
                yield f"cells/{record.as_cell.path}/{name}", (folder / name).read_bytes()


def describe(submission: Submission) -> str:
    """The text of the pull request, from the records and what is registered here."""
    records = [record for _, record in submission.cells]
    return "\n".join(
        [
            f"# Results of {', '.join(sorted({_title(record) for record in records}))}",
            "",
            f"{len(records)} records, packed by bench {__version__} after `bench verify` found them sound. Figures are self-reported until "
            "somebody has evaluated the weights again (`bench verify --rerun`).",
            "",
            "## Methods",
            "",
            _table(("method", "title", "paper", "doi", "link", "source"), map(_method_row, sorted({r.cell.method for r in records}))),
            "",
            "## Runs",
            "",
            _table(("method", "backbone", "guidance", "data", "protocol", "variant", "seeds"), _run_rows(records)),
            "",
            "## Data",
            "",
            _table(("data", "entry", "test samples", "fingerprint", "keys"), sorted(set(map(_data_row, records)))),
            "",
            "## Code",
            "",
            _table(("bench", "commit", "changed since", "torch", "device"), sorted(set(map(_code_row, records)))),
            "",
            "## Before you open the pull request",
            "",
            *(
                f"- [ ] {line}"
                for line in (
                    "The records are below `results/cells/`; no other file is changed, and no record that was there before.",
                    "`bench verify results` ends with status 0 on the branch.",
                    "The method's code and options are public, under the link above or in this pull request.",
                    "The checkpoint was selected as the protocol says, and no setting was chosen by looking at the test split.",
                    "All seeds that were run are here, not the best of them.",
                    "The weights (`trainings/`) are kept for whoever wants to evaluate them again.",
                    "The fields that `bench submit` warned of hold nothing that must not be public.",
                )
            ),
            "",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate([[_plain(value) for value in row] for row in rows], headers=header, tablefmt="pipe", disable_numparse=True)


def _plain(text: str) -> str:
    """Text as text: no markup, no line of its own."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*\[\]<>|~])", r"\\\1", "".join(c for c in text if c.isprintable()))


def _title(record: Record) -> str:
    method = record.cell.method
    return _plain(METHODS.get(method).info.title if method in METHODS else method)


def _method_row(name: str) -> tuple[str, ...]:
    if name not in METHODS:
        return (name, "", "", "", "", "not installed here: pack it with --plugin")
    entry = METHODS.get(name)
    module = entry.target.__module__
    source = Path(entry.origin.rpartition(":")[0]).name if module.startswith("bench_plugin_") else module
    return (name, entry.info.title, entry.info.paper, entry.info.doi, entry.info.url, source)


def _run_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    seeds: dict[tuple[str, ...], list[int]] = {}
    for record in records:
        cell = record.cell
        name = (cell.method, cell.backbone, cell.guidance, cell.dataset, record.protocol, record.variant)
        seeds.setdefault(name, []).append(cell.seed)
    return [(*name, ", ".join(map(str, sorted(values)))) for name, values in sorted(seeds.items())]


def _data_row(record: Record) -> tuple[str, ...]:
    data = record.data
    partial = " (partial)" if data.provenance.get("partial") else ""
    return (record.cell.dataset + partial, data.entry, str(data.samples), data.fingerprint[:16], data.keys_sha256[:16])


def _code_row(record: Record) -> tuple[str, ...]:
    code = record.code
    changed = {True: "no", False: "yes", None: "not known"}[code.clean]
    return (code.version, (code.commit or "none")[:12], changed, code.libraries.get("torch", ""), str(record.hardware.get("name", "")))


# --- what tells of a person or machine


def _personal(records: Iterable[Record]) -> list[Personal]:
    """Fields with local paths, the name of this host, or of a cluster's parts."""
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    texts: dict[str, list[str]] = {}
    for record in records:
        fields: dict[str, str] = {}
        for field, text in _texts(record.model_dump(mode="json", exclude={"metrics", "epochs"}), ""):
            if _PATH.search(text) or host.search(text) or field in _TELLING:
                fields.setdefault(field, text)
        for field, text in fields.items():
            texts.setdefault(field, []).append(text)
    return [Personal(field=field, value=values[0], records=len(values)) for field, values in sorted(texts.items())]


def _texts(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in a tree; the items of a list go by the list's name."""
    if isinstance(tree, str):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Collection):
        for value in tree:
            yield from _texts(value, name)
