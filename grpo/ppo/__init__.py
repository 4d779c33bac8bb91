"""What PPO needs and GRPO does without: the critic and its advantages."""
