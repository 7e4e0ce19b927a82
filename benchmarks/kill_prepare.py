"""Kill `bench data prepare` at random moments, start it again, and compare the result with an undisturbed one, byte for byte.

    python benchmarks/kill_prepare.py rafdb RAW --kills 20 --option landmarks=none

Each kill is SIGKILL to the whole process group after a random time; the moments are spread over the time that the undisturbed run took.
Exit status 0 if every file of the two folders is the same, hidden ones included.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    words = [sys.executable, "-P", "-m", "bench", "data", "prepare", arguments.entry, "--raw", str(arguments.raw), "--out", str(out)]
    words += ["--workers", str(arguments.workers), "--allow-partial"]
    return words + [word for option in arguments.option for word in ("--option", option)]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry")
    parser.add_argument("raw", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[])
    arguments = parser.parse_args()
    randomness = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, disturbed = Path(temporary) / "whole", Path(temporary) / "disturbed"
        began = time.monotonic()
        subprocess.run(command(arguments, whole), check=True, capture_output=True)
        seconds = time.monotonic() - began
        # A killed run goes on where the one before it stopped: twenty kills need twenty slices of one run, after a start each.
        moments = []
        while len(moments) < arguments.kills:
            start = subprocess.Popen(
                command(arguments, disturbed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            moment = randomness.uniform(0.2, 2.0 + 1.5 * seconds / arguments.kills)
            try:
                start.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                os.killpg(start.pid, signal.SIGKILL)
                start.wait()
                moments.append(moment)
            else:  # it came to its end before the last kill: begin anew, so that the remaining kills have something to hit
                assert start.returncode == 0, start.returncode
                if hashes(disturbed) != hashes(whole):
                    print(f"different after {len(moments)} kills")
                    return 1
                subprocess.run(["rm", "-r", str(disturbed)], check=True)
        subprocess.run(command(arguments, disturbed), check=True, capture_output=True)
        expected, found = hashes(whole), hashes(disturbed)
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        joined = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
        span = f"{min(moments):.1f} to {max(moments):.1f} s"
        print(
            f"undisturbed {seconds:.1f} s; {arguments.kills} kills after {span}; {len(expected)} files, {len(differing)} differ; "
            f"sha256 over all: {joined}"
        )
        return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
