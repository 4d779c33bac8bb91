"""Rewards and values of tokens -> advantages: how much better did it go on than the critic expected?

Reading order: examples/train_ppo.py -> grpo/ppo/critic.py -> [grpo/ppo/gae.py] -> examples/train_ppo.py again

In its place GRPO puts the mean of a group. Letters: B completions, C padded completion length.
"""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: of every token its advantage, and the return its value should have been.

        delta_t  = r_t + gamma * V_{t+1} - V_t              V_t: value of the text before token t
        A_t      = sum over k >= 0 of (gamma * gae_lambda)^k * delta_{t+k}
        return_t = A_t + V_t

    gae_lambda 1 believes the rewards (A_t = what came - V_t: unbiased, noisy), 0 believes the critic (A_t = delta_t:
    biased by its errors, calm).

    After the last token V is 0, also where the completion was cut off: max_completion_length is a rule of the task, not
    a clock that interrupts it, so what the text would have earned later is worth nothing. TRL did the same.

    Args:
        rewards: (B, C) what each token earned: the completion's reward on its last one, less what its KL costs.
        values: (B, C) of the critic at rollout time.
        completion_mask: (B, C) right-padded, 1 = a sampled token, EOS included. Other entries may hold anything.
        gamma: discount, in (0, 1]; 1 is usual for texts.
        gae_lambda: in [0, 1].

    Returns:
        advantages, returns: (B, C), 0 where masked, without gradient: both are targets.

    Paper: "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (1506.02438) eq. 11-16;
    "Proximal Policy Optimization Algorithms" (1707.06347) eq. 11.

    >>> mask = torch.tensor([[1, 1, 0]])
    >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.6, 9.0]])
    >>> generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    (tensor([[0.3000, 0.4000, 0.0000]]), tensor([[0.8000, 1.0000, 0.0000]]))
    """
    is_token = completion_mask.bool()
    # Padding earns nothing and is worth nothing, so all of its deltas are 0 and the sums begin with the last token.
    rewards = torch.where(is_token, rewards, 0.0).detach()
    values = torch.where(is_token, values, 0.0).detach()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,) of token t + 1
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values
