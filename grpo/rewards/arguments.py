"""What the arguments of rewards may be. Each check raises a ValueError: argument, found, allowed."""

from collections.abc import Sequence
from typing import Any

from grpo.rewards.base import is_number


def check_numbers(**arguments: Any) -> None:
    """Every one of them is a finite number."""
    for name, value in arguments.items():
        if not is_number(value) or isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected a finite number")


def check_rewards(*, correct_reward: Any, wrong_reward: Any) -> None:
    """Both are numbers, and right answers earn more than wrong ones."""
    check_numbers(correct_reward=correct_reward, wrong_reward=wrong_reward)
    if correct_reward <= wrong_reward:
        raise ValueError(f"correct_reward: got {correct_reward!r}, expected more than wrong_reward ({wrong_reward!r})")


def check_tag(name: str, tag: Any) -> None:
    """It is the name of an element."""
    if not isinstance(tag, str) or not tag.isidentifier():
        raise ValueError(f"{name}: got {tag!r}, expected a name, such as answer")


def check_tags(name: str, tags: Any) -> tuple[str, ...]:
    """The names of elements, each there once."""
    is_list = isinstance(tags, (list, tuple)) and len(tags) > 0
    if not is_list or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ValueError(f"{name}: got {tags!r}, expected names, such as [reasoning, answer]")
    if len(set(tags)) < len(tags):
        raise ValueError(f"{name}: got {tags!r}, expected each name once")
    return tuple(tags)


def check_flag(name: str, value: Any) -> None:
    """It is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected true or false")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, what: str = "") -> None:
    """It is a whole number from `least` to `most`, which is called `what`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f"{what} ({most})" if what else most
        allowed = f"a whole number >= {least}" if most is None else f"a whole number in {least} ... {limit}"
        raise ValueError(f"{name}: got {value!r}, expected {allowed}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """It is one of these texts."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {' | '.join(allowed)}")
