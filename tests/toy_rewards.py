"""Reward functions as a user would write them in a module of their own."""

import sys
import time
from typing import Any


def even_digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of even digits: an untrained model earns some of it, so every group has a signal."""
    return [sum(letter in "02468" for letter in text) / max(len(text), 1) for text in completions]


def different_letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """How many different ones there are in the prompt and in the completion."""
    return [len(set(prompt)) + len(set(text)) for prompt, text in zip(prompts, completions, strict=True)]


def needs_colour(prompts: list[str], completions: list[str], colour: list[str], **_: Any) -> list[float]:
    """Names a column that no data set here has."""
    return [1.0 for _ in completions]


pi = 3.14  # no function


def scaled(prompts: list[str], completions: list[str], *, scale: float = 1.0, **_: Any) -> list[float]:
    """Takes an argument from the config."""
    return [scale for _ in completions]


def raises(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward with a bug."""
    raise KeyError("oops")


def slow(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Three seconds for a batch of groups, none for an evaluation."""
    time.sleep(3 * (len(set(prompts)) < len(prompts)))
    return even_digits(prompts, completions)


def never(prompts: list[str], completions: list[str], **_: Any) -> list[None]:
    """A reward that applies to nothing."""
    return [None for _ in completions]


def brief(completions: list[str], limit: int = 3) -> list[float]:
    """Names what it wants, and no **columns."""
    return [float(len(text) <= limit) for text in completions]


def exits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Ends the process, as a script does whose author did not think of a library."""
    sys.exit(0)


async def waits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """TRL awaits such a function."""
    return [0.0 for _ in completions]


def logs(prompts: list[str], completions: list[str], log_metric: Any, **_: Any) -> list[float]:
    """TRL hands its logger on."""
    return [0.0 for _ in completions]


class Scorer:
    """No function: its instances might be."""

    def __init__(self, completions: list[str], **_: Any) -> None:
        self.completions = completions


def by_place(completions: list[str], /, **_: Any) -> list[float]:
    """Takes completions by their place only."""
    return [0.0 for _ in completions]


def prompt_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Of the prompt, in characters; whatever the completion is."""
    return [float(len(prompt)) for prompt in prompts]
