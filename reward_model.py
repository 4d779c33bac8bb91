"""What a completion is worth. Change this file to change what the model learns.

Reading order: ... -> grpo/rollout.py -> [reward_model.py] -> grpo/advantages.py -> ...

    python -m reward_model --data FILE --completions FILE     a reward tried on ready-made completions

A reward function has TRL's signature: it takes all completions of a step at once and returns one value each,

    fn(prompts, completions, completion_ids=..., **columns) -> list[float | None]

with the columns of the data set repeated per completion, and None for "does not apply here". The columns it needs are
the parameters it names. Where a prompt is a list of messages, so is its completion: [{"role": "assistant", "content":
...}]; `text_of` gives the text of either.

`REWARDS` maps a name to a factory, `factory(**arguments) -> fn`; in the config:

    rewards: [math]
    rewards: [{name: math, weight: 1.0, correct_reward: 1.0}, {name: my_module:my_fn, weight: 0.5}]

docs/REWARDS.md has the whole table. With a learned critic (examples/train_ppo.py) a value may also be a list of floats,
one for each of `completion_ids`.

A function may carry attributes that say more about it:

    full_mark                  what it gives a right completion (1.0 where it does not say); None: it calls none right
    has_answer(completion)     is there anything to judge? (any text at all where it does not say); only for statistics
    check_sample(sample)       raises a ValueError for a row of the data that it cannot score, before any compute
    is_right_leniently(sample, completion)   right, be it not in the form that was asked for; only for evaluations
"""

import argparse
import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from grpo.config import Config
from grpo.errors import InputError, errors_explained
from grpo.rewards.trial import parse_arguments, source_of, try_rewards

if __name__ == "__main__":  # before the slow imports: --help and a misspelt flag answer at once
    with errors_explained():
        ARGUMENTS, CONFIG = parse_arguments(__doc__)

import torch
from torch import Tensor

from grpo.data import SOURCE, Sample
from grpo.policy import load_skeleton
from grpo.rewards.arguments import check_rewards
from grpo.rewards.base import (
    SAID_OF_ITSELF,
    RewardFn,
    RewardValue,
    declare,
    is_number,
    text_of,
)
from grpo.rewards.calls import RewardError, call, short
from grpo.rewards.classifier import classifier_reward
from grpo.rewards.code import code_reward
from grpo.rewards.exact import boxed_reward, correctness_reward, gsm8k_reward, integer_reward
from grpo.rewards.form import format_reward, soft_format_reward, strict_format_reward, xml_count_reward
from grpo.rewards.length import length_reward, overlong_reward
from grpo.rewards.numerals import last_integer, only_integer
from grpo.rewards.repetition import repetition_reward
from grpo.rewards.scores import Scores, combined, nan_std
from grpo.sources import Source

# For those who write rewards of their own, and for tests.
__all__ = ["MathRewardModel", "RewardError", "Scores", "last_integer", "nan_std", "only_integer", "text_of"]


class MathRewardModel:
    """Right or wrong: the last number of the completion against the sample's "answer", strictly."""

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0) -> None:
        check_rewards(correct_reward=correct_reward, wrong_reward=wrong_reward)
        self.correct_reward = correct_reward
        self.wrong_reward = wrong_reward

    def compute_reward(self, sample: dict[str, Any], completion: str) -> float:
        """`correct_reward` if the completion's last number is the sample's answer, else `wrong_reward`.

        >>> MathRewardModel().compute_reward({"answer": "5"}, "12-7=5 5")
        1.0
        """
        is_right = last_integer(completion) == self.expected_integer(sample)
        return self.correct_reward if is_right else self.wrong_reward

    def expected_integer(self, sample: dict[str, Any]) -> str:
        """The sample's "answer" in canonical digits; a ValueError if it has no integer."""
        answer = sample["answer"]
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # str(1e20) would be "1e+20"
        expected = last_integer(str(answer)) if type(answer) in (str, int) else None  # bool is a subclass of int
        if expected is None:
            raise ValueError(f'"answer" of {sample.get("prompt")!r} must be an integer, got {sample["answer"]!r}')
        return expected


def math_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0) -> RewardFn:
    """MathRewardModel as a reward function."""
    model = MathRewardModel(correct_reward, wrong_reward)

    def math_fn(prompts: list, completions: list, answer: list, **_: Any) -> list[RewardValue]:
        rows = zip(prompts, answer, map(text_of, completions), strict=True)
        return [model.compute_reward({"prompt": p, "answer": a}, text) for p, a, text in rows]

    return declare(
        math_fn,
        full_mark=correct_reward,
        has_answer=lambda completion: last_integer(completion) is not None,
        check_sample=model.expected_integer,
    )


# What every reward function is called with; its other parameters are columns of the data set or arguments.
GIVEN = {"prompts", "completions", "completion_ids"}

REWARDS: dict[str, Callable[..., RewardFn]] = {
    "math": math_reward,  # the last number of the text
    "gsm8k": gsm8k_reward,  # a number in <answer> or after ####
    "boxed": boxed_reward,  # in a box
    "correctness": correctness_reward,  # in <answer>, any text
    "integer": integer_reward,  # the form, from here on
    "xml_count": xml_count_reward,
    "soft_format": soft_format_reward,
    "strict_format": strict_format_reward,
    "format": format_reward,
    "length": length_reward,
    "overlong": overlong_reward,
    "repetition": repetition_reward,
    "code": code_reward,  # a program against tests
    "classifier": classifier_reward,  # a model's opinion
}


@dataclass(frozen=True)
class Reward:
    """One entry of the config's list."""

    name: str
    fn: RewardFn
    weight: float
    full_mark: float | None = 1.0  # the value of a right completion; None: it calls none right or wrong
    has_answer: Callable[[str], object] = str.strip  # true where there is anything to judge
    check_sample: Callable[[dict[str, Any]], object] = lambda sample: None  # a ValueError for a row it cannot score
    is_right_leniently: Callable[[dict[str, Any], str], bool] | None = None  # wherever the answer stands

    @classmethod
    def of(cls, name: str, fn: RewardFn, weight: float, arguments: dict[str, Any]) -> Self:
        """`fn` with `arguments` fixed, and what its attributes say of it."""
        declared = {key: getattr(fn, key) for key in SAID_OF_ITSELF if hasattr(fn, key)}
        return cls(name, functools.partial(fn, **arguments) if arguments else fn, weight, **declared)


def load_rewards(specs: Sequence[str | dict[str, Any]], combine: str = "sum") -> list[Reward]:
    """The config's `rewards` as functions; an InputError names the entry that is wrong."""
    rewards = [_load_reward(spec) for spec in specs]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise InputError(f"rewards: got {', '.join(names)}; every reward may stand there once")
    if not any(reward.weight for reward in rewards):
        raise InputError("rewards: got weight 0 everywhere, at least one must count")
    for reward in rewards:
        if reward.weight < 0 and combine != "sum":
            allowed = f"allowed with combine {combine}: >= 0"
            raise InputError(f"rewards: {reward.name}: weight: got {reward.weight}, {allowed}")
    return rewards


def _load_reward(spec: str | dict[str, Any]) -> Reward:
    arguments: dict[str, Any] = (
        {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, dict) else {}
    )
    name, weight = arguments.pop("name", None), arguments.pop("weight", 1.0)
    if not isinstance(name, str):
        raise InputError(f"rewards: got {spec!r}, expected a name or {{name: …, weight: …}}")
    if isinstance(weight, bool) or not is_number(weight):
        raise InputError(f"rewards: {name}: weight: got {weight!r}, expected a number")
    if name in REWARDS:
        try:
            fn = REWARDS[name](**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"rewards: {name}: {error}") from error
        return Reward.of(name, fn, weight, {})
    if ":" in name:
        fn = _import_function(name)
        allowed = _named_parameters(fn) - GIVEN
        if unknown := [key for key in arguments if key not in allowed]:
            raise InputError(f"rewards: {name}: got {unknown[0]!r}, allowed: {', '.join(['weight', *sorted(allowed)])}")
        return Reward.of(name, fn, weight, arguments)
    nearest = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"rewards: got {name!r}, allowed: {', '.join(REWARDS)}, or module:function{hint}")


def _import_function(name: str) -> RewardFn:
    module_name, _, function_name = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module_name), function_name)
        inspect.signature(fn)
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise InputError(f"rewards: {name}: cannot be used: {type(error).__name__}: {error}") from error
    return fn


def _named_parameters(fn: RewardFn, *, without_default: bool = False) -> set[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind not in variadic]
    return {p.name for p in parameters if not without_default or p.default is p.empty}


def required_columns(reward: Reward) -> set[str]:
    """The columns a reward needs: the parameters it names, without a default."""
    return _named_parameters(reward.fn, without_default=True) - GIVEN


RewardsOf = Mapping[str | None, Sequence[Reward]]  # of each data set, by its name; None where there is only one


def load_rewards_of(sources: Sequence[Source], combine: str = "sum") -> RewardsOf:
    """What each data set's completions are judged by; an InputError names the data set and the entry."""
    rewards: dict[str | None, list[Reward]] = {}
    for source in sources:
        try:
            rewards[source.name] = load_rewards(source.rewards, combine)
        except InputError as error:
            raise InputError(str(error) if source.name is None else f"datasets: {source.name}: {error}") from error
    return rewards


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
    `token_rewards`, which add up to the sum: a reward for the completion as a whole is then its last token's.

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
        _check_positive(rewards, by_name, prompts)
    values = torch.stack(list(by_name.values()))  # (F, B)
    weights = torch.tensor([reward.weight for reward in rewards], dtype=values.dtype)  # (F,)
    first, full_mark = values[0], rewards[0].full_mark
    judges = ~first.isnan() if full_mark is not None else torch.zeros_like(first, dtype=torch.bool)  # (B,)
    is_right = ((first - (full_mark or 0.0)).abs() <= 1e-6).to(first.dtype)
    return Scores(
        by_name=by_name,
        combined=combined(values, weights, combine),
        is_right=is_right.masked_fill(~judges, torch.nan),
        has_answer=torch.tensor([bool(rewards[0].has_answer(completion)) for completion in completions]),
        is_right_leniently=_leniently(rewards[0], samples, completions),
        token_rewards=sum(
            (reward.weight * _by_token(returned[reward.name], lengths) for reward in rewards if reward.weight),
            start=torch.zeros(len(lengths), max(lengths)),
        )
        if per_token
        else None,
    )


def _check_positive(rewards: Sequence[Reward], by_name: dict[str, Tensor], prompts: Sequence[Any]) -> None:
    """Of a product: two negative factors would make what is bad twice over good."""
    for reward in rewards:
        negative = (by_name[reward.name] < 0).nonzero().flatten().tolist() if reward.weight else []
        if negative:
            value, prompt = by_name[reward.name][negative[0]].item(), short(prompts[negative[0]])
            raise RewardError(
                f"reward {reward.name} returned {value:g} for {prompt}, expected >= 0 with combine product"
            )


def _leniently(reward: Reward, samples: Sequence[dict[str, Any]], completions: Sequence[str]) -> Tensor:
    """(B,) 1.0 or 0.0; NaN where the reward knows no lenient way."""
    if reward.is_right_leniently is None:
        return torch.full((len(samples),), torch.nan)
    pairs = zip(samples, completions, strict=True)
    return torch.tensor([float(reward.is_right_leniently(sample, text)) for sample, text in pairs])


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


def main(arguments: argparse.Namespace, config: Config) -> None:
    """What the config's rewards say of ready-made completions."""
    source = source_of(arguments.data, config)
    rewards = load_rewards(source.rewards, config.combine)
    _, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)

    def score(samples: Sequence[Sample], completions: Sequence[str]) -> Scores:
        texts = [text.encode(errors="replace").decode() for text in completions]
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return score_completions(rewards, samples, completions, ids, combine=config.combine)

    print(try_rewards(arguments, source, lambda data: check_samples(rewards, data, data.place), score))


if __name__ == "__main__":
    with errors_explained():
        main(ARGUMENTS, CONFIG)
