"""Calling a reward function: it may be anybody's code, so what it raises or returns is checked, and named."""

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.errors import RunError
from grpo.rewards.base import RewardFn, RewardValue, is_number


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
            values, or a value that is none.
    """
    prompts = given["prompts"]
    try:
        values = fn(**{key: list(column) for key, column in given.items()})  # its own lists: it may edit them
    except Exception as error:  # a user's function may raise anything; it must stop the run, by name
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        row = _first_failing_row(fn, given)
        culprit = "" if row is None else f" for prompt {prompts[row]!r}, completion {completions[row]!r}"
        raise RewardError(f"reward {name} raised {message}{culprit}") from error
    return checked(name, values, prompts, lengths)


def _first_failing_row(fn: RewardFn, given: dict[str, Sequence[Any]]) -> int | None:
    """Which completion a function that raised on a batch raises on alone; None if it takes each of them."""
    for row in range(len(given["prompts"])):
        try:
            fn(**{name: values[row : row + 1] for name, values in given.items()})
        except Exception:
            return row
    return None


def checked(name: str, values: Any, prompts: Sequence[str], lengths: Sequence[int] | None) -> list[RewardValue]:
    """One value a completion; lists of so many token rewards are allowed where `lengths` are given."""
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise RewardError(f"reward {name} returned {got} for {len(prompts)} completions, expected a list of as many")
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        if not isinstance(value, list):
            if value is not None and not is_number(value):
                raise RewardError(f"reward {name} returned {value!r} for {prompt!r}, expected a finite number or None")
        elif lengths is None:
            raise RewardError(
                f"reward {name} returned a list for {prompt!r}, expected one number or None: rewards for single tokens "
                "need a critic (examples/train_ppo.py)"
            )
        elif len(value) != lengths[row]:
            raise RewardError(
                f"reward {name} returned {len(value)} token rewards for {prompt!r}, whose completion has "
                f"{lengths[row]} tokens"
            )
        elif wrong := [item for item in value if not is_number(item)]:
            raise RewardError(f"reward {name} returned {wrong[0]!r} in a list for {prompt!r}, expected finite numbers")
        elif not is_number(sum(value)):
            raise RewardError(f"reward {name} returned a list for {prompt!r} whose sum is {sum(value)!r}: not finite")
    return list(values)
