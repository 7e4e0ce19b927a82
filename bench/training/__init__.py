"""Training: the module with its losses, the optimiser, checkpoints, the engine."""
