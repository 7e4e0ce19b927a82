"""Processes and devices: the engine, its strategies, interruption, what a run reports."""
