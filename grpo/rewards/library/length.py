"""Rewards for the length of a completion in tokens, including the stop token. They do not judge correctness."""

from typing import Any

from grpo.rewards.arguments import check_count, check_numbers
from grpo.rewards.base import RewardFn, RewardValue, declare


def length_reward(target: int, slope: float, plateau: int = 0) -> RewardFn:
    """1 near the target length, falling linearly on both sides, never below 0.

        n = tokens of the completion
        reward = max(0, 1 - slope * max(0, |n - target| - plateau))

    Args:
        target: the target length in tokens, >= 1.
        slope: how much the reward falls per token, > 0.
        plateau: how many tokens the length may differ from the target without a lower reward.

    >>> length_reward(target=10, slope=0.25, plateau=2)(completion_ids=[[7] * n for n in (1, 6, 8, 12, 13)])
    [0.0, 0.5, 1.0, 1.0, 0.75]
    """
    check_count("target", target)
    check_count("plateau", plateau, least=0)
    check_numbers(slope=slope)
    if slope <= 0:
        raise ValueError(f"slope: got {slope!r}, expected > 0")

    def length_fn(completion_ids: list, **_: Any) -> list[RewardValue]:
        return [max(0.0, 1.0 - slope * max(0, abs(len(ids) - target) - plateau)) for ids in completion_ids]

    return declare(length_fn, full_mark=None)


def overlong_reward(max_length: int, cache: int) -> RewardFn:
    """DAPO's soft penalty for overlong completions: 0, then falling linearly, then -1.

        n = tokens of the completion
        n <= max_length - cache               0
        max_length - cache < n <= max_length  (max_length - cache - n) / cache
        n > max_length                        -1

    Args:
        max_length: in tokens; at most max_completion_length.
        cache: the number of tokens over which the reward falls from 0 to -1, 1 ... max_length.

    Raises:
        ValueError: an argument is not a whole number, or is out of range.

    Paper: "DAPO" (2503.14476) eq. 13.

    >>> overlong_reward(max_length=10, cache=4)(completion_ids=[[7] * n for n in (6, 7, 10, 11)])
    [0.0, -0.25, -1.0, -1.0]
    """
    check_count("max_length", max_length)
    check_count("cache", cache, most=max_length, what="max_length")

    def overlong_fn(completion_ids: list, **_: Any) -> list[RewardValue]:
        return [-min(max(len(ids) - (max_length - cache), 0) / cache, 1.0) + 0.0 for ids in completion_ids]  # no -0.0

    return declare(overlong_fn, full_mark=None, lowest=-1.0)
