"""Score completions: call every reward function, check its values and combine them into `Scores`.

In a mixture of datasets, each completion is scored only by the rewards of its own dataset.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.data import SOURCE
from grpo.errors import InputError
from grpo.rewards.base import RewardValue
from grpo.rewards.calls import RewardError, call, call_attribute, describe, short
from grpo.rewards.loading import Reward, RewardsOf, required_columns
from grpo.rewards.scores import Scores, combined


def check_samples(rewards: Sequence[Reward], samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """Check that the rewards can score every sample. `place(i)` is the file and line of sample i.

    Raises:
        InputError: a sample lacks a column, or a reward's `check_sample` refuses it.
    """
    for reward in rewards:
        columns = sorted(required_columns(reward))
        for index, sample in enumerate(samples):
            for column in columns:
                if column not in sample:
                    raise InputError(f'{place(index)}: has no "{column}", which reward {reward.name} needs')
            try:
                reward.check_sample(sample)
            except ValueError as error:
                raise InputError(f"{place(index)}: reward {reward.name}: {error}") from error
            except (Exception, SystemExit) as error:
                what = f"its attribute check_sample raised {describe(error)}"
                raise InputError(f"{place(index)}: reward {reward.name}: {what}") from error


def score_completions(
    rewards: Sequence[Reward],
    samples: Sequence[dict[str, Any]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    combine: str = "sum",
    per_token: bool = False,
) -> Scores:
    """Score B completions with every reward.

    Args:
        samples: B, the sample that each completion answers.
        completions: B texts.
        completion_ids: B lists of token ids, the stop token included.
        combine: how the rewards combine: sum, mean or product, see grpo/rewards/scores.py.
        per_token: a value may also be a list with one float per token (only with sum). The scores then have
            `token_rewards`, which add up to the combined reward; a reward for a completion as a whole goes to its last
            token.

    Raises:
        RewardError: a function raised an error, or returned the wrong number of values, or a value that is neither a
            finite number nor None, or a list that is not allowed or not as long as the completion. The message names
            the reward and, if possible, the sample.
    """
    private = ("prompt", "prompt_ids", SOURCE)
    keys = {key for sample in samples for key in sample if key not in private}  # all keys: rows may differ
    columns = {key: [sample.get(key) for sample in samples] for key in sorted(keys)}
    prompts = [sample["prompt"] for sample in samples]
    formatted = [_in_form_of(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    given = {"prompts": prompts, "completions": formatted, "completion_ids": completion_ids, **columns}
    lengths = [len(ids) for ids in completion_ids]  # B, in tokens
    returned = {
        reward.name: call(reward.name, reward.fn, given, completions, lengths if per_token else None)
        for reward in rewards
    }
    by_name = {name: torch.tensor(list(map(_total, column))) for name, column in returned.items()}  # (B,) each
    if combine == "product":
        _check_factors(rewards, by_name, prompts)
    values = torch.stack(list(by_name.values()))  # (F, B)
    weights = torch.tensor([reward.weight for reward in rewards], dtype=values.dtype)  # (F,)
    token_rewards = None
    if per_token:
        token_rewards = torch.zeros(len(lengths), max(lengths))  # (B, C)
        for reward in rewards:
            if reward.weight:
                token_rewards += reward.weight * _by_token(returned[reward.name], lengths)
    return Scores(
        by_name=by_name,
        combined=combined(values, weights, combine),
        is_correct=_are_correct(rewards[0], values[0]),
        has_answer=_have_answers(rewards[0], completions),
        is_correct_leniently=_are_correct_leniently(rewards[0], samples, completions),
        token_rewards=token_rewards,
    )


def _check_factors(rewards: Sequence[Reward], by_name: dict[str, Tensor], prompts: Sequence[Any]) -> None:
    """Check that no factor of a product is negative: the product of two negative values would be positive."""
    for reward in rewards:
        negative = (by_name[reward.name] < 0).nonzero().flatten().tolist() if reward.weight else []
        if negative:
            value, prompt = by_name[reward.name][negative[0]].item(), short(prompts[negative[0]])
            raise RewardError(
                f"reward {reward.name} returned {value:g} for {prompt}, expected >= 0 with combine product"
            )


def _are_correct(reward: Reward, values: Tensor) -> Tensor:
    """(B,) 1.0 if the reward gives its full mark, else 0.0; NaN if it gives no verdict."""
    if reward.full_mark is None:
        return torch.full_like(values, torch.nan)
    is_correct = ((values - reward.full_mark).abs() <= 1e-6).to(values.dtype)
    return is_correct.masked_fill(values.isnan(), torch.nan)


def _have_answers(reward: Reward, completions: Sequence[str]) -> Tensor:
    """(B,) bool: whether the completion has an answer to judge."""
    return torch.tensor(
        [call_attribute(reward.name, "has_answer", bool, reward.has_answer, text) for text in completions]
    )


def _are_correct_leniently(reward: Reward, samples: Sequence[dict[str, Any]], completions: Sequence[str]) -> Tensor:
    """(B,) 1.0 or 0.0; NaN if the reward has no `is_correct_leniently`."""
    fn = reward.is_correct_leniently
    if fn is None:
        return torch.full((len(samples),), torch.nan)
    pairs = zip(samples, completions, strict=True)
    verdicts = [call_attribute(reward.name, "is_correct_leniently", bool, fn, *pair) for pair in pairs]
    return torch.tensor(verdicts).float()


def _in_form_of(prompt: Any, completion: str) -> Any:
    """The completion in the form of its prompt: a text, or a list with the assistant's message."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def _total(value: RewardValue) -> float:
    """The value of one completion; NaN if the reward does not apply to it."""
    return math.nan if value is None else float(sum(value) if isinstance(value, list) else value)


def _by_token(values: Sequence[RewardValue], lengths: Sequence[int]) -> Tensor:
    """(B, C) the reward of each token, 0 after the end. A reward for a whole completion goes to its last token."""
    table = torch.zeros(len(lengths), max(lengths))
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if isinstance(value, list):
            table[row, :length] = torch.tensor(value)
        elif value is not None:
            table[row, length - 1] = value
    return table


# Mixtures


def check_mixture(rewards: RewardsOf, samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """`check_samples` for a mixture: each sample is checked by the rewards of its own dataset."""
    for name, rows in _rows_by_dataset(samples).items():
        places = [place(row) for row in rows]
        check_samples(rewards[name], [samples[row] for row in rows], places.__getitem__)


def score_mixture(
    rewards: RewardsOf,
    samples: Sequence[dict[str, Any]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    combine: str = "sum",
    per_token: bool = False,
) -> Scores:
    """`score_completions` for a mixture: each completion is scored only by the rewards of its own dataset."""
    parts = [
        (
            rows,
            score_completions(
                rewards[name],
                [samples[row] for row in rows],
                [completions[row] for row in rows],
                [completion_ids[row] for row in rows],
                combine=combine,
                per_token=per_token,
            ),
        )
        for name, rows in _rows_by_dataset(samples).items()
    ]
    if len(rewards) == 1:
        return parts[0][1]
    names = dict.fromkeys(reward.name for own in rewards.values() for reward in own)  # of all datasets
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    return Scores.cat([scores.with_names(names) for _, scores in parts]).select(order)


def _rows_by_dataset(samples: Sequence[dict[str, Any]]) -> dict[str | None, list[int]]:
    """The row numbers of each dataset, by its name; None if there is only one dataset."""
    rows: dict[str | None, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.get(SOURCE), []).append(row)
    return rows
