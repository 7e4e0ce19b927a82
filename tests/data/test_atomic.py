from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from bench.data.atomic import atomic_file, write_bytes_atomic, write_json_atomic


def test_the_bytes_arrive_and_nothing_else_is_left(tmp_path):
    write_bytes_atomic(tmp_path / "a.bin", b"abc")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_exception_keeps_the_old_bytes_and_removes_the_temporary_file(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")
    with pytest.raises(TypeError, match="bytes-like"), atomic_file(path) as file:
        file.writelines([b"ne", None])
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_the_name_appears_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.exists()


def test_what_was_written_can_be_read_back_before_the_rename(tmp_path):
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc"


def test_a_kill_in_the_middle_keeps_the_old_bytes(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from bench.data.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as f:\n    f.write(b'new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".partial")] == ["a.bin"]


def test_the_umask_decides_the_mode(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes_atomic(tmp_path / "a.bin", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_json_is_utf8_in_the_order_given(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"b": "Zoë", "a": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": "Zoë", "a": 1}
    assert text.index("Zoë") < text.index('"a"')
    assert text.endswith("}\n")


def test_a_nan_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
