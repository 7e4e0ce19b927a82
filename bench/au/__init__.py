"""Action units: the codebook, and maps of where they lie in a face."""

from bench.au.codebook import (
    ACTION_UNITS,
    EXPRESSION_UNITS,
    REFERENCE_FRAME,
    VARIANTS,
    ActionUnit,
    Variant,
)
from bench.au.maps import GRID, AUMaps, action_unit_maps, expression_ids, unit_maps

__all__ = [
    "ACTION_UNITS",
    "EXPRESSION_UNITS",
    "GRID",
    "REFERENCE_FRAME",
    "VARIANTS",
    "AUMaps",
    "ActionUnit",
    "Variant",
    "action_unit_maps",
    "expression_ids",
    "unit_maps",
]
