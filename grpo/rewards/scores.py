"""Scores of completions: the values of all rewards, how they are combined into one, and how that one is scaled.

    combine: sum      sum of weight * value
             mean     sum of weight * value / sum of weight
             product  product of weight * value

Only the rewards that apply to the completion and whose weight is not 0 are combined; NaN if there are none.

    reward_scaling: identity     the combined reward R
                    standardize  (R - mean) / (std + 1e-4) over the completions of the step; 0 if all are equal
                    clip         R clipped to [-reward_clip, reward_clip]

Advantages are computed from the scaled rewards. Metrics, samples and evaluations show the combined reward.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """The rewards of B completions; NaN = not applicable."""

    by_name: dict[str, Tensor]  # the values of each reward, (B,) each
    combined: Tensor  # (B,)
    is_correct: Tensor  # (B,) 1.0 if the first reward gives its full mark, else 0.0
    has_answer: Tensor  # (B,) bool: according to the first reward there is an answer to judge
    is_correct_leniently: Tensor  # (B,) 1.0 or 0.0; NaN if the first reward has no `is_correct_leniently`
    token_rewards: Tensor | None = None  # (B, C), only if requested; rows add up to `combined`, or to 0 if it is NaN

    def select(self, rows: Tensor) -> Self:
        """The scores of some completions. `rows`: (b,) row numbers."""
        rows = rows.cpu()
        return type(self)(
            by_name={name: values[rows] for name, values in self.by_name.items()},
            combined=self.combined[rows],
            is_correct=self.is_correct[rows],
            has_answer=self.has_answer[rows],
            is_correct_leniently=self.is_correct_leniently[rows],
            token_rewards=None if self.token_rewards is None else self.token_rewards[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The scores of all completions of `parts`, in order; without token rewards, because C may differ."""
        return cls(
            by_name={name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
            combined=torch.cat([part.combined for part in parts]),
            is_correct=torch.cat([part.is_correct for part in parts]),
            has_answer=torch.cat([part.has_answer for part in parts]),
            is_correct_leniently=torch.cat([part.is_correct_leniently for part in parts]),
        )

    def with_names(self, names: Iterable[str]) -> Self:
        """The same scores with the rewards `names`. Rewards that are missing here do not apply, so they are NaN."""
        not_applicable = torch.full_like(self.combined, torch.nan)
        return dataclasses.replace(self, by_name={name: self.by_name.get(name, not_applicable) for name in names})

    def metrics(self) -> dict[str, float]:
        """Mean and unbiased standard deviation over the batch, of the combined reward and of each reward."""
        row = {"reward": self.combined.nanmean().item(), "reward_std": nan_std(self.combined)}
        for name, values in self.by_name.items():
            row |= {f"rewards/{name}/mean": values.nanmean().item(), f"rewards/{name}/std": nan_std(values)}
        return row


def nan_std(values: Tensor) -> float:
    """Unbiased standard deviation of the values that are not NaN; 0.0 for fewer than two."""
    valid = values[~values.isnan()]
    return valid.std().item() if len(valid) > 1 else 0.0


# combine -> function of terms = weight * value, weights and applies, each (F, B), to the combined reward (B,)
COMBINE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": lambda terms, weights, applies: torch.where(applies, terms, 0.0).sum(0),
    "mean": lambda terms, weights, applies: (
        torch.where(applies, terms, 0.0).sum(0) / torch.where(applies, weights, 0.0).sum(0)
    ),
    "product": lambda terms, weights, applies: torch.where(applies, terms, 1.0).prod(0),
}


def combined(values: Tensor, weights: Tensor, how: str = "sum") -> Tensor:
    """Combine the values of F rewards into one reward per completion.

    Args:
        values: (F, B), NaN = not applicable.
        weights: (F,).
        how: sum, mean or product.

    Returns:
        (B,), NaN where no reward with a non-zero weight applies.

    >>> values = torch.tensor([[1.0, 0.5, 1.0], [0.5, torch.nan, 0.0]])
    >>> [combined(values, torch.tensor([1.0, 3.0]), how).tolist() for how in ("sum", "mean", "product")]
    [[2.5, 0.5, 1.0], [0.625, 0.5, 0.25], [1.5, 0.5, 0.0]]
    """
    weights = weights.unsqueeze(1)  # (F, 1)
    applies = ~values.isnan() & (weights != 0)  # (F, B)
    return COMBINE[how](weights * values, weights, applies).masked_fill(~applies.any(0), torch.nan)


SCALINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda rewards, bound: rewards,
    "standardize": lambda rewards, bound: standardized(rewards),
    "clip": lambda rewards, bound: rewards.clamp(-bound, bound),
}


def scaled(rewards: Tensor, scaling: str, bound: float | None = None) -> Tensor:
    """Scale combined rewards before advantages are computed; (B,) -> (B,), NaN stays NaN. `bound`: only for clip."""
    return SCALINGS[scaling](rewards, math.inf if bound is None else bound)


def standardized(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Shift and scale to mean 0 and an unbiased standard deviation of about 1; NaN is ignored and stays NaN.

    >>> standardized(torch.tensor([1.0, 3.0, torch.nan])), standardized(torch.full((7,), 0.95))[0]
    (tensor([-0.7071,  0.7071,     nan]), tensor(0.))
    """
    valid = rewards[~rewards.isnan()]
    if len(valid) == 0 or valid.max() - valid.min() <= 1e-6 * max(1.0, valid.abs().max().item()):
        return rewards.masked_fill(~rewards.isnan(), 0.0)  # else rounding errors would be divided by a tiny std
    return (rewards - valid.mean()) / (nan_std(rewards) + eps)
