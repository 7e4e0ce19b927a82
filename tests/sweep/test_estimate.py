"""Estimates against sums done by hand, and the packing of trainings against all there are."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest

from bench.config import load_settings
from bench.sweep.estimate import History, estimates, forecast, longest_first, order, read_history, schedule
from bench.sweep.plan import make_plan


@pytest.fixture
def plan_of(project, monkeypatch):
    """A plan from settings: 48 training pictures in batches of 12, 27 test pictures."""
    monkeypatch.chdir(project)

    def make(*sets, methods=("cam",), guidance=("none",), seeds=(0,)):
        flags = {"run.methods": methods, "run.guidance": guidance, "run.seeds": seeds}
        return make_plan(load_settings(environ={}, sets=sets, flags=flags))

    return make


def record(planned, *, seconds_per_picture, evaluation=0.5, processes=1, device="gpu", kind="cuda", method=None, key=None, measures=()):
    """What a finished cell of this training would say, as far as estimates look."""
    training = planned.training
    return SimpleNamespace(
        cell=SimpleNamespace(method=method or planned.cells[0].method, guidance=training.guidance, backbone=training.backbone),
        training_key=key or training.key,
        variant=training.variant,
        training_options=training.method_options,
        backbone_options=training.backbone_options,
        settings=training.settings,
        evaluation={"measures": list(measures)},
        hardware={"name": device, "device": kind, "processes": processes},
        cost={
            "training_processes": processes,
            "training_images_per_second": 1 / seconds_per_picture,
            "evaluation_images_per_second": 1 / evaluation,
        },
    )


def estimated(history, plan, *, device="gpu", processes=1):
    return [estimate for _, estimate in estimates(plan, history, device=device, processes=processes)]


def test_it_is_seconds_a_picture_times_pictures(plan_of):
    (planned,) = plan_of().to_do
    (estimate,) = estimated(History([record(planned, seconds_per_picture=0.25, evaluation=0.5)]), plan_of("train.epochs=10", seeds=(7,)))
    assert estimate.training_seconds == pytest.approx(10 * 48 * 0.25)
    assert estimate.evaluation_seconds == pytest.approx(27 * 0.5)
    assert estimate.seconds == pytest.approx(133.5)


def test_pictures_that_no_batch_takes_in_cost_nothing(plan_of):
    (planned,) = plan_of().to_do
    (estimate,) = estimated(History([record(planned, seconds_per_picture=0.25)]), plan_of("train.batch_size=36"))
    assert estimate.training_seconds == pytest.approx(2 * 36 * 0.25)


def test_processes_share_the_work_then_and_now(plan_of):
    (planned,) = plan_of().to_do
    history = History([record(planned, seconds_per_picture=0.25, evaluation=0.5, processes=2)])
    (estimate,) = estimated(history, plan_of(), processes=4)
    assert estimate.training_seconds == pytest.approx(2 * 48 * (0.25 * 2) / 4)
    assert estimate.evaluation_seconds == pytest.approx(27 * (0.5 * 2) / 4)


def test_of_several_trainings_the_median_counts_and_each_training_once(plan_of):
    (planned,) = plan_of().to_do
    slow_twice = [record(planned, seconds_per_picture=9.0, key="slow") for _ in range(3)]
    rest = [record(planned, seconds_per_picture=s, key=str(s)) for s in (0.1, 0.2)]
    (estimate,) = estimated(History([*slow_twice, *rest]), plan_of())
    assert estimate.trainings == 3
    assert estimate.training_seconds == pytest.approx(2 * 48 * 0.2)


@pytest.mark.parametrize(
    "changed",
    [
        {"sets": ("images.size=48",)},
        {"sets": ("train.precision=bf16",)},
        {"sets": ("backbones.mini.width=16",)},
        {"guidance": ("au",)},
        {"methods": ("adl",)},
    ],
    ids=str,
)
def test_what_has_no_record_of_its_kind_has_no_estimate(plan_of, changed):
    (planned,) = plan_of().to_do
    history = History([record(planned, seconds_per_picture=0.25)])
    assert estimated(history, plan_of(*changed.pop("sets", ()), **changed)) == [None]


def test_another_device_is_another_kind(plan_of):
    (planned,) = plan_of().to_do
    assert estimated(History([record(planned, seconds_per_picture=0.25)]), plan_of(), device="other") == [None]


def test_a_method_nobody_has_evaluated_yet_leaves_no_estimate(plan_of):
    (planned,) = plan_of().to_do
    history = History([record(planned, seconds_per_picture=0.25)])
    assert estimated(history, plan_of(methods=("cam", "gradcam"))) == [None]


def test_one_pass_serves_all_read_outs_and_takes_as_long_as_the_slowest(plan_of):
    (planned,) = plan_of().to_do
    history = History([record(planned, seconds_per_picture=1, evaluation=e, method=m) for m, e in (("cam", 0.5), ("gradcam", 2.0))])
    (estimate,) = estimated(history, plan_of(methods=("cam", "gradcam")))
    assert estimate.evaluation_seconds == pytest.approx(27 * 2.0)


def test_a_forecast_counts_device_hours_and_names_what_it_does_not_know(plan_of):
    (planned,) = plan_of().to_do
    history = History([record(planned, seconds_per_picture=10, evaluation=10)])
    plan = plan_of(methods=("cam", "adl"), seeds=(0, 1))
    predicted = forecast(plan, history, device="gpu", processes=4, groups=2)
    each = (2 * 48 * 10 + 27 * 10) / 4
    assert predicted.gpu
    assert len(predicted.estimates) == 4
    assert predicted.seconds == pytest.approx(2 * each)
    assert predicted.device_hours == pytest.approx(2 * each * 4 / 3600)
    assert predicted.wall_seconds == pytest.approx(each)
    assert sorted(predicted.group.values()) == [0, 1]


def test_an_evaluation_with_measures_is_estimated_from_such_evaluations_alone(plan_of):
    (planned,) = plan_of().to_do
    measuring = plan_of("evaluation.measures=['deletion']")
    history = [record(planned, seconds_per_picture=1, evaluation=0.5)]
    assert estimated(History(history), measuring) == [None]
    history.append(record(planned, seconds_per_picture=1, evaluation=3.0, measures=("deletion",)))
    (estimate,) = estimated(History(history), measuring)
    assert estimate.evaluation_seconds == pytest.approx(27 * 3.0)
    (estimate,) = estimated(History(history), plan_of())
    assert estimate.evaluation_seconds == pytest.approx(27 * 0.5)


def test_a_real_run_is_the_estimate_of_the_next(go, project, bench_here):
    go(run__guidance=["none"], train__epochs=4)
    (path,) = project.glob("results/cells/**/record.json")
    cost = json.loads(path.read_text())["cost"]
    history = read_history(project / "results")
    (estimate,) = estimated(history, plan_at(project), device=next(iter(history.devices)))
    assert estimate.training_seconds == pytest.approx(cost["training_seconds"] / 2)
    assert estimate.evaluation_seconds == pytest.approx(cost["evaluation_seconds"])
    shown = bench_here("plan", "--guidance", "none", "--seeds", "1,2", "--nproc", "2", "--procs-per-training", "1", cwd=project).stdout
    assert "2 of 2 trainings take" in shown
    assert "device-hours; each from 1 finished of its kind" in shown
    assert "placement on 2 groups of 1" in shown


def plan_at(folder):
    return make_plan(load_settings(environ={}, flags={"run.guidance": ["none"], "run.seeds": [1], "run.results": folder / "results"}))


def test_a_trained_one_only_has_its_evaluation_before_it(go, project):
    go(run__guidance=["none"])
    (marker,) = project.glob("results/cells/**/DONE")
    history = read_history(project / "results")
    marker.unlink()
    plan = make_plan(load_settings(environ={}, flags={"run.guidance": ["none"]}))
    (estimate,) = estimated(history, plan, device=next(iter(history.devices)))
    assert estimate.training_seconds == 0
    assert estimate.evaluation_seconds > 0


def test_a_record_that_cannot_be_read_is_left_out_and_named(go, project, caplog):
    go(run__guidance=["none"])
    (path,) = project.glob("results/cells/**/record.json")
    path.write_text("{")
    assert read_history(project / "results").devices == {}
    assert str(path.relative_to(project)) in caplog.text


def test_a_device_without_records_is_refused_with_those_there_are(project, bench_here):
    done = bench_here("plan", "--on", "H1000", cwd=project)
    assert done.returncode == 2
    assert "--on H1000: no record is of this device; there are: none" in done.stderr


def test_without_records_the_plan_says_so(project, bench_here):
    assert "no records of any kind in this results folder yet" in bench_here("plan", cwd=project).stdout


# ---- order and placement ----


def test_the_unknown_come_first_as_given_then_the_longest():
    assert longest_first([3.0, None, 5.0, None, 4.0]) == [1, 3, 2, 4, 0]


def test_the_order_of_a_plan_puts_unknown_kinds_before_long_ones_before_short_ones(go, project):
    go(run__guidance=["none"])
    flags = {"run.methods": ["cam", "adl"], "run.guidance": ["none"], "run.seeds": [1]}
    plan = make_plan(load_settings(environ={}, flags=flags))
    assert [planned.training.trains_as for planned in order(plan)] == ["adl", "cam"]


def test_each_goes_to_the_group_that_is_free_first():
    assert schedule([5.0, 4.0, 3.0, 3.0, 1.0], groups=2) == ([0, 1, 1, 0, 1], 8.0)


def best_wall(seconds, groups):
    places = itertools.product(range(groups), repeat=len(seconds))
    return min(max(sum(s for s, g in zip(seconds, place, strict=True) if g == group) for group in range(groups)) for place in places)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seconds", [(3, 3, 2, 2, 2), (9, 5, 4, 4, 1, 1), (7, 7, 6, 6, 5, 5, 4), (1,), (8, 1, 1, 1)], ids=str)
def test_longest_first_is_as_near_to_the_best_packing_as_theory_says(seconds, groups):
    ordered = [float(seconds[place]) for place in longest_first(seconds)]
    chosen, wall = schedule(ordered, groups=groups)
    loads = [sum(s for s, g in zip(ordered, chosen, strict=True) if g == group) for group in range(groups)]
    assert wall == max(loads)
    best = best_wall(seconds, groups)
    assert best <= wall <= best * (4 / 3 - 1 / (3 * groups)) + 1e-9  # Graham 1969
