"""Rewards -> group-relative advantages: how much better was this completion than its siblings?

Reading order: ... -> grpo/logprobs.py -> [grpo/advantages.py] -> grpo/loss.py -> ...

GRPO has no critic. The G completions of one prompt are each other's baseline: a completion is reinforced by how far
its reward lies above the mean of its group. Letters: P prompts, G completions each, B = P * G, C padded completion
length.
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

    Standard deviations are unbiased (n - 1). A zero-variance group teaches nothing: where all its rewards agree
    (max - min <= 1e-6 * max(1, max|R|)) its advantages are exactly 0, because rounding noise divided by a tiny std is
    not a signal. Rewards that are NaN ("no reward applies") get advantage 0 and count in no mean and no std.

    Args:
        rewards: (P, G) floating point, any unit; row p holds the completions of prompt p. Not modified.
        baseline, scale: see above.
        eps: added to the standard deviation, in units of the reward.

    Returns:
        (P, G), the dtype of `rewards`. With baseline group, each row sums to 0.

    Raises:
        ValueError: rewards are not (P, G); an unknown baseline or scale; G = 1 with a baseline that compares
            siblings; scale group with a baseline that does not.

    Paper: "DeepSeekMath" (2402.03300) section 4.1.2; "Understanding R1-Zero-Like Training" (2503.20783) for scale none;
    "Back to Basics" (2402.14740) for leave_one_out; "Lite PPO" (2508.08221) for scale batch.
    Differs from the paper: a zero-variance group gives exactly 0 instead of noise / eps; a batch without spread is
    left unscaled.

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
    """Advantage of every token: the reward minus the penalties of this and later tokens, whitened over all tokens.

        A_t = R - baseline - sum over s >= t of penalties_s,     then (A - mean) / (std + eps)

    A token is credited with what follows it: the reward at the end, and the KL of itself and of later tokens, but not
    with the KL of earlier tokens. Mean and unbiased std are taken over all unmasked tokens of the batch, so a long
    completion counts more.

    Args:
        rewards: (P, G) as in `group_advantages`; NaN = no reward applies.
        penalties: (B, C) what each token costs, in units of the reward: kl_coeff times k1; 0 = nothing.
        completion_mask: (B, C), 1 = a token that is trained on; row p * G + g is completion g of prompt p.
        baseline: none is REINFORCE++, group its variant with a baseline; see `group_advantages`.
        eps: added to the standard deviation.

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
    """(B, C) -> (B, C): mean 0 and unbiased std 1 over the kept entries, 0 elsewhere; all 0 if they are all alike."""
    is_kept = mask.bool()
    kept = _statistics(torch.where(is_kept, values, torch.nan).reshape(1, -1))  # each (1, 1)
    return torch.where(is_kept & ~kept.is_constant, (values - kept.mean) / (kept.std + eps), 0.0)


def compute_advantages(
    rewards: Tensor, penalties: Tensor | None, completion_mask: Tensor, *, baseline: str, scale: str
) -> Tensor:
    """The advantages of a step: `group_advantages`, or `token_advantages` if the scale is tokens.

    Tokens cost something if the KL is part of the reward. A completion that has one advantage is charged the sum of
    its penalties before it is compared with its siblings.

    Args:
        rewards: (P, G) as in `group_advantages`.
        penalties: (B, C) as in `token_advantages`; None = no token costs anything, as in GRPO.
        completion_mask: (B, C), 1 = a token that is trained on.
        baseline: group | leave_one_out | batch | none.
        scale: group | batch | none | tokens.

    Returns:
        (B, 1): one advantage per completion, the same for all of its tokens; (B, C) if the scale is tokens.

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
    """(P, G) -> (P,) bool: fewer than two valid rewards, or all alike; such a group has nothing to compare."""
    return _statistics(rewards).is_constant.squeeze(-1)


class _Statistics(NamedTuple):
    """Of the valid rewards along the last dimension; each (rows, 1)."""

    num_valid: Tensor
    mean: Tensor
    std: Tensor  # unbiased
    is_constant: Tensor  # fewer than two rewards, or no spread beyond rounding


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
