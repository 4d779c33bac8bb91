"""Evaluation: greedy accuracy, statistics, the pre-flight check of a run."""
