"""What an earlier shell left in the environment."""

from __future__ import annotations

import pytest
import torch

from bench.config import TrainConfig
from bench.runtime.engine import Engine
from bench.runtime.environment import HARMLESS, forget_leftovers
from bench.sweep.record import hardware_facts


def test_settings_of_another_program_are_removed_and_named_with_what_says_them_here(caplog):
    environ = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_OFFLOAD_PARAMS": "true", "PATH": "/bin"}
    forget_leftovers(environ)
    assert environ == {"PATH": "/bin"}
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in the environment is not heeded; say --set train.accumulate=..." in caplog.text


def test_what_accelerate_launch_always_sets_is_removed_without_a_word(caplog):
    environ = dict(HARMLESS)
    forget_leftovers(environ)
    assert (environ, caplog.text) == ({}, "")


def test_a_warning_is_given_by_one_of_several_processes(caplog):
    forget_leftovers({"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"})
    assert caplog.text == ""


@pytest.mark.parametrize("given", [{"LOCAL_RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_what_is_left_of_a_world_of_one_process_is_removed(given):
    forget_leftovers(given)
    assert given == {}


def test_a_world_that_is_there_is_left_alone():
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    forget_leftovers(given)
    assert len(given) == 5


def test_an_engine_accumulates_what_the_settings_say_and_not_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    engine = Engine(train=TrainConfig(), device="cpu")
    assert engine.strategy.accelerator.gradient_accumulation_steps == 1


def test_an_engine_evaluates_in_float32_whatever_the_environment_switched_on():
    torch.backends.cuda.matmul.allow_tf32 = True
    Engine(device="cpu")
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_record_names_variables_by_which_libraries_compute_otherwise(monkeypatch):
    device = torch.device("cpu")
    assert "environment" not in hardware_facts(device, world_size=1)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert hardware_facts(device, world_size=1)["environment"] == {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
