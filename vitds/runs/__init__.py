"""The run directory: metadata, lock, atomic save, named checkpoints, weights. Imports no DeepSpeed."""
