"""Evaluation: each sample exactly once, maps, metrics, statistics."""
