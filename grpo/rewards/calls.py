"""Calling a reward function: it may be anybody's code, so what it raises or returns is checked, and named."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import RunError
from grpo.rewards.base import RewardFn, RewardValue, is_number

T = TypeVar("T")


class RewardError(RunError):
    """A reward function raised, or returned something that is no list of rewards."""


def call(
    name: str, fn: RewardFn, given: dict[str, Sequence[Any]], completions: Sequence[str], lengths: Sequence[int] | None
) -> list[RewardValue]:
    """What `fn` says of B completions, one value each.

    Args:
        given: its arguments, B of each.
        completions: as texts, for messages.
        lengths: tokens of each completion, where a value may also be a list of so many; None where it may not.

    Raises:
        RewardError: it raised (the first sample it also raises on alone is named), or returned the wrong number of
            values, or something that is no reward.
    """
    prompts = given["prompts"]
    try:
        values = fn(**{key: list(column) for key, column in given.items()})  # its own lists: it may edit them
    except (Exception, SystemExit) as error:  # a user's function may raise anything; it must stop the run, by name
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{described(error)} ({Path(place.filename).name}, line {place.lineno})"
        row = _first_failing_row(fn, given)
        culprit = "" if row is None else f" for prompt {short(prompts[row])}, completion {short(completions[row])}"
        raise RewardError(f"reward {name} raised {message}{culprit}") from error
    return checked(name, values, prompts, lengths)


def asked(name: str, attribute: str, kind: Callable[[Any], T], fn: Callable[..., Any], *arguments: Any) -> T:
    """What a function says that stands in an attribute of a reward, as a `kind`; a RewardError where it raises."""
    try:
        return kind(fn(*arguments))
    except (Exception, SystemExit) as error:
        what = f"reward {name}: its attribute {attribute} raised {described(error)}"
        raise RewardError(f"{what}, for {', '.join(map(short, arguments))}") from error


def described(error: BaseException) -> str:
    """One line: ValueError: too large."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def short(value: Any, limit: int = 300) -> str:
    """As Python writes it, the middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _first_failing_row(fn: RewardFn, given: dict[str, Sequence[Any]]) -> int | None:
    """Which completion a function that raised on a batch raises on alone; None if it takes each of them."""
    for row in range(len(given["prompts"])):
        try:
            fn(**{name: values[row : row + 1] for name, values in given.items()})
        except (Exception, SystemExit):
            return row
    return None


def checked(name: str, values: Any, prompts: Sequence[Any], lengths: Sequence[int] | None) -> list[RewardValue]:
    """One value a completion; lists of so many token rewards are allowed where `lengths` are given."""
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        hint = ": use .tolist()" if hasattr(values, "tolist") else ""  # of an array or tensor
        allowed = f"expected a list of as many{hint}"
        raise RewardError(f"reward {name} returned {got} for {len(prompts)} completions, {allowed}")
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        if problem := _problem(value, None if lengths is None else lengths[row], short(prompt)):
            raise RewardError(f"reward {name} returned {problem}")
    return list(values)


def _problem(value: Any, length: int | None, prompt: str) -> str | None:
    """What is wrong with the value for one completion, of `length` tokens where it may have one for each of them."""
    if not isinstance(value, list):
        is_correct = value is None or is_number(value)
        return None if is_correct else f"{short(value)} for {prompt}, expected a finite number or None"
    if length is None:
        critic = "rewards for single tokens need a critic (examples/train_ppo.py)"
        return f"a list for {prompt}, expected one number or None: {critic}"
    if len(value) != length:
        return f"{len(value)} token rewards for {prompt}, whose completion has {length} tokens"
    for item in value:
        if not is_number(item):
            return f"{short(item)} in a list for {prompt}, expected finite numbers"
    return None if is_number(sum(value)) else f"a list for {prompt} whose sum is {sum(value)!r}: not finite"
