"""Batch: the samples of a step with their rollout and scores. Also dynamic sampling and the micro-batch plan.

Reading order: ... -> reward_model.py -> [grpo/batch.py] -> grpo/logprobs.py -> ...

Letters: P prompts, G completions per prompt, B = P * G rows (row p * G + g is completion g of prompt p), C padded
completion length. Lower-case letters are subsets: p of the P prompts, b of the B rows.
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
    """P groups of G completions: the prompts, the completions and their rewards."""

    samples: Sequence[Sample]  # P
    rollout: Rollout  # B rows
    scores: Scores  # B rows
    config: Config
    discarded: tuple[Rollout, ...] = ()  # groups that dynamic sampling replaced; num_tokens includes them

    @property
    def rewards(self) -> Tensor:
        """(P, G) the combined rewards after `reward_scaling` and `reward_clip`. Advantages are computed from these."""
        rewards = scaled(self.scores.combined, self.config.reward_scaling, self.config.reward_clip)  # (B,)
        return rewards.view(len(self.samples), -1).to(self.rollout.completion_ids.device)

    @property
    def zero_variance_groups(self) -> Tensor:
        """(P,) bool: all rewards of the group are equal."""
        return zero_variance_groups(self.rewards)

    @property
    def trained_tokens(self) -> Tensor:
        """(B, C) bool: the tokens included in the loss.

        These are all sampled tokens, EOS included. `mask_truncated_completions` excludes truncated completions.
        """
        if self.config.mask_truncated_completions:
            return self.rollout.completion_mask & ~self.rollout.is_truncated.unsqueeze(1)
        return self.rollout.completion_mask

    @property
    def row_samples(self) -> list[Sample]:
        """The sample of each completion, B in all."""
        return one_per_row(self.samples, self.rollout)

    def replace(self, places: Sequence[int], groups: Self) -> Self:
        """A copy of the batch with `groups` at `places`: p prompt numbers, in the order of `groups`."""
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

        Zero-variance groups are skipped if this does not change the gradient (`zero_variance_has_no_gradient`).
        """
        row_numbers = torch.arange(len(self.rollout.completions), device=self.rollout.completion_ids.device)  # (B,)
        minibatches = row_numbers.view(len(self.samples), -1).chunk(self.config.num_minibatches)  # (p, G) each
        if zero_variance_has_no_gradient(self.config):
            is_zero_variance = self.zero_variance_groups  # (P,)
            minibatches = tuple(without_zero_variance(groups, is_zero_variance) for groups in minibatches)
        limits = {"max_rows": self.config.micro_batch_size, "max_tokens": self.config.micro_batch_tokens}
        return [micro_batches(self.rollout, groups, **limits) for groups in minibatches]


def one_per_row(samples: Sequence[Sample], rollout: Rollout) -> list[Sample]:
    """Repeat each of P samples for the G completions of its group -> B samples. Row p * G + g has sample p."""
    group_size = len(rollout.completions) // len(samples)
    return [sample for sample in samples for _ in range(group_size)]


def zero_variance_has_no_gradient(config: Config) -> bool:
    """Whether a zero-variance group has a gradient of exactly 0.

    This holds if all of these are true:
      - the baseline is computed from the completions of the same group
      - advantages are not whitened over the batch
      - there is neither a KL penalty nor an entropy bonus
    """
    is_group_relative = config.advantage_baseline in ("group", "leave_one_out") and config.advantage_scale != "tokens"
    return is_group_relative and config.kl_coeff == 0 and config.entropy_coeff == 0


def without_zero_variance(rows: Tensor, is_zero_variance: Tensor) -> Tensor:
    """(p, G) row numbers of an optimizer step -> the row numbers without zero-variance groups.

    If every group has zero variance, one row is kept. Its gradient is exactly 0, but AdamW needs a gradient to apply
    momentum and weight decay. `is_zero_variance`: (P,) bool for all groups of the batch.
    """
    group_numbers = rows[:, 0] // rows.shape[1]  # (p,)
    chosen = rows[~is_zero_variance[group_numbers]]
    return chosen if len(chosen) else rows[:1, :1]


def micro_batches(rollout: Rollout, groups: Tensor, *, max_rows: int, max_tokens: int) -> list[Tensor]:
    """Split rows into micro-batches, one per forward and backward pass. Returns a list of row numbers, (b,) each.

    A micro-batch is padded to its longest row, so groups of similar length are put together. Completions of one prompt
    stay together unless their group alone is too large, because they can share the prompt's computation. The longest
    rows come first, so a micro-batch that does not fit into memory fails immediately.

    Args:
        groups: (q, G) row numbers; each row of the tensor is one group.
        max_rows: maximum completions per micro-batch.
        max_tokens: maximum tokens per micro-batch, prompts and padding included. A micro-batch has at least one
            completion, even if that completion is longer than max_tokens.
    """
    lengths = (rollout.prompt_mask.shape[1] + rollout.completion_mask.sum(1)).tolist()  # B lengths in tokens
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


SampleGroups = Callable[[int, int, Sequence[int]], Batch]  # (step, round, places) -> one group per place


def replace_zero_variance_groups(batch: Batch, step: int, sample_groups: SampleGroups) -> Batch:
    """Dynamic sampling: replace groups whose rewards are all equal by groups for other prompts.

    As the policy improves, more groups have only correct answers, and fewer groups contribute to the gradient. So [1],
    [2] and [3] are repeated for the places of zero-variance groups, at most `max_resample_rounds` times. Groups that
    still have zero variance after the last round are kept. Replaced groups count as sampled tokens (`Batch.discarded`).

    Args:
        batch: P groups.
        step: the training step. It determines the prompts and the noise of each round.
        sample_groups: performs [1] to [3] for some places: (step, round, places) -> a batch with one group per place.

    Returns:
        A batch of P groups.

    Paper: "DAPO" (2503.14476) section 3.2.
    Differs from the paper:
      - The group at place p is replaced by the group for sample p of the round; the paper samples more prompts until
        the batch is full. So no place depends on another place, and a resumed run resamples identically.
      - Zero variance means that all combined rewards are equal, not that all answers are correct or all are wrong.
    """
    for round in range(1, batch.config.max_resample_rounds + 1):
        places = batch.zero_variance_groups.nonzero().flatten().tolist()  # in 0 ... P - 1
        if not places:
            break
        batch = batch.replace(places, sample_groups(step, round, places))
    return batch


def check_rewards_vary(batch: Batch, step: int, sample_groups: SampleGroups) -> None:
    """Check before training that dynamic sampling can find at least one group whose rewards differ.

    Raises:
        InputError: every group of `batch` has zero variance, and so has every group of every resampling round.
    """
    places, max_rounds = range(len(batch.samples)), batch.config.max_resample_rounds
    rounds = (batch if round == 0 else sample_groups(step, round, places) for round in range(1 + max_rounds))
    if all(candidates.zero_variance_groups.all() for candidates in rounds):
        raise InputError(
            f"max_resample_rounds: got {max_rounds}, but in none of {(1 + max_rounds) * len(places)} groups from the "
            f"base do the rewards ({', '.join(batch.scores.by_name)}) differ; allowed with such rewards: 0"
        )
