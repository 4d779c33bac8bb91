"""Calls of reward functions. They may be a user's code, so errors name the function, the sample and the value."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import RunError
from grpo.rewards.base import RewardFn, RewardValue, is_number

T = TypeVar("T")


class RewardError(RunError):
    """A reward function raised an error, or returned something other than a list of rewards."""


def call(
    name: str, fn: RewardFn, given: dict[str, Sequence[Any]], completions: Sequence[str], lengths: Sequence[int] | None
) -> list[RewardValue]:
    """Call `fn` on B completions and check the values that it returns, one per completion.

    Args:
        name: the name of the reward, for error messages.
        given: the arguments of `fn`, each a sequence of length B.
        completions: the texts of the completions, for error messages.
        lengths: the number of tokens of each completion, if a value may also be a list with one float per token; None
            if it may not.

    Raises:
        RewardError: `fn` raised an error (the message names the first sample on which `fn` also fails alone), or
            returned the wrong number of values, or something that is not a reward.
    """
    prompts = given["prompts"]
    try:
        values = fn(**{key: list(column) for key, column in given.items()})  # copies, because `fn` may change its lists
    except (Exception, SystemExit) as error:  # a user's function may raise anything; the message must name it
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{describe(error)} ({Path(place.filename).name}, line {place.lineno})"
        row = _first_failing_row(fn, given)
        culprit = "" if row is None else f" for prompt {short(prompts[row])}, completion {short(completions[row])}"
        raise RewardError(f"reward {name} raised {message}{culprit}") from error
    return check_values(name, values, prompts, lengths)


def call_attribute(name: str, attribute: str, kind: Callable[[Any], T], fn: Callable[..., Any], *arguments: Any) -> T:
    """Call `fn`, an attribute of the reward `name`, and convert its result with `kind`, such as bool.

    Raises:
        RewardError: `fn` raised an error, or its result cannot be converted.
    """
    try:
        return kind(fn(*arguments))
    except (Exception, SystemExit) as error:
        what = f"reward {name}: its attribute {attribute} raised {describe(error)}"
        raise RewardError(f"{what}, for {', '.join(map(short, arguments))}") from error


def describe(error: BaseException) -> str:
    """Type and message of an error in one line: "ValueError: too large"."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def short(value: Any, limit: int = 300) -> str:
    """The repr of a value. If it is longer than `limit` characters, the middle is left out."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _first_failing_row(fn: RewardFn, given: dict[str, Sequence[Any]]) -> int | None:
    """Call `fn` on each row alone. Returns the first row on which it raises an error; None if there is none."""
    for row in range(len(given["prompts"])):
        try:
            fn(**{name: values[row : row + 1] for name, values in given.items()})
        except (Exception, SystemExit):
            return row
    return None


def check_values(name: str, values: Any, prompts: Sequence[Any], lengths: Sequence[int] | None) -> list[RewardValue]:
    """Check that there is one value per completion, and that each is a reward. For `lengths` see `call`."""
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        hint = ": use .tolist()" if hasattr(values, "tolist") else ""  # for arrays and tensors
        allowed = f"expected a list of as many{hint}"
        raise RewardError(f"reward {name} returned {got} for {len(prompts)} completions, {allowed}")
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        if problem := _problem(value, None if lengths is None else lengths[row], short(prompt)):
            raise RewardError(f"reward {name} returned {problem}")
    return list(values)


def _problem(value: Any, length: int | None, prompt: str) -> str | None:
    """What is wrong with one value; None if it is valid. `length`: the completion's tokens; None: lists are invalid."""
    if not isinstance(value, list):
        is_reward = value is None or is_number(value)
        return None if is_reward else f"{short(value)} for {prompt}, expected a finite number or None"
    if length is None:
        critic = "rewards for single tokens need a critic (examples/train_ppo.py)"
        return f"a list for {prompt}, expected one number or None: {critic}"
    if len(value) != length:
        return f"{len(value)} token rewards for {prompt}, whose completion has {length} tokens"
    for item in value:
        if not is_number(item):
            return f"{short(item)} in a list for {prompt}, expected finite numbers"
    return None if is_number(sum(value)) else f"a list for {prompt} whose sum is {sum(value)!r}: not finite"
