"""The command that installs what an optional part of bench needs."""

from __future__ import annotations

import importlib.metadata
import shlex

from packaging.requirements import Requirement

DISTRIBUTION = "fer-cam-bench"
"""What is installed; the import package is called ``bench``."""


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra, for messages.

    It names the packages themselves: so it works from a checkout and from an install, wherever bench itself came from.

    Args:
        extra: name of an extra of our distribution.
    """
    requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    wanted = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})]
    assert wanted, f"{DISTRIBUTION} has no extra {extra}"
    return " ".join(["pip install", *(shlex.quote(_without_marker(requirement)) for requirement in wanted)])


def _without_marker(requirement: Requirement) -> str:
    bare = Requirement(str(requirement))
    bare.marker = None
    return str(bare)
