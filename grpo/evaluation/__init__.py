"""Evaluation: answers to held-out problems, statistics, reports, the pre-flight check of a run."""
