"""The console that tables are printed to."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 132


def table_console() -> Console:
    """As wide as the terminal; into a pipe or a file, where nothing has to fit, wide enough for our tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)
