"""What a run reports to its lease."""

from __future__ import annotations

import pytest

from bench.runtime.observer import LogObserver, Work
from bench.sweep.progress import LeaseObserver


class Reports:
    """Keeps what a lease is given."""

    def __init__(self) -> None:
        self.states: list[str] = []

    def report(self, progress):
        self.states.append(progress["state"])


@pytest.mark.parametrize("label", ["faces/mini/cam/au/seed0", "my evaluation"])
def test_the_state_is_the_phase_whatever_the_label(label):
    reports = Reports()
    observer = LeaseObserver(LogObserver(), reports)
    observer.begin(Work(label, "training"), steps=2, done=0)
    observer.begin(Work(label, "evaluating"), steps=2, done=0)
    assert reports.states == ["training", "evaluating"]
