"""What an earlier shell or another program left in the environment, and what of it could change a result."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping

READ_BY_ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""Beginnings of the names that Accelerate reads, several of them even where the caller says otherwise (gradient accumulation)."""
HARMLESS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "false",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "false",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_CPU_AFFINITY": "0",
    "ACCELERATE_DEBUG_MODE": "false",
}
"""What ``accelerate launch`` sets where nothing else is asked of it: the same as without."""
SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.accumulate",
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    "ACCELERATE_USE_DEEPSPEED": "train.engine",
    "ACCELERATE_GRADIENT_CLIPPING": "train.clip_norm",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "train.zero_stage",
}
"""Which setting says here what these say there."""
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ARITHMETIC = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Variables by which libraries below PyTorch compute otherwise: they are left as they are, and records name those that are set."""

_log = logging.getLogger(__name__)


def forget_leftovers(environ: MutableMapping[str, str] = os.environ) -> None:
    """Remove what Accelerate would heed: the settings of a run say all that it needs. A warning names what would have changed something.

    The remains of a world of one process, without the address to meet at, are removed too: it is a process alone.
    """
    heard = environ.get("RANK", "0") == "0"
    for name in [name for name in environ if name.startswith(READ_BY_ACCELERATE)]:
        value = environ.pop(name)
        if heard and value.strip().lower() != HARMLESS.get(name, ""):
            instead = f"; say --set {SETTINGS[name]}=..." if name in SETTINGS else ""
            _log.warning("%s=%s in the environment is not heeded%s", name, value, instead)
    if environ.get("WORLD_SIZE", "1") == "1" and not environ.get("MASTER_ADDR"):
        for name in WORLD:
            environ.pop(name, None)


def arithmetic(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Those of `ARITHMETIC` that are set."""
    return {name: environ[name] for name in ARITHMETIC if environ.get(name)}
