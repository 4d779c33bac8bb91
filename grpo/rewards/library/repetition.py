"""A penalty for repetition: the fraction of a completion's token n-grams that occurred before in it."""

from array import array
from collections.abc import Sequence
from typing import Any

from grpo.rewards.arguments import check_count, check_numbers
from grpo.rewards.base import RewardFn, RewardValue, declare


def repetition_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFn:
    """0 if no token n-gram occurs twice, down to almost `max_penalty` if the text repeats one n-gram throughout.

        reward = max_penalty * (1 - different n-grams / all n-grams)

    Args:
        ngram_size: in tokens, 1 ... 40. A completion with fewer tokens gets no penalty.
        max_penalty: the lower bound of the reward, <= 0.

    Paper: "Demystifying Long Chain-of-Thought Reasoning in LLMs" (2502.03373) appendix C.2; as in TRL.

    >>> repetition_reward(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    check_count("ngram_size", ngram_size, most=40)
    check_numbers(max_penalty=max_penalty)
    if max_penalty > 0:
        raise ValueError(f"max_penalty: got {max_penalty!r}, expected <= 0")

    def repetition_fn(completion_ids: list, **_: Any) -> list[RewardValue]:
        values: list[RewardValue] = []
        for ids in completion_ids:
            num_ngrams = len(ids) - ngram_size + 1
            repeated = 1 - num_different(ids, ngram_size) / num_ngrams if num_ngrams > 0 else 0.0
            values.append(max_penalty * repeated + 0.0)  # no -0.0
        return values

    return declare(repetition_fn, full_mark=None, lowest=max_penalty)


def num_different(ids: Sequence[int], ngram_size: int) -> int:
    """The number of distinct n-grams. They are compared as slices of bytes, which is much faster than as tuples.

    >>> num_different([1, 2, 1, 2, 1], ngram_size=2)
    2
    """
    tokens = array("i", ids)
    width, data = tokens.itemsize, tokens.tobytes()
    starts = range(0, width * (len(ids) - ngram_size + 1), width)
    return len({data[start : start + width * ngram_size] for start in starts})
