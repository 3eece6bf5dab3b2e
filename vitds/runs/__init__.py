"""The run directory: names, metadata, lock, atomic save, named checkpoint, loading a backbone. Imports no DeepSpeed."""
