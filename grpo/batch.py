"""Dynamic sampling: a group without signal gives way to a group for another prompt.

Where all completions of a prompt earn the same there is nothing to tell them apart by. The more a policy has learned
the more groups are like that, and the fewer are left to average over. So they are replaced, in rounds, until every
group says something or enough is enough. What is thrown away was sampled all the same: it counts.

Paper: "DAPO" (2503.14476) section 3.2.
Differs from the paper:
  - a group is replaced in its place p of the P, by the group for sample p of the round, instead of sampling on until
    the batch is full; so what stands in a place depends on no other place, and a resumed run resamples alike
  - a group is without signal when its combined rewards are all alike, not when its answers are all right or all wrong
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from grpo.advantages import zero_variance_groups
from grpo.data import Sample
from grpo.errors import InputError
from grpo.rewards.scores import Scores
from grpo.rollout import Rollout


@dataclass(frozen=True)
class Groups:
    """P groups of G completions, row p * G + g: the sample of each, what was sampled, what it is worth."""

    samples: list[Sample]
    rollout: Rollout
    scores: Scores
    scale: Callable[[Tensor], Tensor] = lambda rewards: rewards  # the config's reward_scaling: (B,) -> (B,)

    def rewards(self, group_size: int) -> Tensor:
        """(P, G), scaled: what advantages are made from."""
        return self.scale(self.scores.combined).view(-1, group_size)

    def are_idle(self, group_size: int) -> Tensor:
        """(P,) bool: the rewards of the group are all alike."""
        return zero_variance_groups(self.rewards(group_size))

    def select(self, rows: Tensor) -> Self:
        """These rows alone, whole groups of them."""
        samples = [self.samples[row] for row in rows.tolist()]
        return type(self)(samples, self.rollout.select(rows), self.scores.select(rows), self.scale)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The groups of all parts, one after another."""
        return cls(
            [sample for part in parts for sample in part.samples],
            Rollout.cat([part.rollout for part in parts]),
            type(parts[0].scores).cat([part.scores for part in parts]),
            parts[0].scale,
        )


def replace_idle_groups(
    groups: Groups, group_size: int, max_rounds: int, sample_groups: Callable[[int, list[int]], Groups]
) -> tuple[Groups, list[Rollout]]:
    """At most `max_rounds` times, give the places whose group has no signal to new groups.

    Args:
        groups: P of them.
        max_rounds: 0 = leave everything as it is. What has no signal after the last round is kept.
        sample_groups: (round, places) -> one group for each of these places, in their order; round 1, 2, ...

    Returns:
        P groups again, and the rollouts that were thrown away.
    """
    discarded = []
    for round in range(1, max_rounds + 1):
        rows = torch.arange(len(groups.samples)).view(-1, group_size)  # (P, G)
        is_idle = groups.are_idle(group_size)  # (P,)
        if not is_idle.any():
            break
        discarded.append(groups.rollout.select(rows[is_idle].flatten()))
        others = sample_groups(round, is_idle.nonzero().flatten().tolist())
        rows[is_idle] = len(groups.samples) + torch.arange(len(others.samples)).view(-1, group_size)
        groups = Groups.cat([groups, others]).select(rows.flatten())
    return groups, discarded


def check_rewards_vary(
    groups: Groups, group_size: int, max_rounds: int, sample_groups: Callable[[int, list[int]], Groups]
) -> None:
    """Before training: resampling is in vain where no round finds a group whose rewards differ.

    Raises:
        InputError: neither `groups` nor as many for other prompts in each of the rounds have any signal.
    """
    places = list(range(len(groups.samples) // group_size))
    rounds = (groups if round == 0 else sample_groups(round, places) for round in range(1 + max_rounds))
    if all(candidates.are_idle(group_size).all() for candidates in rounds):
        raise InputError(
            f"max_resample_rounds: got {max_rounds}, but in none of {(1 + max_rounds) * len(places)} groups from the "
            f"base do the rewards ({', '.join(groups.scores.by_name)}) differ; allowed with such rewards: 0"
        )
