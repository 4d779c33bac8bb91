"""The reward functions, one file per kind."""
