from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from bench.io import atomic_file, follow_umask, fsync_folder, temporary_folder, write_bytes_atomic, write_json_atomic


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
        "import os, signal, sys; from pathlib import Path; from bench.io import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as f:\n    f.write(b'new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".partial")] == ["a.bin"]


@pytest.fixture
def umask():
    """Sets the umask for the test."""
    old = os.umask(0o077)
    yield os.umask
    os.umask(old)


def mode(path):
    return path.stat().st_mode & 0o7777


def test_the_umask_decides_the_mode(tmp_path, umask):
    umask(0o027)
    write_bytes_atomic(tmp_path / "a.bin", b"")
    assert mode(tmp_path / "a.bin") == 0o640


@pytest.mark.parametrize(("mask", "expected"), [(0o002, 0o775), (0o027, 0o750)])
def test_a_temporary_folder_has_the_mode_of_any_other(tmp_path, umask, mask, expected):
    umask(mask)
    folder = temporary_folder(tmp_path / "final")
    assert (folder.parent, folder.name.startswith(".final-"), mode(folder)) == (tmp_path, True, expected)


def test_a_temporary_folder_keeps_the_group_of_a_shared_one(tmp_path, umask):
    umask(0o002)
    tmp_path.chmod(0o2775)
    assert mode(temporary_folder(tmp_path / "final")) == 0o2775


def test_a_file_that_was_made_for_its_user_alone_gets_the_mode_of_any_other(tmp_path, umask):
    umask(0o002)
    (tmp_path / "a.bin").touch(mode=0o600)
    follow_umask(tmp_path / "a.bin")
    assert mode(tmp_path / "a.bin") == 0o664
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_written_to_all_the_same(tmp_path, monkeypatch, number):
    flush = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_bytes_atomic(tmp_path / "a.bin", b"abc")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"


def test_a_disk_that_fails_to_flush_a_folder_is_an_error(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_folder(tmp_path)


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
