from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from bench.training import checkpoint
from bench.training.checkpoint import (
    DamagedCheckpointError,
    flatten_optimiser,
    hash_weights,
    keep_only,
    load_checkpoint,
    load_latest,
    newest_checkpoint,
    restore_optimiser,
    save_checkpoint,
)


def save(folder, step, keep=2, value=1.0):
    return save_checkpoint(folder, step=step, tensors={"model": {"w": torch.full((3,), value)}}, state={"step": step}, keep=keep)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 5, value=2.5)
    loaded = load_latest(tmp_path)
    assert loaded.state["step"] == 5
    assert loaded.model["w"].tolist() == [2.5] * 3


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / ("state.json" if damage == "state" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpointError, match="00000002"):
        load_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path).state["step"] == 1
    assert "00000002" in caplog.text


def damage(folder):
    (folder / "model.safetensors").write_bytes(b"cut")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_damaged_checkpoint_is_set_aside_and_no_longer_the_newest(tmp_path):
    whole, damaged = save(tmp_path, 1), save(tmp_path, 2)
    damage(damaged)
    load_latest(tmp_path)
    assert names(tmp_path) == ["00000001", "aside-00000002"]
    assert newest_checkpoint(tmp_path) == whole


def test_the_same_step_damaged_twice_is_set_aside_twice(tmp_path):
    for _ in range(2):
        damage(save(tmp_path, 2))
        assert load_latest(tmp_path) is None
    assert names(tmp_path) == ["aside-00000002", "aside-00000002-again"]


def test_what_is_written_after_damaged_checkpoints_is_kept_though_its_steps_are_fewer(tmp_path):
    for step in (10, 20):
        damage(save(tmp_path, step))
    assert load_latest(tmp_path) is None
    for step in (3, 4, 5):
        save(tmp_path, step)
    assert load_latest(tmp_path).state["step"] == 5
    assert newest_checkpoint(tmp_path).name == "00000005"


def test_what_was_just_written_is_newer_than_any_step_of_a_course_that_was_given_up(tmp_path):
    for step in (10, 20, 5):
        save(tmp_path, step)
    assert names(tmp_path) == ["00000005"]


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "100000000"


def test_those_that_are_named_are_kept_whatever_their_steps(tmp_path):
    for step in (1, 5, 9):
        save(tmp_path, step, keep=None)
    keep_only(tmp_path, {"00000001"})
    assert names(tmp_path) == ["00000001"]


def test_a_checkpoint_that_lacks_what_it_needs_elsewhere_is_passed_over(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def check(candidate):
        if candidate.state["step"] == 2:
            raise DamagedCheckpointError("its best weights are lost")

    assert load_latest(tmp_path, check=check).state["step"] == 1
    assert "its best weights are lost" in caplog.text


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    folder = save(tmp_path / "checkpoints", 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    with pytest.raises(
        PermissionError, match=rf"00000001 cannot be read: Permission denied: .*model\.safetensors.* chmod -R g\+rwX {tmp_path}"
    ):
        load_latest(tmp_path / "checkpoints")
    assert folder.is_dir()


def test_a_colleague_may_read_what_the_umask_lets_him(tmp_path):
    old = os.umask(0o002)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(old)
    assert {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == {
        "00000001": 0o775,
        "model.safetensors": 0o664,
        "state.json": 0o664,
    }


def test_a_write_that_was_cut_off_leaves_the_one_before_it(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("bench.training.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert load_latest(tmp_path).state["step"] == 1


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path / "nothing") is None


def test_another_schema_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "schema_version": 99}))
    with pytest.raises(DamagedCheckpointError, match="schema version 99"):
        load_checkpoint(folder)


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), lambda p: AdamW(p, lr=0.1)])
def test_an_optimiser_goes_on_bit_for_bit(make):
    torch.manual_seed(0)
    data = torch.randn(6, 4, 3)

    def advance(net, optimiser, steps):
        for x in data[steps]:
            optimiser.zero_grad()
            net(x).square().sum().backward()
            optimiser.step()

    straight = nn.Linear(3, 2)
    start = {k: v.clone() for k, v in straight.state_dict().items()}
    optimiser = make(straight.parameters())
    advance(straight, optimiser, slice(0, 6))

    first = nn.Linear(3, 2)
    first.load_state_dict(start)
    before = make(first.parameters())
    advance(first, before, slice(0, 3))
    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    after = make(second.parameters())
    restore_optimiser(after, flatten_optimiser(before))
    advance(second, after, slice(3, 6))
    assert hash_weights(second) == hash_weights(straight)


def test_the_hash_of_weights_sees_every_bit():
    net = nn.Linear(3, 2)
    before = hash_weights(net)
    with torch.no_grad():
        net.bias[0] = torch.nextafter(net.bias[0], torch.tensor(10.0))
    assert hash_weights(net) != before
