"""A text that repeats itself: the share of its n-grams of tokens that it has written before, as a penalty."""

from typing import Any

from grpo.rewards.base import RewardFn, RewardValue, check_count, check_numbers, declare


def repetition_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFn:
    """0 where no n-gram of tokens comes twice, down to almost `max_penalty` where one thing is said over and over.

        reward = max_penalty * (1 - different n-grams / all n-grams)

    Args:
        ngram_size: tokens, 1 ... 100. A completion of fewer tokens repeats nothing.
        max_penalty: <= 0.

    Paper: "Demystifying Long Chain-of-Thought Reasoning in LLMs" (2502.03373) appendix C.2; as in TRL.

    >>> repetition_reward(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    check_count("ngram_size", ngram_size, most=100)
    check_numbers(max_penalty=max_penalty)
    if max_penalty > 0:
        raise ValueError(f"max_penalty: got {max_penalty!r}, expected <= 0")

    def repetition_fn(completion_ids: list, **_: Any) -> list[RewardValue]:
        values: list[RewardValue] = []
        for ids in completion_ids:
            ngrams = list(zip(*(ids[start:] for start in range(ngram_size)), strict=False))
            repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
            values.append(max_penalty * repeated + 0.0)  # no -0.0
        return values

    return declare(repetition_fn, full_mark=None)
