"""A run: set-up, run folder, checkpoints, metrics, records, pictures."""
