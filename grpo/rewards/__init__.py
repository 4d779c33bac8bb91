"""Rewards: what a reward function is, calling and combining them, and the library. reward_model.py has the table."""
