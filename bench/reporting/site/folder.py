"""Replaces a whole site at once, and touches no other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.io import fsync_folder, temporary_folder, write_json_atomic

MARKER = ".bench-site.json"
"""File that marks a folder as a site, and lists the files of the site."""


def check_site_folder(out: Path) -> None:
    """Check that a site may be written to a folder.

    Raises:
        ValueError: the folder holds files that are not of a site made by this program. They stay as they are.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--site {out} is a file: give a folder")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not present:
        return
    marker = out / MARKER
    if not marker.is_file():
        raise ValueError(
            f"--site {out}: the folder is not empty and not a site made by bench publish; give another folder, or empty it yourself"
        )
    try:
        own = set(json.loads(marker.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--site {out}: its {MARKER} is damaged, so the files of the site are unknown; give another folder") from error
    foreign = sorted(present - own - {MARKER})
    if foreign:
        raise ValueError(f"--site {out}: {foreign[0]} does not belong to the site ({len(foreign)} such files); move it away first")


@contextmanager
def fresh_site(out: Path) -> Iterator[Path]:
    """Give an empty folder to write a site in; when the block ends without an exception it takes the place of ``out``.

    A reader of the old site finds it whole until then. After an error ``out`` is as it was.

    Raises:
        ValueError: see `check_site_folder`.
        OSError: the parent is not writable, or the disk is full.
    """
    out = out.resolve()
    check_site_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = temporary_folder(out)
    old = work / "old"
    try:
        new = work / "new"
        new.mkdir()
        yield new
        files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
        write_json_atomic(new / MARKER, {"made_by": "bench publish --site", "files": files})
        check_site_folder(out)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(work)
