"""What a completion is worth. Change this file to change what the model learns.

Reading order: ... -> grpo/rollout.py -> [reward_model.py] -> grpo/advantages.py -> ...

    python -m reward_model --data FILE --completions FILE     a reward tried on ready-made completions

A reward function has TRL's signature: it takes all completions of a step at once and returns one value each,

    fn(prompts, completions, completion_ids=..., **columns) -> list[float | None]

with the columns of the data set repeated per completion, and None for "does not apply here". Parameters without a
default are columns that it needs; parameters with one are arguments of the config. Where a prompt is a list of
messages, so is its completion: [{"role": "assistant", "content": ...}]; `text_of` gives the text of either.

`REWARDS` maps a name to a factory, `factory(**arguments) -> fn`; in the config:

    rewards: [math]
    rewards: [{name: math, weight: 1.0, correct_reward: 1.0}, {name: my_module:my_fn, weight: 0.5}]

docs/REWARDS.md has the whole table. With a learned critic (examples/train_ppo.py) a value may also be a list of floats,
one for each of `completion_ids`.

A function may carry attributes that say more about it:

    full_mark                  what it gives a right completion (1.0 where it does not say); None: it calls none right
    lowest                     no value of it is less (0.0 where it does not say)
    has_answer(completion)     is there anything to judge? (any text at all where it does not say); only for statistics
    check_sample(sample)       raises a ValueError for a row of the data that it cannot score, before any compute
    is_correct_leniently(sample, completion)   right, be it not in the form that was asked for; only for evaluations
    explain(samples, completions)            what keeps each from earning more, in words; only for `-m reward_model`
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from grpo.errors import InputError, errors_explained
from grpo.rewards.trial import parse_arguments, source_of, try_rewards
from grpo.settings.config import Config

if __name__ == "__main__":  # before the slow imports: --help and a misspelt flag answer at once
    with errors_explained():
        ARGUMENTS, CONFIG = parse_arguments(__doc__)

from grpo.data import Sample
from grpo.models.loading import load_skeleton
from grpo.rewards import loading
from grpo.rewards.arguments import check_rewards
from grpo.rewards.base import RewardFn, RewardValue, declare, text_of
from grpo.rewards.calls import RewardError
from grpo.rewards.library.classifier import classifier_reward
from grpo.rewards.library.code import code_reward
from grpo.rewards.library.exact import boxed_reward, correctness_reward, gsm8k_reward, integer_reward
from grpo.rewards.library.form import format_reward, soft_format_reward, strict_format_reward, xml_count_reward
from grpo.rewards.library.length import length_reward, overlong_reward
from grpo.rewards.library.repetition import repetition_reward
from grpo.rewards.loading import Reward, required_columns
from grpo.rewards.reading.numerals import last_integer, only_integer
from grpo.rewards.scores import Scores, nan_std
from grpo.rewards.scoring import RewardsOf, check_mixture, check_samples, score_completions, score_mixture
from grpo.settings.sources import Source

__all__ = [  # all that has to do with rewards, in one place for those who use or write them
    "REWARDS", "MathRewardModel", "Reward", "RewardError", "RewardsOf", "Scores", "check_mixture", "check_samples",
    "last_integer", "load_rewards", "load_rewards_of", "nan_std", "only_integer", "required_columns",
    "score_completions", "score_mixture", "text_of",
]  # fmt: skip


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
        is_correct = last_integer(completion) == self.expected_integer(sample)
        return self.correct_reward if is_correct else self.wrong_reward

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
        lowest=wrong_reward,
        has_answer=lambda completion: last_integer(completion) is not None,
        check_sample=model.expected_integer,
    )


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


def load_rewards(specs: Sequence[str | dict[str, Any]], combine: str = "sum") -> list[Reward]:
    """The config's `rewards` as functions; an InputError names the entry that is wrong."""
    return loading.load_rewards(specs, REWARDS, combine)


def load_rewards_of(sources: Sequence[Source], combine: str = "sum") -> RewardsOf:
    """What each data set's completions are judged by; an InputError names the data set and the entry."""
    rewards: dict[str | None, list[Reward]] = {}
    for source in sources:
        try:
            rewards[source.name] = load_rewards(source.rewards, combine)
        except InputError as error:
            raise InputError(str(error) if source.name is None else f"datasets: {source.name}: {error}") from error
    return rewards


def main(arguments: argparse.Namespace, config: Config) -> None:
    """What the config's rewards say of ready-made completions."""
    source = source_of(arguments.data, config)
    rewards = load_rewards(source.rewards, config.combine)
    _, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)

    def score(samples: Sequence[Sample], completions: Sequence[str]) -> Scores:
        texts = [text.encode(errors="replace").decode() for text in completions]
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return score_completions(rewards, samples, completions, ids, combine=config.combine)

    print(try_rewards(arguments, source, rewards, lambda data: check_samples(rewards, data, data.place), score))


if __name__ == "__main__":
    with errors_explained():
        main(ARGUMENTS, CONFIG)
