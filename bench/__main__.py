"""``python -m bench``, for launchers that want a module."""

from bench.cli.main import main

main()
