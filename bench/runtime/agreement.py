"""Have all processes failed in the same way? Asked without a collective, which would wait for ever if they have not."""

from __future__ import annotations

import datetime as dt

import torch.distributed as dist

WAIT_S = 5
"""For the slowest process to fail as well."""


def same_everywhere(text: str, *, name: str) -> bool:
    """Tell the other processes what went wrong here, and hear what went wrong there.

    An error that all processes raise at the same step, a method that cannot compute its loss for one, leaves them in step: as many
    collectives were begun by each. Told through the store that the processes met at.

    Args:
        text: the error, with the step.
        name: of the occasion; the same on all processes, never used again.

    Returns:
        Whether every process has told the same within `WAIT_S`.
    """
    if not dist.is_initialized():
        return False
    store, world_size = dist.distributed_c10d._get_default_store(), dist.get_world_size()  # noqa: SLF001 - there is no other way to it
    keys = [f"bench/failed/{name}/{rank}" for rank in range(world_size)]
    try:
        store.set(keys[dist.get_rank()], text)
        store.wait(keys, dt.timedelta(seconds=WAIT_S))
        return {store.get(key) for key in keys} == {text.encode()}
    except RuntimeError:  # not all have, or the process with the store is gone
        return False
