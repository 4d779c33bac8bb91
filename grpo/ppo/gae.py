"""Rewards and values per token -> advantages: how much better was the result than the critic expected?

Reading order: examples/train_ppo.py -> grpo/ppo/critic.py -> [grpo/ppo/gae.py] -> examples/train_ppo.py again

GRPO uses the mean reward of the group as the baseline instead. Letters: B completions, C padded completion length.
"""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: the advantage of every token, and the return that its value should predict.

        delta_t  = r_t + gamma * V_{t+1} - V_t              V_t: value of the text before token t
        A_t      = sum over k >= 0 of (gamma * gae_lambda)^k * delta_{t+k}
        return_t = A_t + V_t

    gae_lambda 1 uses full returns: A_t = (discounted sum of the rewards) - V_t, unbiased but with high variance.
    gae_lambda 0 uses one-step TD: A_t = delta_t, with low variance but biased by the errors of the critic.

    V is 0 after the last token, also if the completion was truncated. max_completion_length is part of the task, so
    rewards that a longer completion could have earned do not count. TRL did the same.

    Args:
        rewards: (B, C) reward of each token: the completion's reward at its last token, minus the KL penalty per token.
        values: (B, C) values of the critic at rollout time.
        completion_mask: (B, C) right-padded, 1 = a sampled token, EOS included. Masked entries may hold any value.
        gamma: discount, in (0, 1]; 1 is usual for texts.
        gae_lambda: in [0, 1].

    Returns:
        advantages, returns: (B, C), 0 where masked; no gradient, because both are targets.

    Paper: "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (1506.02438) eq. 11-16;
    "Proximal Policy Optimization Algorithms" (1707.06347) eq. 11.

    >>> mask = torch.tensor([[1, 1, 0]])
    >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.6, 9.0]])
    >>> generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    (tensor([[0.3000, 0.4000, 0.0000]]), tensor([[0.8000, 1.0000, 0.0000]]))
    """
    is_token = completion_mask.bool()
    # Rewards and values of padding are 0, so all of its deltas are 0 and the sums begin at the last token.
    rewards = torch.where(is_token, rewards, 0.0).detach()
    values = torch.where(is_token, values, 0.0).detach()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,) of token t + 1
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values
