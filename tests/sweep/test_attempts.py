"""A training that breaks the processes again and again is given up by the run, and tried again by the next."""

from __future__ import annotations

from pathlib import Path

from bench.sweep.attempts import MOST, RUN, given_up, noted


def test_without_an_agent_nothing_is_counted(monkeypatch):
    monkeypatch.delenv(RUN, raising=False)
    assert noted(None, None) == {}
    assert not given_up({"error": "e", "run": "a", "attempts": MOST})


def test_failing_at_the_same_place_is_counted_until_it_is_enough(monkeypatch):
    monkeypatch.setenv(RUN, "a")
    failure = None
    for attempt in range(1, MOST + 1):
        failure = {"error": "e", **noted(failure, Path("00000020"))}
        assert failure["attempts"] == attempt
        assert given_up(failure) == (attempt == MOST)


def test_a_training_that_gets_on_between_is_not_given_up(monkeypatch):
    monkeypatch.setenv(RUN, "a")
    first = noted(None, Path("00000020"))
    assert noted(first, Path("00000030"))["attempts"] == 1


def test_another_run_tries_again(monkeypatch):
    monkeypatch.setenv(RUN, "a")
    failure = noted(noted(None, None), None)
    assert given_up(failure)
    monkeypatch.setenv(RUN, "b")
    assert not given_up(failure)
    assert noted(failure, None)["attempts"] == 1


def test_a_failure_of_one_process_alone_is_no_attempt(monkeypatch):
    monkeypatch.setenv(RUN, "a")
    assert not given_up({"error": "e"})
    assert noted({"error": "e"}, None)["attempts"] == 1
