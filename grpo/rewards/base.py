"""What a reward function is, and the attributes that it may carry.

A reward function has TRL's signature. It scores all completions of a step in one call and returns one value for each:

    fn(prompts, completions, completion_ids=..., **columns) -> list[float | None]

- None means that the reward does not apply to this completion.
- The columns of the dataset arrive by name, repeated for each completion.
- Parameters without a default are columns, which every row of the data must have. Parameters with a default are
  arguments, which the config may set: `rewards: [{name: my_module:my_fn, weight: 0.5, strict: true}]`.
- If a prompt is a list of messages, its completion is one too: [{"role": "assistant", "content": ...}]. `text_of`
  returns the text of both kinds of completion.
- With a learned critic (examples/train_ppo.py), a value may also be a list of floats, one per token.

A function may carry attributes. All of them are optional:

    full_mark (1.0)          its value for a correct completion. None: it does not judge whether a completion is correct
    lowest (0.0)             its smallest possible value
    has_answer(completion)   whether there is an answer to judge (default: any text); used only in statistics
    check_sample(sample)     raises a ValueError for a row that the function cannot score; called before any training
    is_correct_leniently(sample, completion)
                             whether the answer is correct, even if its form is not; used only in evaluations
    explain(samples, completions)
                             for each completion, what keeps it from a higher value, in words, or "";
                             used only by `python -m reward_model`
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

RewardValue = float | list[float] | None  # for the completion as a whole, for each of its tokens, does not apply
RewardFn = Callable[..., Sequence[RewardValue]]

LARGEST = 3.4028234663852886e38  # the largest float32: rewards are combined in float32
ATTRIBUTES = ("full_mark", "lowest", "has_answer", "check_sample", "is_correct_leniently", "explain")


def declare(fn: RewardFn, **attributes: Any) -> RewardFn:
    """Set attributes of a reward function, and return it."""
    assert attributes.keys() <= set(ATTRIBUTES)
    for name, value in attributes.items():
        setattr(fn, name, value)
    return fn


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which is a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def is_number(value: Any) -> bool:
    """Whether the value is a real number that float32 can hold."""
    return isinstance(value, numbers.Real) and -LARGEST <= value <= LARGEST  # type: ignore[operator]
