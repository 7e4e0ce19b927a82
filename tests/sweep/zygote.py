"""Starts the command line again and again without importing torch each time: a process that has all modules loaded, and forks.

Reads ``SECONDS POINT ARGUMENTS`` lines. SECONDS: the child is ended by the kernel after so long, wherever it is, without a word, as by
kill -9; 0 = never. POINT n: kill -9 at the n-th flush, rename or removal of a file, in the middle of a write; 0 = never. When the child
has ended, its exit code is printed and how many such points it came by.
"""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import bench.sweep.plan
import bench.sweep.run  # noqa: F401 - loaded here once
from bench.cli.main import main

points = mmap.mmap(-1, 8)  # shared with the children


def counted(function, kill_at):
    @functools.wraps(function)
    def call(*args, **kwargs):
        (seen,) = struct.unpack("q", points[:8])
        points[:8] = struct.pack("q", seen + 1)
        if seen + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


for line in sys.stdin:
    after_s, kill_at, *arguments = line.split()
    points[:8] = bytes(8)
    child = os.fork()
    if not child:
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        os.fsync = counted(os.fsync, int(kill_at))
        shutil.rmtree = counted(shutil.rmtree, int(kill_at))
        Path.rename = counted(Path.rename, int(kill_at))
        Path.replace = counted(Path.replace, int(kill_at))
        Path.unlink = counted(Path.unlink, int(kill_at))
        sys.argv = ["bench", *arguments]
        signal.setitimer(signal.ITIMER_REAL, float(after_s))  # nobody handles its signal
        try:
            main()
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), struct.unpack("q", points[:8])[0], flush=True)  # noqa: T201
