"""Soak test: disturb a sweep in every way at hand, restart it, and compare its records with those of an undisturbed one.

    python benchmarks/chaos.py --faults 100                                   # the quick matrix; needs root for the small file system
    python benchmarks/chaos.py --faults 20 --methods cam,acol --set train.epochs=2

The faults, drawn with a seed: SIGKILL to all processes, SIGKILL to the main one, SIGTERM and SIGUSR1 (which save), SIGSTOP for a while,
a second run beside the first, a full disk (results lie on a small tmpfs, `--disk` MiB, which is filled and emptied), a flipped byte in the
newest checkpoint, a flipped byte in a shard (put right later, as a user would by copying it again). When the sweep comes to its end
before the last fault, a part of its results is removed, and it goes on. At the end every record must be the undisturbed one, except for
times and hosts: same metrics, rows, weights. Exit status 0 if none is lost and none is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REQUEUE = 75
SAME = ("key", "training_key", "metrics", "rows_sha256", "weights_sha256", "epochs", "selection")


class Chaos:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.random = random.Random(arguments.seed)
        self.data = folder / "data"
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.results = self.disk / "results"
        self.injected: Counter[str] = Counter()
        self.exits: Counter[int] = Counter()
        self.log = (folder / "log.txt").open("wb")
        self.damaged: tuple[Path, bytes] | None = None

    def command(self, results: Path) -> list[str]:
        chosen = self.arguments
        words = [sys.executable, "-P", "-m", "bench", "run", "--profile", "quick", "--methods", chosen.methods, "--seeds", chosen.seeds]
        words += ["--results", str(results), "--data", str(self.data), "--launcher", "inline"]
        return words + [word for pair in chosen.set for word in ("--set", pair)]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(self.command(self.results), stdout=self.log, stderr=self.log, start_new_session=True, env=environment)

    def run(self, reference: Path) -> int:
        done = 0
        while done < self.arguments.faults:
            process = self.start()
            with self.ended(process):
                if self.wait(process, self.random.uniform(*self.arguments.between)) is not None:
                    self.finished(process.returncode, reference)
                    continue
                fault = self.random.choice(self.faults())
                self.injected[fault.__name__] += 1
                done += 1
                fault(process)
                print(f"{done:4d} {fault.__name__}", flush=True)
        self.repair()
        last = subprocess.run(self.command(self.results), check=False, stdout=self.log, stderr=self.log)
        lost, wrong = compare(reference, self.results)
        leftovers = [str(path) for path in self.results.rglob("*") if path.name.endswith(".partial") or path.match("leases/*.json")]
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.injected.items()))
        print(f"faults: {done} ({faults})\nexits: {dict(sorted(self.exits.items()))}, the last {last.returncode}")
        print(f"records: {len(records(reference))}; lost {len(lost)}, wrong {len(wrong)}; leftovers {len(leftovers)}")
        for name in (*lost, *wrong, *leftovers):
            print(f"  {name}")
        return int(bool(lost or wrong or leftovers or last.returncode))

    @contextlib.contextmanager
    def ended(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """No fault leaves a process behind."""
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self.exits[process.wait()] += 1

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | None:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def finished(self, status: int, reference: Path) -> None:
        """The sweep came to its end: nothing may be wrong; then part of it is taken away."""
        self.repair()
        if status == 0:
            lost, wrong = compare(reference, self.results)
            assert not lost, lost
            assert not wrong, wrong
            folders = sorted((self.results / "trainings").iterdir())
            for folder in self.random.sample(folders, k=max(1, len(folders) // 2)):
                shutil.rmtree(folder)
            for marker in sorted(self.results.rglob("DONE")):
                key = json.loads((marker.parent / "record.json").read_bytes())["training_key"]
                if not (self.results / "trainings" / key[:16]).exists():
                    shutil.rmtree(marker.parent)

    def faults(self) -> list[Callable[[subprocess.Popen[bytes]], None]]:
        kinds = [
            self.kill_all,
            self.kill_main,
            self.terminate,
            self.user_signal,
            self.pause,
            self.second_run,
            self.damage_checkpoint,
            self.damage_shard,
        ]
        return [*kinds, self.fill_disk] if self.arguments.disk else kinds

    def kill_all(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)

    def kill_main(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()

    def terminate(self, process: subprocess.Popen[bytes]) -> None:
        self.asked(process, signal.SIGTERM)

    def user_signal(self, process: subprocess.Popen[bytes]) -> None:
        self.asked(process, signal.SIGUSR1)

    def asked(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        process.send_signal(number)
        status = self.wait(process, 60)
        # Before handlers are installed a signal ends the process as it always does; where a shard is damaged the sweep may just have ended.
        assert status in (0, REQUEUE, -number, None) or (status == 1 and self.damaged is not None), status
        if status == 1 and self.damaged is not None:
            print(f"     asked by {number.name}, it ended with failed cells, beside the damaged {self.damaged[0].name}")

    def pause(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGCONT)
        self.wait(process, 5)

    def second_run(self, process: subprocess.Popen[bytes]) -> None:
        other = self.start()
        with self.ended(other):
            self.wait(other, 10)
            process.kill()
            self.wait(other, 10)

    def fill_disk(self, process: subprocess.Popen[bytes]) -> None:
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 18))
                file.flush()
        self.wait(process, 15)
        filler.unlink()

    def damage_checkpoint(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        files = sorted(self.results.glob("trainings/*/checkpoints/*/*.safetensors"), key=lambda path: path.stat().st_mtime)
        if files:
            self.flip(files[-1])

    def damage_shard(self, process: subprocess.Popen[bytes]) -> None:
        if self.damaged is None:
            path = self.random.choice(sorted(self.data.glob("*/*.tar")))
            self.damaged = (path, self.flip(path))
        self.wait(process, 10)
        if self.random.random() < 0.5:
            self.repair()

    def flip(self, path: Path) -> bytes:
        """Change one byte in place; returns what the file was."""
        content = path.read_bytes()
        place = self.random.randrange(len(content))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ 0x10]))
        return content

    def repair(self) -> None:
        if self.damaged is not None:
            self.damaged[0].write_bytes(self.damaged[1])
            self.damaged = None


def records(results: Path) -> dict[str, dict[str, Any]]:
    found = (marker.parent for marker in results.rglob("DONE"))
    return {str(folder.relative_to(results)): json.loads((folder / "record.json").read_bytes()) for folder in found}


def compare(reference: Path, results: Path) -> tuple[list[str], list[str]]:
    """Cells that are missing, and cells that differ in anything but times and hosts."""
    expected, found = records(reference), records(results)
    lost = sorted(expected.keys() - found.keys())
    wrong = sorted(name for name in found if name not in expected or any(found[name][key] != expected[name][key] for key in SAME))
    return lost, wrong


@contextlib.contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[None]:
    if not mebibytes:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "bench-chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--disk", type=int, default=64, help="MiB of the tmpfs; 0 = no such file system, no full disk")
    parser.add_argument("--between", type=float, nargs=2, default=(4.0, 16.0), help="seconds from a start to its fault")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chaos = Chaos(arguments, folder)
        reference = folder / "reference"
        began = time.monotonic()
        subprocess.run(chaos.command(reference), check=True, stdout=chaos.log, stderr=chaos.log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"undisturbed: {len(records(reference))} records in {time.monotonic() - began:.0f} s", flush=True)
        with mounted(chaos.disk, arguments.disk):
            try:
                status = chaos.run(reference)
            except AssertionError:
                print(*Path(chaos.log.name).read_text(errors="replace").splitlines()[-40:], sep="\n", file=sys.stderr)
                raise
        print(f"{time.monotonic() - began:.0f} s in all")
    return status


if __name__ == "__main__":
    sys.exit(main())
