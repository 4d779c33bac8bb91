"""The parts of PPO that GRPO does not need: the critic and generalized advantage estimation."""
