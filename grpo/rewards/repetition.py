"""A text that repeats itself: the share of its word n-grams that it has written before, as a penalty."""

from typing import Any

from grpo.rewards.base import RewardFn, RewardValue, check_count, check_numbers, declare, text_of


def repetition_reward(ngram_size: int = 3, max_penalty: float = 1.0) -> RewardFn:
    """0 for a text in which no n-gram of words comes twice, down to almost -max_penalty for one that says one thing only.

        reward = -max_penalty * (1 - different n-grams / all n-grams)

    Words are what white space separates, in lower case. A text of fewer than `ngram_size` words repeats nothing.

    Source: "Demystifying Long Chain-of-Thought Reasoning in LLMs" (2502.03373) section 4.2, as in TRL.

    >>> repetition_reward(ngram_size=2)(completions=["a b c d", "a b A B a b"])
    [0.0, -0.6]
    """
    check_count("ngram_size", ngram_size, most=20, what="words")
    check_numbers(max_penalty=max_penalty)
    if max_penalty < 0:
        raise ValueError(f"max_penalty: got {max_penalty!r}, expected >= 0: it is subtracted")

    def repetition_fn(completions: list, **_: Any) -> list[RewardValue]:
        values: list[RewardValue] = []
        for completion in completions:
            words = text_of(completion).lower().split()
            num_ngrams = max(len(words) - ngram_size + 1, 0)
            different = {tuple(words[start : start + ngram_size]) for start in range(num_ngrams)}
            values.append(0.0 - max_penalty * (1 - len(different) / num_ngrams) if num_ngrams else 0.0)
        return values

    return declare(repetition_fn, full_mark=None)
