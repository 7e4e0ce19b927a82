"""Fixtures of the training room."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from bench.config import load_settings
from bench.runtime.observer import LogObserver
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import make_plan


@pytest.fixture
def prepared(project, monkeypatch):
    """The project with its dataset prepared, as working directory."""
    monkeypatch.chdir(project)
    prepare_missing(make_plan(load_settings(environ={})).sources.values(), observer=LogObserver(), plugins=())
    return project


@pytest.fixture
def fresh_accelerate():
    """Accelerate settles precision and processes once a process: let this test settle them anew, and those after it too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
