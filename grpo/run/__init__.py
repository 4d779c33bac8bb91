"""A training run: set-up, run folder, checkpoints, metrics, records, plots."""
