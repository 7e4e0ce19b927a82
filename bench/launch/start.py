"""Start what a request asks for: this process alone, one of a world, or processes that this one starts and watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.config import Settings
from bench.launch import devices, report, world
from bench.launch.choice import Launch, choose
from bench.launch.report import Report
from bench.launch.request import RunRequest
from bench.matrix import digest
from bench.runtime.interruption import REQUEUE, StoppedError, StopRequest
from bench.runtime.observer import LogObserver, Observer
from bench.sweep.attempts import MOST
from bench.sweep.plan import Plan, ready_plan
from bench.sweep.store import Store

if TYPE_CHECKING:
    from bench.runtime.engine import Engine
    from bench.sweep.run import Outcome


def choose_launch(request: RunRequest) -> Launch:
    """How a request starts its processes; where this process is one of a world, the environment is completed.

    Raises:
        ValueError: flags or an environment that cannot be.
    """
    if report.wanted():
        report.end_with_parent()
    world.check_threads()
    here = None if request.processes.launcher == "torchrun" and "RANK" not in os.environ else world.joined_world()
    accelerators = devices.count() if request.device != "cpu" else 0
    launch = choose(request.processes, devices=accelerators, world=here, slurm_tasks_here=world.slurm_tasks_here())
    if launch.world is not None:
        world.join(launch.world, devices=accelerators)
    return launch


def describe(launch: Launch, *, timeout_s: int) -> str:
    """A launch in a sentence."""
    if launch.kind == "join":
        assert launch.world is not None
        return (
            f"one of {launch.world.size} processes that {launch.world.by} has started; if one is lost, the rest fails after {timeout_s} s"
        )
    if launch.kind == "here":
        return "this process alone"
    each = f"{launch.nproc} process{'es' if launch.nproc > 1 else ''}"
    if launch.kind == "groups":
        return f"{launch.groups} groups of {each} on this node; each group works on a training of its own"
    nodes = f"each of {launch.nnodes} nodes, which meet at {launch.endpoint[0]}:{launch.endpoint[1]}" if launch.nnodes > 1 else "this node"
    return f"torch elastic over {each} on {nodes}; if a process is lost, all fail after {timeout_s} s at the latest, and start again"


def run_here(
    request: RunRequest, plan: Plan, *, display: Callable[[Engine], AbstractContextManager[Observer]], stop: StopRequest
) -> tuple[Plan, Outcome, bool]:
    """Work on a plan with the processes of this world.

    Args:
        request: what is asked for.
        plan: made for this world.
        display: makes what receives the progress, given the engine; closed at the end.
        stop: requests to stop are noted here.

    Returns:
        The plan that was carried out, what became of it, and whether this is the main process.

    Raises:
        StoppedError, EverywhereError, BrokenWorldError: see `bench.sweep.run.run_plan`.
    """
    from bench.runtime.engine import Engine
    from bench.sweep.run import run_plan

    config = request.settings.config
    with stop.on_signals():
        engine = Engine(
            train=config.train,
            device=request.device,
            trackers=request.trackers,
            tracking_folder=config.run.results / "tracking",
            timeout_s=request.timeout_s,
            stop=stop,
        )
        with display(engine) as observer:
            plan = ready_plan(plan, observer=observer, plugins=request.plugins, stop=stop, engine=engine, trial=not report.wanted())
            outcome = run_plan(plan, engine=engine, observer=observer, wait=request.wait is not False)
        engine.close()  # not after an error: the other processes may be gone, and closing waits for them
    return plan, outcome, engine.is_main


def spawn(request: RunRequest, launch: Launch, plan: Plan, *, emit: Callable[[str], None], stop: StopRequest) -> tuple[Plan, Report]:
    """Start processes and wait for their end.

    Returns:
        The plan that the processes were given, and how they ended.

    Raises:
        ValueError: devices on which other programs compute, a dataset that cannot be prepared.
        ConnectionError: the nodes did not come together.
    """
    names = devices.visible(launch.nproc * launch.groups) if request.device != "cpu" and devices.count() else []
    if not request.processes.share_devices:
        devices.check_free(names)
    emit(describe(launch, timeout_s=request.timeout_s))
    with stop.on_signals():
        try:
            if launch.nnodes == 1:  # on several nodes the first of all processes prepares
                plan = ready_plan(plan, observer=LogObserver(), plugins=request.plugins, stop=stop)
        except StoppedError as error:
            return plan, Report(status=REQUEUE, message=str(error))
        return plan, _start(request, launch, names, plan, emit=emit, stop=stop)


def _start(request: RunRequest, launch: Launch, names: list[str], plan: Plan, *, emit: Callable[[str], None], stop: StopRequest) -> Report:
    processes = request.processes
    if launch.kind == "groups":
        from bench.launch.groups import run_groups

        own = ["--launcher", "torchrun", "--nproc", str(launch.nproc)] if launch.nproc > 1 else ["--launcher", "inline"]
        return run_groups(
            [*request.child_command(), *own, "--max-restarts", str(processes.max_restarts), "--share-devices"],
            devices.cut(names, groups=launch.groups),
            nproc=launch.nproc,
            max_restarts=processes.max_restarts,
            emit=emit,
            stop=stop,
        )
    from bench.launch.torchrun import Elastic, run_elastic

    elastic = Elastic(
        command=request.child_command(),
        nproc=launch.nproc,
        nnodes=launch.nnodes,
        endpoint=launch.endpoint,
        run_id=processes.rdzv_id or meeting_id(plan.settings),
        max_restarts=processes.max_restarts,
        rdzv_timeout_s=processes.rdzv_timeout,
    )
    return run_elastic(elastic, stop=stop, progress=lambda: _progress(plan))


def _progress(plan: Plan) -> object:
    """How far the work is, as its files tell: cells done, checkpoints, trainings that are given up."""
    store = Store(plan.settings.config.run.results)
    failures = [store.read_failure(cell) for cell in plan.matrix.cells]
    return (
        [store.is_done(cell) for cell in plan.matrix.cells],
        [store.newest_checkpoint(training) for training, _ in plan.matrix.trainings],
        [failure is not None and failure.get("attempts", 0) >= MOST for failure in failures],
    )


def meeting_id(settings: Settings) -> str:
    """A name that the same command gives on every node, wherever the folders are mounted."""
    tree = settings.config.model_dump(mode="json")
    tree["run"] |= {"data": "", "results": Path(tree["run"]["results"]).name}
    return digest(tree)[:12]


def exit_status(ended: Report) -> int:
    """The status this process ends with. A run that another run has started delivers its report instead, and ends with 0."""
    if not report.wanted():
        return ended.status
    report.deliver(ended)
    return 0


def outcome_of(before: Plan, now: Plan, ended: Report, *, seconds: float) -> Outcome:
    """What processes that this one has started did, from the plans before and after and their report."""
    from bench.sweep.run import Outcome

    cells = now.matrix.cells
    missing = {cell.label for cell in cells if cell.key not in now.done}
    trained = {planned.training.key for planned in before.to_do} - {planned.training.key for planned in now.to_do}
    return Outcome(
        ran=tuple(cell for cell in cells if cell.key in now.done - before.done),
        skipped=tuple(cell for cell in cells if cell.key in before.done),
        failed={label: error for label, error in ended.failed.items() if label in missing},
        trained=len(trained),
        seconds=seconds,
        left=ended.left,
    )


def report_of(outcome: Outcome) -> Report:
    """The report of a run that came to its own end."""
    return Report(status=1 if outcome.failed else 0, failed=dict(outcome.failed), left=dict(outcome.left), rank=_rank())


def stopped_report(message: str, *, status: int = REQUEUE) -> Report:
    """The report of a run that ended before its end."""
    return Report(status=status, message=message, rank=_rank())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
