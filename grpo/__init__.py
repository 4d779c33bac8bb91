"""GRPO by hand: one idea a file. Start with train_grpo.py, which uses them all."""
