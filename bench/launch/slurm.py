"""Slurm, through submitit: one job for each training that is still to do.

A job is its command line: the processes that Slurm starts each run ``bench run --only KEY`` as a child, as the ranks of one world. The key
stands for everything that can change the weights: if the settings, the code of an entry or the data have changed since the submission,
the job ends with an error instead of training something else.

Signals. Before the end of the time limit, and at a preemption where the cluster is configured for it
(``preempt_send_user_signal``), Slurm sends SIGUSR2. submitit answers it in the first process of the job: it calls
`TrainingJob.checkpoint`, and requeues. Our own runs answer SIGTERM: they finish the step, save, and end with status 75. So `checkpoint`
passes a SIGTERM on and waits for the child; and a child that ended with 75 on its own makes the job requeue itself. What goes on after
the requeue is the trainer's own resuming.

submitit pickles the job. What is pickled is plain data, made by us and read by the job's own processes alone; bench never reads a pickle.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from bench.config import ConfigError, Settings, SlurmConfig
from bench.extras import install_command
from bench.io import timestamp, write_json_atomic
from bench.matrix import Planned
from bench.runtime.interruption import REQUEUE

if TYPE_CHECKING:
    import submitit

FOLDER = "slurm"
"""Below the results folder: logs, submission files, and which training has which job."""
BOOK = "jobs.json"
GRACE_S = 60.0
"""After a child was stopped by somebody else than submitit. A cancelled job is killed in this time (``KillWait``, 30 s as shipped), so that
it is not requeued against the user's will; a preempted one is killed, and requeued by Slurm, or gets its SIGUSR2."""
ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"})
"""Job states of sacct after which there is nothing more to come."""

_PORTS = range(20_000, 32_768)
"""For the meeting of the ranks: below the ports that systems hand out on their own."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one training runs on."""

    nodes: int
    processes: int
    """Of one node."""
    gpus: int
    """Of one node."""

    @property
    def world_size(self) -> int:
        """Processes of one training."""
        return self.nodes * self.processes


@dataclasses.dataclass(kw_only=True)
class TrainingJob:
    """One training as a job. Plain data, which submitit pickles."""

    key: str
    label: str
    arguments: tuple[str, ...]
    """Of ``bench``, with ``--only``."""
    folder: str
    """Working directory."""
    environment: dict[str, str]
    """Variables that must be as they were at submission, wherever Slurm takes the others from."""
    patience_s: float
    """How long the child may take to save and end after it was told to."""
    _child: _Child | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __call__(self) -> None:
        """Run the training as the rank that submitit says. Ends the process where the job is to be requeued.

        Raises:
            RuntimeError: the run failed.
        """
        import submitit

        job = submitit.JobEnvironment()
        user_signal = getattr(signal, f"SIG{job.USR_SIG}")
        environment = {**os.environ, **self.environment, **rank_variables(job)}
        # A child, and not this process: submitit starts us with handlers and a pickle of its own, and the run wants the main thread and a
        # clean interpreter. -P keeps the working directory, which may be the checkout with its `datasets`, off the import path.
        command = [sys.executable, "-P", "-m", "bench", *self.arguments]
        with _held({user_signal, signal.SIGTERM}):  # until there is somebody to pass them on to
            self._child = child = _Child(command, folder=self.folder, environment=environment)
            submitits = signal.getsignal(user_signal)
            assert callable(submitits)

            def stop(number: int, frame: FrameType | None) -> None:
                child.stop()
                if number == user_signal:
                    submitits(number, frame)

            for number in (user_signal, signal.SIGTERM):
                signal.signal(number, stop)
        status = child.wait()
        assert status is not None
        if status == 0:
            return
        if status not in (REQUEUE, -signal.SIGTERM):  # the latter before a run is so far that it listens
            raise RuntimeError(f"{self.label}: bench run ended with status {status}; its messages are in the log of this job")
        if job.global_rank:
            raise SystemExit(0)  # the first process requeues the job; no result of this one may tell that it is done
        if job.cluster == "slurm":
            time.sleep(GRACE_S)
        signal.raise_signal(user_signal)  # as if Slurm had sent it: submitit requeues, and ends this process
        raise RuntimeError(f"{self.label}: was interrupted, and submitit did not requeue it")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Wait until the child has saved and ended; returns the job to put in the queue again. Called by submitit in a signal handler."""
        import submitit

        if self._child is not None:
            self._child.stop()
            if self._child.wait(timeout=self.patience_s) is None:
                _log.warning("%s: not saved within %.0f s; going on from the checkpoint before", self.label, self.patience_s)
                self._child.kill()
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self))


class _Child:
    """A process that can be waited for from inside a signal handler that interrupted waiting for it."""

    def __init__(self, command: Sequence[str], *, folder: str, environment: Mapping[str, str]) -> None:
        """Start it. Signals that are held back now stay so in it, but for SIGTERM: Slurm signals every process of a job, and the SIGUSR2
        that is meant for submitit would end a run.
        """
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def prepare() -> None:  # runs in the child; this process has one thread
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            if libc is not None:
                libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nobody trains on without the job

        self._process = subprocess.Popen(command, cwd=folder, env=dict(environment), preexec_fn=prepare)  # noqa: S603
        self._stopped = False

    def stop(self) -> None:
        """Ask it to save and end. Once: a second request makes a run end at once."""
        if not self._stopped and self.wait(timeout=0) is None:
            self._stopped = True
            self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, *, timeout: float | None = None) -> int | None:
        """Its exit status, None if it has none after ``timeout`` seconds. `Popen.wait` cannot do this twice at once: it holds a lock."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            options = os.WEXITED | os.WNOWAIT | (os.WNOHANG if deadline is not None else 0)
            ended = os.waitid(os.P_PID, self._process.pid, options)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            if deadline is None or time.monotonic() >= deadline:
                return None
            time.sleep(0.1)


@contextlib.contextmanager
def _held(signals: set[signal.Signals]) -> Iterator[None]:
    """Signals that come meanwhile come afterwards; none is lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def rank_variables(job: submitit.JobEnvironment) -> dict[str, str]:
    """What torchrun would set: who of how many a process is, and where they meet. Empty for a world of one, which needs none of it."""
    if job.num_tasks == 1:
        return {}
    return {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        # Jobs of one sweep have neighbouring numbers, and may share a node: each gets its own port.
        "MASTER_PORT": str(_PORTS[int(job.raw_job_id) % len(_PORTS)]),
    }


def check_submitit() -> None:
    """Refuse to go on without submitit.

    Raises:
        ValueError: with the command that installs it.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError(f"--launcher slurm needs submitit; try: {install_command('slurm')}") from None


def job_shape(settings: Settings, *, nodes: int, processes: int | None, device: str) -> Shape:
    """Nodes, processes and GPUs of each job.

    Args:
        settings: with ``slurm``.
        nodes: of each training.
        processes: on each node; None = one for each GPU, or one.
        device: ``cpu`` asks for no GPUs unless the settings do.

    Raises:
        ConfigError: fewer GPUs than processes, several nodes without Slurm.
    """
    config = settings.config.slurm
    if config.cluster == "local" and nodes > 1:
        raise ConfigError(
            f"--nnodes {nodes} needs a cluster; slurm.cluster = 'local' (from {settings.origin('slurm.cluster')}) has one node"
        )
    gpus = config.gpus_per_node
    if gpus is None:
        gpus = 0 if device == "cpu" else processes or 1
    processes = processes or max(1, gpus)
    if 0 < gpus < processes and device != "cpu":
        raise ConfigError(
            f"--nproc {processes} processes on slurm.gpus_per_node = {gpus} (from {settings.origin('slurm.gpus_per_node')}): "
            f"each process needs a GPU of its own; use --nproc {gpus}, or --device cpu"
        )
    return Shape(nodes=nodes, processes=processes, gpus=gpus)


def make_jobs(to_do: Iterable[Planned], *, arguments: Sequence[str], config: SlurmConfig, world_size: int) -> list[TrainingJob]:
    """A job for each training.

    Args:
        to_do: the trainings.
        arguments: the command line of ``bench run`` that asked for them, without what is about launching.
        config: for the time a job has to save.
        world_size: processes of one training.
    """
    launcher = ("--launcher", "inline") if world_size == 1 else ()  # several ranks are found in the environment
    kept = {name: value for name, value in os.environ.items() if name.startswith("BENCH_")}
    return [
        TrainingJob(
            key=training.key,
            label=training.label,
            arguments=(*arguments, *launcher, "--only", training.key),
            folder=str(Path.cwd()),
            environment={**kept, "PYTHONSAFEPATH": "1"},
            patience_s=config.signal_seconds - 20,  # submitit still has to write and to requeue
        )
        for training, _ in to_do
    ]


def slurm_parameters(config: SlurmConfig, shape: Shape) -> dict[str, Any]:
    """The parameters of `submitit.SlurmExecutor`, which are sbatch's by name."""
    extra = {name.replace("_", "-"): value for name, value in config.extra.items() if value is not False}
    given = {
        "job_name": "bench",
        "time": config.minutes,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.processes,
        "gpus_per_node": shape.gpus or None,
        "cpus_per_task": config.cpus_per_task,
        "mem": f"{round(config.mem_gb * 1024)}M" if config.mem_gb else None,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "signal_delay_s": config.signal_seconds,
        "array_parallelism": config.parallel,
        "additional_parameters": {"requeue": True, **extra},
    }
    return {name: value for name, value in given.items() if value is not None} | {"wckey": None}


def executor(config: SlurmConfig, shape: Shape, *, results: Path) -> submitit.SlurmExecutor | submitit.LocalExecutor:
    """The executor of submitit for the cluster that is asked for.

    Raises:
        ValueError: there is no Slurm here.
    """
    import submitit

    folder, python = results / FOLDER, f"{shlex.quote(sys.executable)} -P"
    if config.cluster == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=config.max_requeues, python=python)
        local.update_parameters(
            timeout_min=config.minutes,
            tasks_per_node=shape.processes,
            gpus_per_node=shape.gpus,
            nodes=1,
            signal_delay_s=config.signal_seconds,
        )
        return local
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"--launcher slurm: no {', '.join(missing)} here. Type it on a login node of the cluster; --dry-run shows what would be "
            f"submitted, --set slurm.cluster=local runs the same jobs on this machine"
        )
    slurm = submitit.SlurmExecutor(folder, max_num_timeout=config.max_requeues, python=python)
    slurm.update_parameters(**slurm_parameters(config, shape))
    return slurm


def submission_text(config: SlurmConfig, shape: Shape, *, results: Path, jobs: int) -> str:
    """The file that sbatch would get, also where there is no Slurm.

    Raises:
        ValueError: a parameter submitit does not know.
    """
    import submitit

    class Anywhere(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

        def text(self) -> str:
            return self._make_submission_file_text(self._submitit_command_str, "")

    anywhere = Anywhere(results / FOLDER, max_num_timeout=config.max_requeues, python=f"{shlex.quote(sys.executable)} -P")
    anywhere.update_parameters(**slurm_parameters(config, shape))
    if jobs > 1:
        anywhere.parameters["map_count"] = jobs  # as submitit does for an array
    return anywhere.text()


class Book:
    """``<results>/slurm/jobs.json``: which training was submitted as which job."""

    def __init__(self, results: Path) -> None:
        self.path = results / FOLDER / BOOK

    def read(self) -> dict[str, dict[str, str]]:
        """Training key -> ``job``, ``label``, ``submitted``."""
        try:
            content: dict[str, dict[str, str]] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.path} is not readable JSON ({error}); remove it if no job of this results folder runs") from error
        return content

    def add(self, jobs: Mapping[str, TrainingJob]) -> None:
        """Note jobs by their Slurm number."""
        now = timestamp()
        new = {job.key: {"job": number, "label": job.label, "submitted": now} for number, job in jobs.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.path, {**self.read(), **new})

    def living(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Of these trainings, those with a job that has not ended -> its number and state. A state nobody knows counts as not ended."""
        wanted = set(keys)
        noted = {key: entry["job"] for key, entry in self.read().items() if key in wanted}
        return {key: (noted[key], state) for key, state in zip(noted, job_states(noted.values()), strict=True) if state not in ENDED}


def job_states(numbers: Iterable[str]) -> list[str]:
    """State of each job as sacct tells it, in one call; ``UNKNOWN`` where it does not."""
    import submitit

    numbers = list(numbers)
    watcher = submitit.SlurmJob.watcher
    for number in numbers:
        watcher.register_job(number)
    if numbers:
        watcher.update()
    return [watcher.get_state(number, mode="cache").split()[0] for number in numbers]  # "CANCELLED by 1000"


def submit(jobs: Sequence[TrainingJob], using: submitit.SlurmExecutor | submitit.LocalExecutor) -> list[submitit.Job[None]]:
    """Put jobs in the queue, several as one array, in their order.

    Raises:
        ValueError: sbatch refuses, with its words.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    try:
        with submitit.helpers.clean_env():  # a submission from inside a job must not look like a part of that job
            return using.submit_array(jobs)
    except FailedJobError as error:
        raise ValueError(f"sbatch refused the jobs: {error}") from error


def run_here(
    jobs: Sequence[TrainingJob],
    using: submitit.SlurmExecutor | submitit.LocalExecutor,
    *,
    parallel: int,
    started: Callable[[TrainingJob, str], None],
) -> None:
    """Run jobs on this machine, so many at once, to the end. Whatever ends this ends them; they save what they have."""
    waiting, running = list(jobs), list[Any]()
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                (submitted,) = submit([job], using)
                running.append(submitted)
                started(job, submitted.job_id)
            time.sleep(0.2)
            running = [job for job in running if not job.done()]
    finally:
        for job in running:
            job.cancel(check=False)
        deadline = time.monotonic() + 10
        while not all(job.done() for job in running) and time.monotonic() < deadline:
            time.sleep(0.1)


def job_of(number: str, results: Path) -> submitit.Job[None]:
    """A job that was submitted earlier."""
    import submitit

    return submitit.SlurmJob(results / FOLDER, number)


def wait_for(jobs: Sequence[submitit.Job[None]], *, every_s: float = 30.0) -> None:
    """Wait until all jobs have ended, requeued ones for good."""
    while not all(job.done() for job in jobs):
        time.sleep(every_s)
