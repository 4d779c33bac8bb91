"""The reward: how good is a completion? Change this file to change what the model learns.

Reading order: ... -> grpo/rollout.py -> [reward_model.py] -> grpo/batch.py -> ...

    python -m reward_model --data FILE --completions FILE     try a reward on ready-made completions

grpo/rewards/base.py defines what a reward function is. docs/REWARDS.md lists all rewards and shows how to write one.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from grpo.rewards.arguments import check_rewards
from grpo.rewards.base import RewardFn, RewardValue, declare, text_of
from grpo.rewards.reading.numerals import expected_integer, last_integer, only_integer


class MathRewardModel:
    """The default reward. It checks whether the last number of the completion is the sample's "answer"."""

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0) -> None:
        check_rewards(correct_reward=correct_reward, wrong_reward=wrong_reward)
        self.correct_reward, self.wrong_reward = correct_reward, wrong_reward

    def compute_reward(self, sample: dict[str, Any], completion: str) -> float:
        """`correct_reward` if the completion's last number is the sample's answer, else `wrong_reward`.

        >>> MathRewardModel().compute_reward({"answer": "5"}, "12-7=5 5")
        1.0
        """
        is_correct = last_integer(completion) == expected_integer(sample)
        return self.correct_reward if is_correct else self.wrong_reward


def math_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0) -> RewardFn:
    """MathRewardModel as a reward function, which scores many completions in one call."""
    model = MathRewardModel(correct_reward, wrong_reward)

    def math_fn(prompts: list, completions: list, answer: list, **_: Any) -> list[RewardValue]:
        rows = zip(prompts, answer, map(text_of, completions), strict=True)
        return [model.compute_reward({"prompt": p, "answer": a}, text) for p, a, text in rows]

    return declare(
        math_fn, full_mark=correct_reward, lowest=wrong_reward, has_answer=last_integer, check_sample=expected_integer
    )


from grpo.errors import errors_explained
from grpo.rewards.command_line import parse_arguments

if __name__ == "__main__":  # before the slow imports, so that --help and a misspelled flag answer at once
    with errors_explained():
        ARGUMENTS, CONFIG = parse_arguments(__doc__)

from grpo.models.loading import load_skeleton
from grpo.rewards import loading
from grpo.rewards.calls import RewardError
from grpo.rewards.library import classifier, code, exact, form, length, repetition
from grpo.rewards.loading import Reward, RewardsOf, required_columns
from grpo.rewards.scores import Scores, nan_std
from grpo.rewards.scoring import check_mixture, check_samples, score_completions, score_mixture
from grpo.rewards.trial import source_of, try_rewards
from grpo.settings.config import Config
from grpo.settings.sources import Source

__all__ = [  # everything about rewards that users import, in one place
    "REWARDS", "MathRewardModel", "Reward", "RewardError", "RewardsOf", "Scores", "check_mixture", "check_samples",
    "last_integer", "load_rewards", "load_rewards_of", "nan_std", "only_integer", "required_columns",
    "score_completions", "score_mixture", "text_of",
]  # fmt: skip

REWARDS: dict[str, Callable[..., RewardFn]] = {  # name in the config -> factory(**arguments) -> reward function
    "math": math_reward,  # the last number of the text
    "gsm8k": exact.gsm8k_reward,  # the number in <answer> or after ####
    "boxed": exact.boxed_reward,  # the formula in \boxed{}
    "correctness": exact.correctness_reward,  # the text in <answer>
    "integer": exact.integer_reward,  # this reward and the next four check only the form
    "xml_count": form.xml_count_reward,
    "soft_format": form.soft_format_reward,
    "strict_format": form.strict_format_reward,
    "format": form.format_reward,
    "length": length.length_reward,
    "overlong": length.overlong_reward,
    "repetition": repetition.repetition_reward,
    "code": code.code_reward,  # runs the program in the completion against tests
    "classifier": classifier.classifier_reward,  # the output of a trained model
}


def load_rewards(specs: Sequence[str | dict[str, Any]], combine: str = "sum") -> list[Reward]:
    """Load the reward functions of the config's `rewards`. If an entry is wrong, an InputError names it."""
    return loading.load_rewards(specs, REWARDS, combine)


def load_rewards_of(sources: Sequence[Source], combine: str = "sum") -> RewardsOf:
    """Load the rewards of each dataset. If an entry is wrong, an InputError names the dataset and the entry."""
    return loading.load_rewards_of(sources, REWARDS, combine)


def main(arguments: argparse.Namespace, config: Config) -> None:
    """Score ready-made completions with the config's rewards and print a table."""
    rewards = load_rewards(source_of(arguments.data, config).rewards, config.combine)
    _, tokenizer = load_skeleton(config.model_name, chat_template=config.chat_template)
    print(try_rewards(arguments.data, arguments.completions, rewards, tokenizer, config))


if __name__ == "__main__":
    with errors_explained():
        main(ARGUMENTS, CONFIG)
