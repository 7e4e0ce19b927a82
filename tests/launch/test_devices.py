"""Devices of a node: how they are dealt out, and who is on them. nvidia-smi is a script that prints what the real one would."""

from __future__ import annotations

import os

import pytest

from bench.launch.devices import User, busy, check_free, cut, visible


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the path that knows two GPUs and the given processes."""

    def make(processes, *, status=0):
        (tmp_path / "apps").write_text(processes)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --query-gpu=index,uuid) printf "0, GPU-aa\\n1, GPU-bb\\n" ;;'
            f" --query-compute-apps=gpu_uuid,pid,process_name) cat {tmp_path / 'apps'} ;; esac\n"
            f"exit {status}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_devices_are_named_by_index_or_as_they_were_given():
    assert visible(2, {}) == ["0", "1"]
    assert visible(2, {"CUDA_VISIBLE_DEVICES": "3, GPU-aa,5"}) == ["3", "GPU-aa"]


def test_every_group_gets_devices_of_its_own():
    assert [part["CUDA_VISIBLE_DEVICES"] for part in cut(["4", "5", "6", "7"], groups=2, environ={})] == ["4,5", "6,7"]


def test_without_devices_groups_share_the_cpu():
    assert cut([], groups=3) == [{}, {}, {}]


def test_devices_are_counted_as_nvidia_smi_does_unless_the_user_has_said():
    assert cut(["0"], groups=1, environ={})[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_DEVICE_ORDER" not in cut(["0"], groups=1, environ={"CUDA_VISIBLE_DEVICES": "0"})[0]


def test_who_computes_on_a_device_is_found_by_index_and_by_uuid(nvidia_smi):
    nvidia_smi("GPU-bb, 4242, /opt/my tool, with a comma\n")
    assert busy(["0", "1"]) == [User("1", 4242, "/opt/my tool, with a comma")]
    assert busy(["GPU-bb"]) == [User("GPU-bb", 4242, "/opt/my tool, with a comma")]
    assert busy(["0"]) == []


def test_this_process_is_not_others(nvidia_smi):
    nvidia_smi(f"GPU-aa, {os.getpid()}, python\n")
    assert busy(["0"]) == []


def test_a_busy_device_is_refused_with_who_is_on_it_and_what_is_free(nvidia_smi):
    nvidia_smi("GPU-aa, 4242, python\n")
    with pytest.raises(ValueError, match=r"device 0: python \(pid 4242\).*CUDA_VISIBLE_DEVICES=1.*--share-devices"):
        check_free(["0", "1"])


def test_free_devices_pass(nvidia_smi):
    nvidia_smi("")
    check_free(["0", "1"])


def test_a_tool_that_fails_is_told_and_stops_nothing(nvidia_smi, caplog):
    nvidia_smi("", status=9)
    check_free(["0", "1"])
    assert "cannot be known" in caplog.text


def test_on_the_cpu_nobody_is_asked(nvidia_smi, caplog):
    nvidia_smi("", status=9)
    check_free([])
    assert not caplog.records
