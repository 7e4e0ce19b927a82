"""How ``bench run`` starts processes: from its flags to a launch, and what the starting process does and says."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.launch import devices, report, world
from bench.launch.choice import Launch, Wanted, choose

if TYPE_CHECKING:
    from bench.config import Settings
    from bench.launch.report import Report
    from bench.runtime.interruption import StopRequest
    from bench.sweep.plan import Plan
    from bench.sweep.run import Outcome

PROCESSES = "Processes"

Launcher = Annotated[
    str,
    typer.Option(
        help="auto: join the world this was started in, else torchrun if there are several accelerators, else inline (this process alone). "
        "slurm: submit a job for each training.",
        rich_help_panel=PROCESSES,
    ),
]
Nproc = Annotated[
    int | None, typer.Option(help="Processes on this node (default: one per accelerator, else 1).", rich_help_panel=PROCESSES)
]
Nnodes = Annotated[int, typer.Option(help="Nodes; type the same command on each.", rich_help_panel=PROCESSES)]
ProcsPerTraining = Annotated[
    int | None,
    typer.Option(help="Processes of a training; the others of this node work on other trainings.", rich_help_panel=PROCESSES),
]
RdzvEndpoint = Annotated[str | None, typer.Option(help="HOST:PORT of one of the nodes, where all meet.", rich_help_panel=PROCESSES)]
RdzvId = Annotated[str | None, typer.Option(help="Name of the meeting (default: a hash of the settings).", rich_help_panel=PROCESSES)]
RdzvTimeout = Annotated[int, typer.Option(help="Seconds for all nodes to come together.", rich_help_panel=PROCESSES)]
MaxRestarts = Annotated[int, typer.Option(help="Times that processes are started again after a crash.", rich_help_panel=PROCESSES)]
ShareDevices = Annotated[bool, typer.Option("--share-devices", help="Also use devices that others compute on.", rich_help_panel=PROCESSES)]

_FLAGS = ("launcher", "nproc", "nnodes", "procs_per_training", "rdzv_endpoint", "rdzv_id", "rdzv_timeout", "max_restarts")


def choose_launch(context: typer.Context) -> Launch:
    """How the running command starts its processes; where it is one of a world, the environment is completed.

    Raises:
        ValueError: flags or an environment that cannot be.
    """
    if report.wanted():
        report.end_with_parent()
    world.check_threads()
    given = context.params
    wanted = Wanted(**{name: given[name] for name in _FLAGS})
    here = None if wanted.launcher == "torchrun" and "RANK" not in os.environ else world.joined_world()
    accelerators = devices.count() if given["device"] != "cpu" else 0
    launch = choose(wanted, devices=accelerators, world=here, slurm_tasks_here=world.slurm_tasks_here())
    if launch.world is not None:
        world.join(launch.world, devices=accelerators)
    return launch


def leave(status: int, outcome: Outcome | None = None, message: str = "") -> typer.Exit:
    """The end of a run that trains: its exit status, or, where another run has started it, a report to that."""
    if not report.wanted():
        return typer.Exit(status)
    told = report.Report(
        status=status,
        failed=dict(outcome.failed) if outcome else {},
        left=dict(outcome.left) if outcome else {},
        message=message,
        rank=int(os.environ.get("RANK", "0")),
    )
    report.deliver(told)
    return typer.Exit(0)


def describe(launch: Launch, *, timeout_s: int) -> str:
    """A launch in a sentence."""
    if launch.kind == "join":
        assert launch.world is not None
        return (
            f"one of {launch.world.size} processes that {launch.world.by} has started; a lost one makes the others fail after {timeout_s} s"
        )
    if launch.kind == "here":
        return "this process alone"
    each = f"{launch.nproc} process{'es' if launch.nproc > 1 else ''}"
    if launch.kind == "groups":
        return f"{launch.groups} groups of {each} on this node, each on a training of its own"
    nodes = f"each of {launch.nnodes} nodes, which meet at {launch.endpoint[0]}:{launch.endpoint[1]}" if launch.nnodes > 1 else "this node"
    return f"torch elastic over {each} on {nodes}; a lost one makes the others fail after {timeout_s} s at the latest, then all start again"


def show_launch(context: typer.Context, launch: Launch) -> None:
    """Print how a plan would be started."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False, markup=False).print(f"Launch: {describe(launch, timeout_s=context.params['timeout'])}.")


def reports() -> bool:
    """Whether another run has started this one, and prints in its place."""
    return report.wanted()


def spawn(context: typer.Context, launch: Launch, plan: Plan, *, only: tuple[str, ...]) -> int:
    """Start what ``launch`` says, wait for it, and tell how it went; returns the exit status.

    Raises:
        ValueError: devices on which others compute, a dataset that cannot be prepared.
        ConnectionError: the nodes did not come together.
    """
    from bench.runtime.interruption import REQUEUE, StoppedError, StopRequest
    from bench.sweep.plan import make_plan

    given = context.params
    total = launch.nproc * launch.groups
    names = devices.visible(total) if given["device"] != "cpu" and devices.count() else []
    if not given["share_devices"]:
        devices.check_free(names)
    _say(describe(launch, timeout_s=given["timeout"]))
    started = time.monotonic()
    stop = StopRequest()
    with stop.on_signals():
        try:
            plan = _prepared(plan, launch, plugins=tuple(given["plugins"] or ()), only=only, stop=stop)
        except StoppedError as error:
            ended = report.Report(status=REQUEUE, message=str(error))
        else:
            ended = _start(context, launch, names, plan, stop)
    now = make_plan(plan.settings, world_size=launch.world_size, only=only, trial=False)
    status = 0 if len(now.done) == len(now.matrix.cells) else ended.status
    if ended.message:
        _say(f"{ended.message}." + (" The same command goes on from here." if status in (1, REQUEUE) else ""))
    if report.wanted():
        raise leave_with(ended, status)
    if status in (0, 1) and ended.rank == 0:
        _summarise(plan, now, ended, seconds=time.monotonic() - started)
    return status


def leave_with(ended: Report, status: int) -> typer.Exit:
    """Pass on a report to who has started this run."""
    report.deliver(dataclasses.replace(ended, status=status))
    return typer.Exit(0)


def _start(context: typer.Context, launch: Launch, names: list[str], plan: Plan, stop: StopRequest) -> Report:
    given = context.params
    if launch.kind == "groups":
        from bench.launch.groups import run_groups

        own = ["--launcher", "torchrun", "--nproc", str(launch.nproc)] if launch.nproc > 1 else ["--launcher", "inline"]
        return run_groups(
            [*child_command(context), *own, "--max-restarts", str(given["max_restarts"]), "--share-devices"],
            devices.cut(names, groups=launch.groups),
            nproc=launch.nproc,
            max_restarts=given["max_restarts"],
            emit=_emit,
            stop=stop,
        )
    from bench.launch.torchrun import Elastic, run_elastic

    elastic = Elastic(
        command=child_command(context),
        nproc=launch.nproc,
        nnodes=launch.nnodes,
        endpoint=launch.endpoint,
        run_id=given["rdzv_id"] or meeting_id(plan.settings),
        max_restarts=given["max_restarts"],
        rdzv_timeout_s=given["rdzv_timeout"],
    )
    return run_elastic(elastic, stop=stop, progress=lambda: _progress(plan))


def child_command(context: typer.Context, *, without: Container[str] = ()) -> list[str]:
    """This command again, for a process that it starts: all flags that were given, but those about processes and ``without``."""
    verbose = ["--verbose"] if context.parent is not None and context.parent.params.get("verbose") else []
    words = [sys.executable, "-P", "-m", "bench", *verbose, "run"]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in (*_FLAGS, "share_devices") or name in without or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else (value,):
                words += [parameter.opts[0], str(one)]
    return words


def _progress(plan: Plan) -> object:
    """How far the work is, as its files tell: cells done, checkpoints, trainings that are given up."""
    from bench.sweep.attempts import MOST
    from bench.sweep.store import Store

    store = Store(plan.settings.config.run.results)
    failures = [store.read_failure(cell) for cell in plan.matrix.cells]
    return (
        [store.is_done(cell) for cell in plan.matrix.cells],
        [store.newest_checkpoint(training) for training, _ in plan.matrix.trainings],
        [failure is not None and failure.get("attempts", 0) >= MOST for failure in failures],
    )


def meeting_id(settings: Settings) -> str:
    """A name that the same command gives on every node, wherever the folders are mounted."""
    from bench.matrix import digest

    tree = settings.config.model_dump(mode="json")
    tree["run"] |= {"data": "", "results": Path(tree["run"]["results"]).name}
    return digest(tree)[:12]


def _prepared(plan: Plan, launch: Launch, *, plugins: tuple[str, ...], only: tuple[str, ...], stop: StopRequest) -> Plan:
    """Prepare what is missing once, before there are several who could. On several nodes the first of all processes does it."""
    from bench.runtime.observer import LogObserver
    from bench.sweep.datasets import prepare_missing
    from bench.sweep.plan import make_plan

    if launch.nnodes > 1 or all(source.index is not None for source in plan.sources.values()):
        return plan
    prepare_missing(plan.sources.values(), observer=LogObserver(), plugins=plugins, stop=stop)
    return make_plan(plan.settings, world_size=launch.world_size, only=only)


def _summarise(before: Plan, now: Plan, ended: Report, *, seconds: float) -> None:
    from bench.cli.summary import summary
    from bench.sweep.run import Outcome

    cells = now.matrix.cells
    trained = {planned.training.key for planned in before.to_do} - {planned.training.key for planned in now.to_do}
    summary(
        now,
        Outcome(
            ran=tuple(cell for cell in cells if cell.key in now.done - before.done),
            skipped=tuple(cell for cell in cells if cell.key in before.done),
            failed={label: error for label, error in ended.failed.items() if label in {c.label for c in cells if c.key not in now.done}},
            trained=len(trained),
            seconds=seconds,
            left=ended.left,
        ),
    )


def _emit(line: str) -> None:
    typer.echo(line, err=True)


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(text))
