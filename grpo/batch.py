"""Batch: the samples of a step, their rollout and its scores. Dynamic sampling, and the plan of micro-batches.

Reading order: ... -> reward_model.py -> [grpo/batch.py] -> grpo/logprobs.py -> ...

Letters: P prompts, G completions per prompt, B = P * G rows (row p * G + g is completion g of prompt p), C padded
completion length. Lower case letters are a part of them: p of the P prompts, b of the B rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from grpo.advantages import zero_variance_groups
from grpo.data import Sample
from grpo.errors import InputError
from grpo.rewards.scores import Scores, scaled
from grpo.rollout import Rollout
from grpo.settings.config import Config


@dataclass(frozen=True)
class Batch:
    """P groups of G completions: the prompts, what was sampled for them, and what it is worth."""

    samples: Sequence[Sample]  # P
    rollout: Rollout  # B rows
    scores: Scores  # B rows
    config: Config
    discarded: tuple[Rollout, ...] = ()  # groups that dynamic sampling replaced; num_tokens counts them, too

    @property
    def rewards(self) -> Tensor:
        """(P, G) the combined rewards, transformed as `reward_scaling` says: what advantages are computed from."""
        rewards = scaled(self.scores.combined, self.config.reward_scaling, self.config.reward_clip)  # (B,)
        return rewards.view(len(self.samples), -1).to(self.rollout.completion_ids.device)

    @property
    def zero_variance_groups(self) -> Tensor:
        """(P,) bool: the rewards of the group are all equal, so there is nothing to tell its completions apart by."""
        return zero_variance_groups(self.rewards)

    @property
    def trained_tokens(self) -> Tensor:
        """(B, C) bool: the tokens that the loss counts.

        All sampled tokens, EOS included. `mask_truncated_completions` leaves out completions that were cut off.
        """
        if self.config.mask_truncated_completions:
            return self.rollout.completion_mask & ~self.rollout.is_truncated.unsqueeze(1)
        return self.rollout.completion_mask

    @property
    def row_samples(self) -> list[Sample]:
        """B of them: the sample of each completion."""
        return one_per_row(self.samples, self.rollout)

    def replace(self, places: Sequence[int], groups: Self) -> Self:
        """The same batch with `groups` in these places: (p,) numbers of prompts, in the order of `groups`."""
        num_groups, group_size = len(self.samples), len(self.rollout.completions) // len(self.samples)
        rows = torch.arange(num_groups * group_size).view(num_groups, group_size)  # (P, G)
        replaced = rows[list(places)].flatten()
        rows[list(places)] = rows.numel() + torch.arange(len(places) * group_size).view(-1, group_size)
        samples = list(self.samples)
        for place, sample in zip(places, groups.samples, strict=True):
            samples[place] = sample
        return dataclasses.replace(
            self,
            samples=samples,
            rollout=Rollout.cat([self.rollout, groups.rollout]).select(rows.flatten()),
            scores=type(self.scores).cat([self.scores, groups.scores]).select(rows.flatten()),
            discarded=(*self.discarded, self.rollout.select(replaced)),
        )

    def plan_micro_batches(self) -> list[list[Tensor]]:
        """For each optimizer step of one pass over the batch, the row numbers (b,) of its micro-batches.

        Zero-variance groups are left out if that changes no gradient (`zero_variance_has_no_gradient`).
        """
        row_numbers = torch.arange(len(self.rollout.completions), device=self.rollout.completion_ids.device)  # (B,)
        minibatches = row_numbers.view(len(self.samples), -1).chunk(self.config.num_minibatches)  # (p, G) each
        if zero_variance_has_no_gradient(self.config):
            is_zero_variance = self.zero_variance_groups  # (P,)
            minibatches = tuple(without_zero_variance(groups, is_zero_variance) for groups in minibatches)
        limits = {"max_rows": self.config.micro_batch_size, "max_tokens": self.config.micro_batch_tokens}
        return [micro_batches(self.rollout, groups, **limits) for groups in minibatches]


def one_per_row(samples: Sequence[Sample], rollout: Rollout) -> list[Sample]:
    """P samples -> B of them, each repeated for the completions of its group: row p * G + g has sample p."""
    group_size = len(rollout.completions) // len(samples)
    return [sample for sample in samples for _ in range(group_size)]


def zero_variance_has_no_gradient(config: Config) -> bool:
    """Whether a zero-variance group has a gradient of exactly 0.

    That is so if its own siblings are the baseline, advantages are not whitened over the batch, and neither a KL nor an
    entropy bonus acts on its tokens.
    """
    is_group_relative = config.advantage_baseline in ("group", "leave_one_out") and config.advantage_scale != "tokens"
    return is_group_relative and config.kl_coeff == 0 and config.entropy_coeff == 0


def without_zero_variance(rows: Tensor, is_zero_variance: Tensor) -> Tensor:
    """(p, G) row numbers of an optimizer step -> those of the groups that have something to learn from.

    If there is none, a single row stays. Its gradient is exactly 0, but it exists: without a gradient AdamW would not
    step, and neither its momentum nor its weight decay would act. `is_zero_variance`: (P,), of all groups.
    """
    group_numbers = rows[:, 0] // rows.shape[1]  # (p,)
    chosen = rows[~is_zero_variance[group_numbers]]
    return chosen if len(chosen) else rows[:1, :1]


def micro_batches(rollout: Rollout, groups: Tensor, *, max_rows: int, max_tokens: int) -> list[Tensor]:
    """Row numbers for one forward and backward pass at a time, (b,) each.

    A batch is padded to its longest row, so groups of similar length are put together. Siblings share a prompt, so they
    are split only if a group alone is too large. The longest come first: what does not fit into memory fails at once.

    Args:
        groups: (q, G) row numbers, siblings side by side.
        max_rows, max_tokens: at most this many completions, and this many tokens, each completion padded and counted
            with its prompt; but at least one completion.
    """
    lengths = (rollout.prompt_mask.shape[1] + rollout.completion_mask.sum(1)).tolist()  # B of them
    batches: list[list[int]] = []
    width = 0
    for group in sorted(groups.tolist(), key=lambda group: -max(lengths[row] for row in group)):
        group.sort(key=lambda row: -lengths[row])
        fitting = min(max_rows, max(max_tokens // lengths[group[0]], 1))
        for siblings in (group[start : start + fitting] for start in range(0, len(group), fitting)):
            num_rows = len(batches[-1]) + len(siblings) if batches else 0
            width = max(width, lengths[siblings[0]])
            if 0 < num_rows <= max_rows and num_rows * width <= max_tokens:
                batches[-1] += siblings
            else:
                batches.append(siblings)
                width = lengths[siblings[0]]
    return [torch.tensor(batch, device=groups.device) for batch in batches]


SampleGroups = Callable[[int, int, Sequence[int]], Batch]  # (step, round, places) -> one group for each place


def replace_zero_variance_groups(batch: Batch, step: int, sample_groups: SampleGroups) -> Batch:
    """Dynamic sampling: groups whose rewards are all equal are replaced by groups for other prompts.

    The more a policy has learned, the more groups are all correct, and the fewer are left to average over. So [1], [2]
    and [3] are repeated for the places of such groups, at most `max_resample_rounds` times. Groups that still have zero
    variance after the last round are kept. Replaced groups were sampled all the same: they count (`Batch.discarded`).

    Args:
        batch: P groups.
        step: the training step, from which the prompts and the noise of round 1, 2, ... follow.
        sample_groups: [1] to [3] for some places: (step, round, places) -> a batch with one group for each place.

    Returns:
        P groups again.

    Paper: "DAPO" (2503.14476) section 3.2.
    Differs from the paper: a group is replaced in its place p of the P, by the group for sample p of the round, instead
    of sampling on until the batch is full. So a place depends on no other place, and a resumed run resamples alike. And
    zero variance means that the combined rewards are equal, not that all answers are correct or all are wrong.
    """
    for round in range(1, batch.config.max_resample_rounds + 1):
        places = batch.zero_variance_groups.nonzero().flatten().tolist()  # of the P
        if not places:
            break
        batch = batch.replace(places, sample_groups(step, round, places))
    return batch


def check_rewards_vary(batch: Batch, step: int, sample_groups: SampleGroups) -> None:
    """Before training: dynamic sampling is pointless if no round finds a group whose rewards differ.

    Raises:
        InputError: every group of `batch`, and of as many groups for other prompts in each round, has zero variance.
    """
    places, max_rounds = range(len(batch.samples)), batch.config.max_resample_rounds
    rounds = (batch if round == 0 else sample_groups(step, round, places) for round in range(1 + max_rounds))
    if all(candidates.zero_variance_groups.all() for candidates in rounds):
        raise InputError(
            f"max_resample_rounds: got {max_rounds}, but in none of {(1 + max_rounds) * len(places)} groups from the "
            f"base do the rewards ({', '.join(batch.scores.by_name)}) differ; allowed with such rewards: 0"
        )
