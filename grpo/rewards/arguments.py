"""Checks of the arguments of rewards. Each raises a ValueError: the argument, its value, and what was expected."""

from collections.abc import Sequence
from typing import Any

from grpo.rewards.base import is_number


def check_numbers(**arguments: Any) -> None:
    """Check that every argument is a finite number."""
    for name, value in arguments.items():
        if not is_number(value) or isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected a finite number")


def check_rewards(*, correct_reward: Any, wrong_reward: Any) -> None:
    """Check that both are numbers, and that a correct answer earns more than a wrong one."""
    check_numbers(correct_reward=correct_reward, wrong_reward=wrong_reward)
    if correct_reward <= wrong_reward:
        raise ValueError(f"correct_reward: got {correct_reward!r}, expected more than wrong_reward ({wrong_reward!r})")


def check_tag(name: str, tag: Any) -> None:
    """Check that the argument is the name of an element, such as answer in <answer>."""
    if not isinstance(tag, str) or not tag.isidentifier():
        raise ValueError(f"{name}: got {tag!r}, expected a name, such as answer")


def check_tags(name: str, tags: Any) -> tuple[str, ...]:
    """Check that the argument is a list of different names of elements. Returns them as a tuple."""
    is_list = isinstance(tags, (list, tuple)) and len(tags) > 0
    if not is_list or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ValueError(f"{name}: got {tags!r}, expected names, such as [reasoning, answer]")
    if len(set(tags)) < len(tags):
        raise ValueError(f"{name}: got {tags!r}, expected each name once")
    return tuple(tags)


def check_flag(name: str, value: Any) -> None:
    """Check that the argument is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected true or false")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, what: str = "") -> None:
    """Check that the argument is a whole number from `least` to `most`. `what`: the name of `most` in the message."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f"{what} ({most})" if what else most
        allowed = f"a whole number >= {least}" if most is None else f"a whole number in {least} ... {limit}"
        raise ValueError(f"{name}: got {value!r}, expected {allowed}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that the argument is one of the texts in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {' | '.join(allowed)}")
