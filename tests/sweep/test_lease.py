"""Leases: one holder, whoever comes, whoever dies, whatever the clocks say."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

from bench.runtime.interruption import LeaseLostError
from bench.sweep import lease as lease_module
from bench.sweep.lease import Holder, Lease, Leases, read_leases

KEY = "0123456789abcdef"


@pytest.fixture
def leases(tmp_path):
    return Leases(tmp_path / "leases", heartbeat_s=600, stale_s=1200)


def claim(leases):
    return leases.claim(KEY, label="a training", world_size=1)


def claim_from_afar(leases, monkeypatch):
    """A lease of another machine, whose processes cannot be seen from here."""
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "machine_id", lambda: "another boot")
        return claim(leases)


def silence(lease, *, seconds):
    """Let a lease look as if its last sign of life were so long ago."""
    when = lease.path.stat().st_mtime - seconds
    os.utime(lease.path, (when, when))


def files(leases):
    return sorted(path.name for path in leases.folder.iterdir() if path.name != lease_module.CLOCK_NAME)


def test_a_lease_says_who_holds_it_and_is_gone_when_released(leases):
    held = claim(leases)
    (seen,) = read_leases(leases.folder)
    assert (seen.pid, seen.label, seen.world_size, seen.generation) == (os.getpid(), "a training", 1, 1)
    held.release()
    assert files(leases) == []


def test_a_held_lease_is_refused_and_its_holder_told(leases):
    held = claim(leases)
    answer = claim(leases)
    assert isinstance(answer, Holder)
    assert answer.pid == os.getpid()
    held.release()


def test_leases_of_different_trainings_do_not_meet(leases):
    first, second = claim(leases), leases.claim("f" * 16, label="another", world_size=1)
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    first.release()
    second.release()


def test_the_lease_of_a_process_that_has_ended_here_is_taken_over_at_once(leases, run_python):
    run_python(
        "import os; from pathlib import Path; from bench.sweep.lease import Leases\n"
        f"Leases(Path({str(leases.folder)!r}), heartbeat_s=600, stale_s=1200).claim({KEY!r}, label='dies', world_size=1)\n"
        "os._exit(0)"
    )
    assert files(leases) == [f"{KEY}.1.json"]
    held = claim(leases)
    assert isinstance(held, Lease)
    assert files(leases) == [f"{KEY}.2.json"]
    held.release()


def test_a_process_that_has_the_id_of_one_that_ended_is_not_taken_for_it(leases, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "process_start", lambda pid: 1)
        left = claim(leases)
    held = claim(leases)
    assert isinstance(held, Lease)
    held.release()
    left.release()


def test_a_lease_of_another_machine_is_respected_until_it_is_stale(leases, monkeypatch):
    far = claim_from_afar(leases, monkeypatch)
    silence(far, seconds=1100)
    assert isinstance(claim(leases), Holder)
    silence(far, seconds=200)
    held = claim(leases)
    assert isinstance(held, Lease)
    held.release()
    far.release()


@pytest.mark.parametrize("wrong_by", [-1e6, 1e6])
def test_the_clock_of_this_host_does_not_count(leases, monkeypatch, wrong_by):
    far = claim_from_afar(leases, monkeypatch)
    now = time.time() + wrong_by
    monkeypatch.setattr(time, "time", lambda: now)
    assert isinstance(claim(leases), Holder)
    far.release()


def test_the_heartbeat_renews_the_lease(tmp_path):
    leases = Leases(tmp_path, heartbeat_s=0.02, stale_s=1)
    held = claim(leases)
    silence(held, seconds=500)
    before = held.path.stat().st_mtime
    deadline = time.monotonic() + 60
    while held.path.stat().st_mtime == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.path.stat().st_mtime > before + 400
    held.release()


def test_who_slept_through_a_takeover_stops_and_does_not_touch_the_new_lease(leases, monkeypatch):
    sleeper = claim_from_afar(leases, monkeypatch)
    silence(sleeper, seconds=2000)
    held = claim(leases)
    with pytest.raises(LeaseLostError, match="taken this training over"):
        sleeper.confirm()
    assert sleeper.lost
    sleeper.report({"step": 7})
    sleeper.release()
    held.confirm()
    assert next(read_leases(leases.folder)).progress == {}
    held.release()


def test_the_heartbeat_notices_a_takeover(tmp_path):
    leases = Leases(tmp_path, heartbeat_s=0.02, stale_s=1)
    held = claim(leases)
    held.path.unlink()
    deadline = time.monotonic() + 60
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held.lost
    held.release()


def test_of_many_takers_of_a_stale_lease_one_gets_it(leases, monkeypatch):
    for _ in range(20):
        dead = claim_from_afar(leases, monkeypatch)
        silence(dead, seconds=2000)
        got, together = [], threading.Barrier(8)

        def take(got=got, together=together):
            together.wait()
            got.append(claim(leases))

        takers = [threading.Thread(target=take) for _ in range(8)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        holders = [lease for lease in got if isinstance(lease, Lease)]
        assert len(holders) == 1
        holders[0].confirm()
        assert len(files(leases)) == 1
        holders[0].release()
        dead.release()


def test_a_taker_that_slept_after_it_looked_gives_way_to_who_came_meanwhile(leases, monkeypatch):
    dead = claim_from_afar(leases, monkeypatch)
    silence(dead, seconds=2000)
    real, newcomer = Leases._make, []

    def make(self, path, **kwargs):
        if not newcomer:
            newcomer.append(None)
            second = claim(self)  # takes over as generation 2, ...
            second.release()  # ... and is done,
            newcomer[0] = claim(self)  # so that the next one begins with generation 1 again
            assert newcomer[0].path.name == f"{KEY}.1.json"
        return real(self, path, **kwargs)

    monkeypatch.setattr(Leases, "_make", make)
    late = claim(leases)  # it has seen a stale generation 1, and makes generation 2
    assert isinstance(late, Holder)
    newcomer[0].confirm()
    assert files(leases) == [f"{KEY}.1.json"]
    newcomer[0].release()
    dead.release()


def test_a_holder_that_wakes_up_while_it_is_taken_over_keeps_its_lease(leases, monkeypatch):
    far = claim_from_afar(leases, monkeypatch)
    silence(far, seconds=2000)
    real = Leases._make

    def make(self, path, **kwargs):
        far.confirm()  # renews it
        return real(self, path, **kwargs)

    monkeypatch.setattr(Leases, "_make", make)
    assert isinstance(claim(leases), Holder)
    far.confirm()
    far.release()


def test_a_lease_whose_making_was_cut_short_holds_until_it_is_stale(leases):
    leases.folder.mkdir()
    cut = leases.folder / f"{KEY}.1.json"
    cut.touch()
    assert isinstance(claim(leases), Holder)
    os.utime(cut, (0, 0))
    held = claim(leases)
    assert isinstance(held, Lease)
    held.release()


def test_progress_stands_in_the_lease_which_stays_json(leases):
    held = claim(leases)
    for step in (5, 123456, 7):
        held.report({"state": "training", "step": step})
        assert json.loads(held.path.read_text())["progress"] == {"state": "training", "step": step}
    (seen,) = read_leases(leases.folder)
    assert seen.progress["step"] == 7
    held.release()


def test_clearing_removes_the_leases_of_the_dead_alone(leases, monkeypatch):
    far, living = claim_from_afar(leases, monkeypatch), leases.claim("f" * 16, label="lives", world_size=1)
    silence(far, seconds=2000)
    leases.clear()
    assert files(leases) == [f"{'f' * 16}.1.json"]
    living.release()
    far.release()


def test_a_lease_that_cannot_be_written_leaves_nothing(leases, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease_module.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        claim(leases)
    assert files(leases) == []
