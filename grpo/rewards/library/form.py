"""The form of a text: tags in their places, a pattern. It calls nothing right: a second reward, and a small one.

Four of the five rewards of a widely used recipe for small models are of this kind (xml_count, soft_format,
strict_format here, integer in exact.py; correctness is the fifth). They earn at most 0.5 each, and the right answer 2.
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
    """`reward` for a completion that is these elements in this order and nothing else, or that fits a pattern.

    Args:
        reward: what is paid.
        tags: names of the elements; reasoning and answer where neither they nor a pattern are given.
        pattern: a regular expression instead of tags, for the whole text. It has 20 ms, so one that backtracks without
            end pays nothing, and cannot hold up the run.
    """
    if pattern is None:
        names = check_tags("tags", TAGS if tags is None else tags)
        return _paid_where(lambda text: in_tags(text, names), reward)
    if tags is not None:
        raise ValueError("pattern: got together with tags, allowed: one of them")
    import regex  # type: ignore[import-untyped]  # comes with transformers; unlike re it can be told to stop

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
    """`reward` for <reasoning> ... </reasoning> <answer> ... </answer> and whatever follows; each tag once."""
    names = check_tags("tags", tags)
    return _paid_where(lambda text: elements_at_start(text, names) is not None, reward)


def strict_format_reward(reward: float = 0.5, tags: Sequence[str] = TAGS) -> RewardFn:
    """`reward` for the same with every tag on a line of its own, and nothing before, between or behind."""
    names = check_tags("tags", tags)
    return _paid_where(lambda text: in_tag_lines(text, names), reward)


def xml_count_reward(reward: float = 0.125, tags: Sequence[str] = TAGS) -> RewardFn:
    """`reward` for every tag in place: a partial credit that leads to the whole form.

    In place is a tag that the text has once, on a line of its own, behind those before it; and the last one only with
    nothing behind it.
    """
    check_numbers(reward=reward)
    names = check_tags("tags", tags)

    def xml_count_fn(completions: list, **_: Any) -> list[RewardValue]:
        return [reward * tags_in_place(text_of(completion), names) for completion in completions]

    return declare(xml_count_fn, full_mark=None, lowest=min(2 * len(names) * reward, 0.0))
