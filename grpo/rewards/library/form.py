"""Rewards for the form of a text: tags in their places, or a pattern. Use them with a small weight, beside a main one.

They do not judge correctness. A widely used recipe for small models has five rewards, and four of them reward the form:
xml_count, soft_format and strict_format in this file, and integer in exact.py. Each of these gives at most 0.5. The
fifth reward is correctness, which gives 2 for a correct answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from grpo.rewards.arguments import check_numbers, check_tags
from grpo.rewards.base import RewardFn, RewardValue, declare, text_of
from grpo.rewards.reading.answers import elements_at_start, in_tag_lines, in_tags, tags_in_place

TAGS = ("reasoning", "answer")
SECONDS = 0.02  # for one text and a user's pattern


def _paid_where(has_form: Callable[[str], bool], reward: float) -> RewardFn:
    check_numbers(reward=reward)

    def form_fn(completions: list, **_: Any) -> list[RewardValue]:
        return [reward if has_form(text_of(completion)) else 0.0 for completion in completions]

    return declare(form_fn, full_mark=None, lowest=min(reward, 0.0))


def format_reward(reward: float = 0.5, tags: Sequence[str] | None = None, pattern: str | None = None) -> RewardFn:
    """`reward` if the completion consists of these elements in this order, or if it matches a pattern; else 0.

    Args:
        reward: the value for a completion that has the form.
        tags: names of the elements; reasoning and answer if neither tags nor a pattern are given.
        pattern: a regular expression that must match the whole text; instead of tags. The match may take 20 ms. If it
            takes longer, the value is 0, so a pattern that backtracks exponentially cannot delay the run.
    """
    if pattern is None:
        names = check_tags("tags", TAGS if tags is None else tags)
        return _paid_where(lambda text: in_tags(text, names), reward)
    if tags is not None:
        raise ValueError("pattern: got together with tags, allowed: one of them")
    import regex  # type: ignore[import-untyped]  # a dependency of transformers; unlike re it has a timeout

    try:
        compiled = regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ValueError(f"pattern: got {pattern!r}, which is no regular expression: {error}") from error

    def fits(text: str) -> bool:
        try:
            return compiled.fullmatch(text, timeout=SECONDS) is not None
        except TimeoutError:
            return False

    return _paid_where(fits, reward)


def soft_format_reward(reward: float = 0.5, tags: Sequence[str] = TAGS) -> RewardFn:
    """`reward` if the text begins with <reasoning> ... </reasoning> <answer> ... </answer> and has each tag once."""
    names = check_tags("tags", tags)
    return _paid_where(lambda text: elements_at_start(text, names) is not None, reward)


def strict_format_reward(reward: float = 0.5, tags: Sequence[str] = TAGS) -> RewardFn:
    """`reward` if every tag is alone on its line, and no text is before, between or after the elements."""
    names = check_tags("tags", tags)
    return _paid_where(lambda text: in_tag_lines(text, names), reward)


def xml_count_reward(reward: float = 0.125, tags: Sequence[str] = TAGS) -> RewardFn:
    """`reward` for every tag in place: partial credit that guides the policy towards the complete form.

    A tag is in place if it occurs once, alone on its line, after the tags that precede it. The last tag is in place
    only if nothing follows it.
    """
    check_numbers(reward=reward)
    names = check_tags("tags", tags)

    def xml_count_fn(completions: list, **_: Any) -> list[RewardValue]:
        return [reward * tags_in_place(text_of(completion), names) for completion in completions]

    return declare(xml_count_fn, full_mark=None, lowest=min(2 * len(names) * reward, 0.0))
