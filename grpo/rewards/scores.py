"""What completions are worth: the values of several rewards, how they combine into one, and how that is scaled.

    combined = sum      sum of weight * value                          over the rewards that apply to the completion
               mean     sum of weight * value / sum of weight          and have a weight that is not 0;
               product  product of weight * value                      NaN where there are none
    scaled   = identity     the combined reward
               standardize  (R - mean) / (std + 1e-4) over the step's completions; 0 where they are all alike
               clip         cut to [-reward_clip, reward_clip]

Scaling is what advantages are made from; metrics, samples and evaluations show the combined reward itself.
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

    by_name: dict[str, Tensor]  # each (B,)
    combined: Tensor  # (B,) of the applicable rewards of non-zero weight: see above
    is_correct: Tensor  # (B,) 1.0 right, 0.0 wrong: the first reward of the list gives its full mark
    has_answer: Tensor  # (B,) bool: there is something to be right or wrong about
    is_correct_leniently: Tensor  # (B,) 1.0, 0.0, or NaN where the first reward knows no lenient way
    token_rewards: Tensor | None = None  # (B, C) where asked for, under combine sum: it is a row's sum, or 0

    def select(self, rows: Tensor) -> Self:
        """The scores of these completions alone. `rows`: (b,) indices."""
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
        """The scores of all completions of `parts`, one after another, without token rewards: C may differ."""
        return cls(
            by_name={name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
            combined=torch.cat([part.combined for part in parts]),
            is_correct=torch.cat([part.is_correct for part in parts]),
            has_answer=torch.cat([part.has_answer for part in parts]),
            is_correct_leniently=torch.cat([part.is_correct_leniently for part in parts]),
        )

    def with_names(self, names: Iterable[str]) -> Self:
        """The same with NaN for the rewards among `names` that it has not got: they do not apply."""
        nothing = torch.full_like(self.combined, torch.nan)
        return dataclasses.replace(self, by_name={name: self.by_name.get(name, nothing) for name in names})

    def metrics(self) -> dict[str, float]:
        """Means and unbiased standard deviations over the batch, of the combined reward and of each one."""
        row = {"reward": self.combined.nanmean().item(), "reward_std": nan_std(self.combined)}
        for name, values in self.by_name.items():
            row |= {f"rewards/{name}/mean": values.nanmean().item(), f"rewards/{name}/std": nan_std(values)}
        return row


def nan_std(values: Tensor) -> float:
    """Unbiased standard deviation of the values that are not NaN; 0.0 for fewer than two."""
    valid = values[~values.isnan()]
    return valid.std().item() if len(valid) > 1 else 0.0


# How rewards combine: terms = weight * value and weights, each (F, B), with `applies` -> (B,)
COMBINE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": lambda terms, weights, applies: torch.where(applies, terms, 0.0).sum(0),
    "mean": lambda terms, weights, applies: (
        torch.where(applies, terms, 0.0).sum(0) / torch.where(applies, weights, 0.0).sum(0)
    ),
    "product": lambda terms, weights, applies: torch.where(applies, terms, 1.0).prod(0),
}


def combined(values: Tensor, weights: Tensor, how: str = "sum") -> Tensor:
    """One reward a completion. `values`: (F, B), NaN = not applicable; `weights`: (F,). Returns (B,).

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
    """Combined rewards as the advantages see them; (B,), NaN stays NaN. `bound` is that of clip."""
    return SCALINGS[scaling](rewards, math.inf if bound is None else bound)


def standardized(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Mean 0 and an unbiased standard deviation of about 1 over those that are not NaN.

    >>> standardized(torch.tensor([1.0, 3.0, torch.nan])), standardized(torch.full((7,), 0.95))[0]
    (tensor([-0.7071,  0.7071,     nan]), tensor(0.))
    """
    valid = rewards[~rewards.isnan()]
    if len(valid) == 0 or valid.max() - valid.min() <= 1e-6 * max(1.0, valid.abs().max().item()):
        return rewards.masked_fill(~rewards.isnan(), 0.0)  # rounding, divided by a tiny std, would be no signal
    return (rewards - valid.mean()) / (nan_std(rewards) + eps)
