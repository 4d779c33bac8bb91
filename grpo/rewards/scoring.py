"""Samples and completions -> Scores: every reward function is called, its values are checked and combined.

A mixture's completions are scored by the rewards of their own data set, and by no other's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.data import SOURCE
from grpo.errors import InputError
from grpo.rewards.base import RewardValue
from grpo.rewards.calls import RewardError, asked, call, described, short
from grpo.rewards.loading import Reward, required_columns
from grpo.rewards.scores import Scores, combined

RewardsOf = Mapping[str | None, Sequence[Reward]]  # of each data set, by its name; None where there is only one


def check_samples(rewards: Sequence[Reward], samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """Every sample must be one that the rewards can score; `place(i)` says where sample i stands."""
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
                what = f"its attribute check_sample raised {described(error)}"
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
    """Score B completions, each with its sample.

    With `per_token` a value may be a list, one reward for each of the completion's tokens, and the scores have
    `token_rewards`, which add up to the weighted sum (`combine` is sum then): a reward for the completion as a whole is
    its last token's.

    Raises:
        RewardError: a function raised (the first sample it also raises on alone is named), or returned the wrong number
            of values, or a value that is neither a finite number nor None (the sample is named too), or a list of
            values where `per_token` is false or which is not as long as the completion.
    """
    private = ("prompt", "prompt_ids", SOURCE)
    keys = {key for sample in samples for key in sample if key not in private}  # the union: rows may differ
    columns = {key: [sample.get(key) for sample in samples] for key in sorted(keys)}
    prompts = [sample["prompt"] for sample in samples]
    answers = [_like(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    given = {"prompts": prompts, "completions": answers, "completion_ids": completion_ids, **columns}
    lengths = [len(ids) for ids in completion_ids]  # B of them, in tokens
    returned = {
        reward.name: call(reward.name, reward.fn, given, completions, lengths if per_token else None)
        for reward in rewards
    }
    by_name = {
        name: torch.tensor([_total(value) for value in values]) for name, values in returned.items()
    }  # each (B,)
    if combine == "product":
        _check_factors(rewards, by_name, prompts)
    values = torch.stack(list(by_name.values()))  # (F, B)
    weights = torch.tensor([reward.weight for reward in rewards], dtype=values.dtype)  # (F,)
    first, full_mark = values[0], rewards[0].full_mark
    judges = ~first.isnan() if full_mark is not None else torch.zeros_like(first, dtype=torch.bool)  # (B,)
    is_correct = ((first - (full_mark or 0.0)).abs() <= 1e-6).to(first.dtype)
    return Scores(
        by_name=by_name,
        combined=combined(values, weights, combine),
        is_correct=is_correct.masked_fill(~judges, torch.nan),
        has_answer=_have_answers(rewards[0], completions),
        is_correct_leniently=_leniently(rewards[0], samples, completions),
        token_rewards=sum(
            (reward.weight * _by_token(returned[reward.name], lengths) for reward in rewards if reward.weight),
            start=torch.zeros(len(lengths), max(lengths)),
        )
        if per_token
        else None,
    )


def _check_factors(rewards: Sequence[Reward], by_name: dict[str, Tensor], prompts: Sequence[Any]) -> None:
    """None of a product may be negative: two of them would make a positive one."""
    for reward in rewards:
        negative = (by_name[reward.name] < 0).nonzero().flatten().tolist() if reward.weight else []
        if negative:
            value, prompt = by_name[reward.name][negative[0]].item(), short(prompts[negative[0]])
            raise RewardError(
                f"reward {reward.name} returned {value:g} for {prompt}, expected >= 0 with combine product"
            )


def _have_answers(reward: Reward, completions: Sequence[str]) -> Tensor:
    """(B,) bool: there is something to be right or wrong about."""
    return torch.tensor([asked(reward.name, "has_answer", bool, reward.has_answer, text) for text in completions])


def _leniently(reward: Reward, samples: Sequence[dict[str, Any]], completions: Sequence[str]) -> Tensor:
    """(B,) 1.0 or 0.0; NaN where the reward knows no lenient way."""
    fn = reward.is_correct_leniently
    if fn is None:
        return torch.full((len(samples),), torch.nan)
    pairs = zip(samples, completions, strict=True)
    return torch.tensor([asked(reward.name, "is_correct_leniently", bool, fn, *pair) for pair in pairs]).float()


def _like(prompt: Any, completion: str) -> Any:
    """The completion in the form of its prompt: a text, or a list with the assistant's message."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def _total(value: RewardValue) -> float:
    """Of one completion; NaN = not applicable."""
    return math.nan if value is None else float(sum(value) if isinstance(value, list) else value)


def _by_token(values: Sequence[RewardValue], lengths: Sequence[int]) -> Tensor:
    """(B, C): what each token earned, 0 behind the end; a reward for the whole completion stands on its last token."""
    table = torch.zeros(len(lengths), max(lengths))
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if isinstance(value, list):
            table[row, :length] = torch.tensor(value)
        elif value is not None:
            table[row, length - 1] = value
    return table


# Mixtures


def check_mixture(rewards: RewardsOf, samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """`check_samples` for samples each of which has the rewards of its own data set."""
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
    """`score_completions` for samples each of which is judged by the rewards of its own data set, and by no other's."""
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
    names = dict.fromkeys(reward.name for own in rewards.values() for reward in own)  # also of data sets not drawn from
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    return Scores.cat([scores.with_names(names) for _, scores in parts]).select(order)


def _rows_by_dataset(samples: Sequence[dict[str, Any]]) -> dict[str | None, list[int]]:
    rows: dict[str | None, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.get(SOURCE), []).append(row)
    return rows
