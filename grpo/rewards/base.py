"""What every reward is: a function with TRL's signature, and what such a function may say of itself.

    fn(prompts, completions, completion_ids=..., **columns) -> list[float | None]

One value a completion; None: it does not apply to this one. The columns of the data set come by name.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

RewardValue = float | list[float] | None  # of one completion: as a whole, token by token, not applicable
RewardFn = Callable[..., Sequence[RewardValue]]

LARGEST = 3.4028234663852886e38  # of a float32, in which rewards are combined
# Attributes of a reward function; reward_model.py says what they mean.
SAID_OF_ITSELF = ("full_mark", "lowest", "has_answer", "check_sample", "is_correct_leniently", "explain")


def declare(fn: RewardFn, **said: Any) -> RewardFn:
    """The function with what it says of itself, see reward_model.py; `full_mark=None`: it calls nothing right."""
    assert said.keys() <= set(SAID_OF_ITSELF)
    for name, value in said.items():
        setattr(fn, name, value)
    return fn


def text_of(completion: str | list[dict[str, str]]) -> str:
    """What the model wrote, be it given as text or as a message."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def is_number(value: Any) -> bool:
    """A real number that float32 can hold."""
    return isinstance(value, numbers.Real) and -LARGEST <= value <= LARGEST  # type: ignore[operator]
