"""The rules for single settings, for runs with a critic and for --resume, with the words that error messages use."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from grpo.errors import InputError

MAY_BE_INFINITE = ("clip_range", "clip_range_high", "value_clip_range", "max_grad_norm")  # .inf switches them off

# Only a run with a critic uses these.
CRITIC_KEYS = ("gamma", "gae_lambda", "value_clip_range", "critic_learning_rate")


def _is_file_name(value: str) -> bool:
    """Whether the operating system accepts it as the name of a file, which need not exist."""
    try:
        os.stat(value)
    except ValueError:  # it contains a zero byte or half of a surrogate pair
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _is_json(value: Any) -> bool:
    """Whether run.json can hold it, which rules out dates, NaN and lists that contain themselves."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


# What a value of the declared type must satisfy: (test, the rest of the error message after "key: value ").
Rule = tuple[Callable[[Any], bool], str]

_AT_LEAST_0: Rule = (lambda value: value >= 0, "is negative. Use 0 or more.")

_AT_LEAST_1: Rule = (lambda value: value >= 1, "is too small. Use 1 or more.")

_POSITIVE: Rule = (lambda value: value > 0, "is not positive. Use a number above 0.")

_FRACTION: Rule = (lambda value: 0 <= value <= 1, "is not a fraction. Use a number from 0 to 1.")

_POSITIVE_FRACTION: Rule = (lambda value: 0 < value <= 1, "is out of range. Use a number above 0 and up to 1.")

_SEED: Rule = (lambda value: 0 <= value < 2**63, "is no valid seed. Use a whole number from 0 to 2**63 - 1.")

_FILE_NAME: Rule = (_is_file_name, "is not a valid file name. Check its length and its characters.")

_BETA: Rule = (lambda value: 0 <= value < 1, "is out of range. Use a number from 0 to below 1, such as 0.9.")


def _some(what: str) -> Rule:
    return (
        lambda value: len(value) > 0 and _is_json(value),
        f"is not a usable list. Use a list of at least one {what}, without dates and .inf.",
    )


RULES: dict[str, Rule] = {
    "model_name": _FILE_NAME,
    "base_seed": _SEED,
    "base_steps": _AT_LEAST_0,
    "train_file": _FILE_NAME,
    "eval_file": _FILE_NAME,
    "datasets": _some("dataset"),
    "total_rows": _AT_LEAST_1,
    "single_turn_ratio": _FRACTION,
    "rewards": _some("reward"),
    "reward_clip": _POSITIVE,
    "lora_rank": _AT_LEAST_0,
    "lora_alpha": _POSITIVE,
    "stop_strings": (
        lambda value: all(isinstance(item, str) and item for item in value),
        'has an item that is empty or not a text. Use texts in quotes, such as ["Q:"].',
    ),
    "num_train_epochs": _POSITIVE,
    "max_prompt_length": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "group_size": _AT_LEAST_1,
    "max_completion_length": _AT_LEAST_1,
    "temperature": (
        lambda value: value > 0,
        "makes all completions of a prompt the same, so there is nothing to compare. Use a number above 0, such as 1.",
    ),
    "top_p": (lambda value: 0 < value <= 1, "is out of range. Use a number above 0 and up to 1 (1 switches it off)."),
    "top_k": (lambda value: value >= 0, "is negative. Use 1 or more, or 0 to switch it off."),
    "clip_range": (
        lambda value: 0 < value < 1 or value == math.inf,
        "is out of range. Use a number between 0 and 1, or .inf for no lower clip.",
    ),
    "clip_range_high": (lambda value: value > 0, "is not positive. Use a number above 0, or .inf for no upper clip."),
    "dual_clip": (lambda value: value > 1, "is too small. Use a number above 1, usually 3, or null for no dual clip."),
    "kl_coeff": _AT_LEAST_0,
    "ref_update_every": _AT_LEAST_0,
    "entropy_coeff": _AT_LEAST_0,
    "max_resample_rounds": _AT_LEAST_0,
    "gamma": _POSITIVE_FRACTION,
    "gae_lambda": _FRACTION,
    "value_clip_range": _POSITIVE,
    "critic_learning_rate": _POSITIVE,
    "num_train_steps": _AT_LEAST_0,
    "num_iterations": _AT_LEAST_1,
    "num_minibatches": _AT_LEAST_1,
    "micro_batch_size": _AT_LEAST_1,
    "micro_batch_tokens": _AT_LEAST_1,
    "learning_rate": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "max_grad_norm": _POSITIVE,
    "weight_decay": _AT_LEAST_0,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "seed": _SEED,
    "eval_every": _AT_LEAST_1,
    "save_every": _AT_LEAST_1,
    "keep_checkpoints": _AT_LEAST_1,
    "output_dir": (
        lambda value: value != "" and _is_file_name(value),
        "is not a valid folder name. Use a folder that exists or can be created.",
    ),
}

# The settings that --resume may change. With another value of any other setting it would not be the same run.
MAY_CHANGE_ON_RESUME = (
    "num_train_steps", "num_train_epochs", "eval_every", "save_every", "keep_checkpoints", "micro_batch_size",
    "micro_batch_tokens", "shared_prefix", "device", "compile",
)  # fmt: skip


def check_critic(settings: Mapping[str, Any]) -> None:
    """Check what examples/train_ppo.py does not support. An unsupported choice is an error; it is never ignored.

    Raises:
        InputError: the first of the settings that has an unsupported value.
    """
    has_kl = settings["kl_coeff"] > 0  # without a KL penalty its place does not matter
    allowed: dict[str, tuple[Any, ...]] = {
        "advantage_baseline": ("critic",),
        "advantage_scale": ("tokens", "none"),
        "surrogate": ("clipped",),
        "kl_in": ("reward",) if has_kl else ("reward", "loss"),
        "datasets": (None,),
        "combine": ("sum",),  # tokens may have their own rewards, which can only be added up
        "reward_scaling": ("identity",),
        "lora_rank": (0,),  # the critic is a second model, and all of its weights are trained
        "gradient_checkpointing": (False,),
    }
    for key, values in allowed.items():
        if settings[key] not in values:
            raise InputError(f"{key}: {shown(settings[key])} does not work with a critic. Use {one_of(values)}.")


def as_yaml(value: Any) -> str:
    """The value as config.yaml writes it, for error messages.

    >>> as_yaml(None), as_yaml(False), as_yaml(0.5)
    ('null', 'false', '0.5')
    """
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def shown(value: Any) -> str:
    """A value as error messages quote it: texts in double quotes, the others as config.yaml writes them.

    >>> print(shown("group"), shown(None), shown(True), shown(0.5))
    "group" null true 0.5
    """
    if isinstance(value, str):
        return '"' + repr(value + '"')[1:-1]  # the appended quote makes repr choose single quotes around it
    try:
        return as_yaml(value)
    except (ValueError, RecursionError):  # thousands of digits, thousands of nested brackets
        return f"this {type(value).__name__}, which is too long to show,"


def one_of(values: Iterable[Any]) -> str:
    """The allowed values as error messages list them.

    >>> one_of(["k1", "k2", None])
    'k1, k2 or null'
    """
    *others, last = map(as_yaml, values)
    return f"{', '.join(others)} or {last}" if others else last
