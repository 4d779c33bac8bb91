"""Rewards -> group-relative advantages: how much better is a completion than the others for the same prompt?

Reading order: ... -> grpo/logprobs.py -> [grpo/advantages.py] -> grpo/loss.py -> ...

GRPO has no critic. The baseline is the mean reward of the G completions of one prompt (the group). A completion whose
reward is above this mean becomes more likely, and one below it less likely. Letters: P prompts, G completions per
prompt, B = P * G, C padded completion length.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BASELINES = ("group", "leave_one_out", "batch", "none")
SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, *, baseline: str = "group", scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantage of every completion: its reward minus a baseline, divided by a scale.

        baseline  group          mean of the prompt's G rewards                   GRPO, Dr. GRPO
                  leave_one_out  mean of the other G - 1: A = G/(G-1) (R - mean)  RLOO
                  batch          mean of all P * G rewards                        REINFORCE with a baseline
                  none           0                                                REINFORCE
        scale     group          std of the prompt's rewards + eps                GRPO
                  batch          std of all rewards + eps                         Lite PPO
                  none           1                                                Dr. GRPO, RLOO
                  (tokens        std over all tokens: `token_advantages`          REINFORCE++)

    Standard deviations are unbiased (n - 1). If all rewards of a group are equal (max - min <= 1e-6 * max(1, max|R|)),
    its advantages are exactly 0: rounding noise divided by a tiny std would not be a learning signal. A reward of NaN
    means "no reward applies": its advantage is 0, and it is excluded from every mean and std.

    Args:
        rewards: (P, G) floating point, in any unit; row p holds the rewards of prompt p. Not modified.
        baseline, scale: see the table above.
        eps: added to the standard deviation, in units of the reward.

    Returns:
        (P, G), with the dtype of `rewards`. With baseline group, each row sums to 0.

    Raises:
        ValueError: rewards are not (P, G); the baseline or scale is unknown; G = 1 with baseline group or
            leave_one_out; scale group with baseline batch or none.

    Paper: "DeepSeekMath" (2402.03300) section 4.1.2; "Understanding R1-Zero-Like Training" (2503.20783) for scale none;
    "Back to Basics" (2402.14740) for leave_one_out; "Lite PPO" (2508.08221) for scale batch.
    Differs from the paper: a zero-variance group gives exactly 0 instead of noise / eps. With scale batch, a
    batch whose rewards are all equal is not scaled.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    tensor([[ 1.1545, -0.5773, -0.5773],
            [ 0.0000,  0.0000,  0.0000]])
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected (P, G)")
    if baseline not in BASELINES:
        raise ValueError(f"baseline: got {baseline!r}, allowed: {', '.join(BASELINES)}")
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, allowed: {', '.join(SCALES)}")
    compares_siblings = baseline in ("group", "leave_one_out")
    if compares_siblings and rewards.shape[1] < 2:
        raise ValueError(f"group_size: got 1, but baseline {baseline} compares completions of one prompt: at least 2")
    if scale == "group" and not compares_siblings:
        raise ValueError(f"scale: got group with baseline {baseline}, allowed with it: batch, none")

    is_valid = ~rewards.isnan()  # (P, G)
    group = _statistics(rewards)  # each (P, 1)
    batch = _statistics(rewards.reshape(1, -1))  # each (1, 1)

    if baseline == "group":
        advantages = rewards - group.mean
    elif baseline == "leave_one_out":
        # R_i - (sum - R_i) / (n - 1) = n / (n - 1) * (R_i - mean)
        advantages = (rewards - group.mean) * group.num_valid / (group.num_valid - 1).clamp(min=1)
    elif baseline == "batch":
        advantages = torch.where(batch.is_constant, 0.0, rewards - batch.mean)
    else:
        advantages = rewards

    if scale == "group":
        advantages = advantages / (group.std + eps)
    elif scale == "batch":
        advantages = torch.where(batch.is_constant, advantages, advantages / (batch.std + eps))

    has_signal = is_valid & ~group.is_constant if compares_siblings else is_valid  # (P, G)
    return torch.where(has_signal, advantages, 0.0)  # (P, G)


def token_advantages(
    rewards: Tensor, penalties: Tensor, completion_mask: Tensor, *, baseline: str = "none", eps: float = 1e-4
) -> Tensor:
    """Advantage of every token: the reward minus the penalties of this and all later tokens, whitened over all tokens.

        A_t = R - baseline - sum over s >= t of penalties_s,     then (A - mean) / (std + eps)

    A token affects only what follows it. So its advantage includes the final reward and the KL penalty of this and
    later tokens, but not the KL penalty of earlier tokens. The mean and the unbiased std are over all unmasked tokens
    of the batch, so a long completion has more weight than a short one.

    Args:
        rewards: (P, G) as in `group_advantages`; NaN = no reward applies.
        penalties: (B, C) penalty per token, in units of the reward (kl_coeff times k1); 0 = no penalty.
        completion_mask: (B, C), 1 = a token that is trained on; row p * G + g is completion g of prompt p.
        baseline: none gives REINFORCE++, group gives its variant with a baseline; see `group_advantages`.
        eps: added to the standard deviation, in units of the reward.

    Returns:
        (B, C), exactly 0 where masked and where the reward is NaN.

    Paper: "REINFORCE++" (2501.03262) section 3.

    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> token_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.5], [0.0, 0.0]]), mask)
    tensor([[ 0.5772,  0.5772],
            [-1.1543,  0.0000]])
    """
    compared = group_advantages(rewards, baseline=baseline, scale="none").view(-1, 1)  # (B, 1)
    is_kept = completion_mask.bool() & ~rewards.isnan().view(-1, 1)  # (B, C)
    charges = torch.where(is_kept, penalties, 0.0)
    charges_to_come = charges.flip(1).cumsum(1).flip(1)  # (B, C)
    return whitened(compared - charges_to_come, is_kept, eps=eps)


def whitened(values: Tensor, mask: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(B, C) -> (B, C): mean 0 and unbiased std 1 over the kept entries, 0 elsewhere; all 0 if they are all equal."""
    is_kept = mask.bool()
    kept = _statistics(torch.where(is_kept, values, torch.nan).reshape(1, -1))  # each (1, 1)
    return torch.where(is_kept & ~kept.is_constant, (values - kept.mean) / (kept.std + eps), 0.0)


def compute_advantages(
    rewards: Tensor, penalties: Tensor | None, completion_mask: Tensor, *, baseline: str, scale: str
) -> Tensor:
    """The advantages of a step: `token_advantages` if the scale is tokens, else `group_advantages`.

    Tokens have penalties if the KL penalty is part of the reward. If a completion has a single advantage, the sum of
    its penalties is subtracted from its reward before the baseline is computed.

    Args:
        rewards: (P, G) as in `group_advantages`.
        penalties: (B, C) as in `token_advantages`; None = no penalties, as in GRPO.
        completion_mask: (B, C), 1 = a token that is trained on.
        baseline: group | leave_one_out | batch | none.
        scale: group | batch | none | tokens.

    Returns:
        (B, 1), one advantage per completion, used for all of its tokens; or (B, C) if the scale is tokens.

    >>> compute_advantages(torch.tensor([[1.0, 0.0]]), None, torch.ones(2, 3), baseline="group", scale="none")
    tensor([[ 0.5000],
            [-0.5000]])
    """
    if scale == "tokens":
        penalties = torch.zeros_like(completion_mask, dtype=rewards.dtype) if penalties is None else penalties
        return token_advantages(rewards, penalties, completion_mask, baseline=baseline)
    if penalties is not None:
        charges = torch.where(completion_mask.bool(), penalties, 0.0).sum(1)  # (B,)
        rewards = rewards - charges.view_as(rewards)
    return group_advantages(rewards, baseline=baseline, scale=scale).view(-1, 1)


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """(P, G) -> (P,) bool: the group has fewer than two valid rewards, or all its valid rewards are equal."""
    return _statistics(rewards).is_constant.squeeze(-1)


class _Statistics(NamedTuple):
    """Statistics of the valid rewards along the last dimension; each (rows, 1)."""

    num_valid: Tensor
    mean: Tensor
    std: Tensor  # unbiased
    is_constant: Tensor  # fewer than two valid rewards, or all equal up to rounding


def _statistics(rewards: Tensor) -> _Statistics:
    is_valid = ~rewards.isnan()
    values = torch.where(is_valid, rewards, 0.0)
    num_valid = is_valid.sum(-1, keepdim=True)
    mean = values.sum(-1, keepdim=True) / num_valid.clamp(min=1)
    squares = torch.where(is_valid, rewards - mean, 0.0).square()
    std = (squares.sum(-1, keepdim=True) / (num_valid - 1).clamp(min=1)).sqrt()
    highest = torch.where(is_valid, rewards, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(is_valid, rewards, torch.inf).amin(-1, keepdim=True)
    is_constant = (num_valid < 2) | (highest - lowest <= 1e-6 * values.abs().amax(-1, keepdim=True).clamp(min=1))
    return _Statistics(num_valid, mean, std, is_constant)
