"""Pushes records and tables, never weights, to a dataset repository of the Hugging Face Hub, or of a server that speaks its API."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # its HTTP client's own

from bench.audit.stamp import STAMP, is_verified
from bench.io import file_sha256
from bench.reporting.tables.evidence import load_runs
from bench.reporting.tables.leaderboard import build_tables
from bench.reporting.tables.ranking import rank
from bench.reporting.tables.references import Reference
from bench.reporting.tables.render import render
from bench.sweep.record import Record
from bench.sweep.store import DONE, MAPS, RECORD, ROWS, read_marker, read_records

_CARD = """---
pretty_name: Class activation maps in facial expression recognition, records and leaderboard
tags:
- benchmark
- class-activation-maps
- facial-expression-recognition
configs:
- config_name: leaderboard
  data_files: leaderboard.csv
---
# Class activation maps in facial expression recognition

{count} cells: one (method, guidance, backbone, dataset, seed) each, with its settings, hashes and per-sample rows, below
`cells/`. No weights and no pictures. The tables are computed from the records; check them with `bench verify` on a copy of this
repository.

{tables}"""


def push(results: Path, repo: str, *, private: bool, reference: Reference | None = None, endpoint: str | None = None) -> str:
    """Push all finished cells below a folder, and the leaderboard as card, CSV and JSON.

    The token is the library's: from ``HF_TOKEN``, or what ``hf auth login`` stored. Files that are there already are not sent again,
    so that an interrupted push is gone on with by the same command; nothing is deleted.

    Args:
        results: the folder.
        repo: ``owner/name``; made if it is not there.
        private: make it a private one, if it is made.
        reference: published figures to put beside ours.
        endpoint: where; None for ``HF_ENDPOINT``, else the Hub itself.

    Returns:
        Address of the repository.

    Raises:
        ValueError: no such name, no record, or a file is not what its record says: nothing is sent then.
        OSError: the server cannot be reached, or does not take it; the message says what to do.
    """
    if repo.count("/") != 1:
        raise ValueError(f"--hub {repo}: give OWNER/NAME, such as my-group/cam-results")
    api = HfApi(endpoint=endpoint)
    with tempfile.TemporaryDirectory(prefix="bench-hub-") as staged:
        _stage(results, Path(staged), reference=reference)
        try:
            address = api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repo, repo_type="dataset", folder_path=staged, commit_message="Push records and leaderboard with bench publish"
            )
        except HfHubHTTPError as error:
            raise OSError(_refused(error, repo, api.endpoint)) from error
        except (HTTPError, OSError) as error:
            raise OSError(
                f"cannot reach {api.endpoint} ({error}). Is this machine online? HF_ENDPOINT says where to push; then type the same again"
            ) from error
    return str(address)


def _refused(error: HfHubHTTPError, repo: str, endpoint: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"{endpoint} does not let you write to {repo} ({status}). Log in with: hf auth login; or set HF_TOKEN to a token that may "
            "write to it; then type the same again"
        )
    return f"{endpoint} refused: {error}"


def _stage(results: Path, staged: Path, *, reference: Reference | None) -> None:
    """Copy what is to be sent, and check the copies: what is sent is what was checked.

    Raises:
        ValueError: see `push`.
    """
    count = 0
    for folder, record in read_records(results, strict=True):
        copy = staged / "cells" / _below_cells(folder.relative_to(results))
        copy.mkdir(parents=True)
        for name in (RECORD, ROWS, MAPS, DONE):
            if name != MAPS or record.maps_sha256 is not None:
                shutil.copyfile(folder / name, copy / name)
        _check(copy, record, original=folder)
        if is_verified(folder):
            shutil.copyfile(folder / STAMP, copy / STAMP)
        count += 1
    if count == 0:
        raise ValueError(f"no finished cells in {results} yet; first: bench run --results {results}")
    tables = build_tables(load_runs(staged))
    rankings = rank(tables)
    (staged / "README.md").write_text(
        _CARD.format(count=count, tables=render(tables, "md", rankings=rankings, reference=reference, columns="all")), encoding="utf-8"
    )
    for fmt in ("csv", "json"):
        (staged / f"leaderboard.{fmt}").write_text(render(tables, fmt, rankings=rankings, reference=reference), encoding="utf-8")


def _below_cells(path: Path) -> Path:
    return Path(*path.parts[1:]) if path.parts[:1] == ("cells",) else path


def _check(copy: Path, record: Record, *, original: Path) -> None:
    marker = read_marker(copy)
    said = {RECORD: marker.record_sha256 if marker else None, ROWS: record.rows_sha256}
    if record.maps_sha256 is not None:
        said[MAPS] = record.maps_sha256
    for name, sha256 in said.items():
        if file_sha256(copy / name) != sha256:
            raise ValueError(f"{original / name} was changed since it was written: bench verify {original} says more. Nothing was sent")
