"""Optional measures of maps, chosen with ``--metrics``: see docs/metrics.md."""

from bench.evaluation.measures.base import Column, Explained, Measure
from bench.evaluation.measures.measuring import COLUMNS, MEASURES, NO_MEASURES, Choice, Measuring, choice_of

__all__ = ["COLUMNS", "MEASURES", "NO_MEASURES", "Choice", "Column", "Explained", "Measure", "Measuring", "choice_of"]
