"""The rules for single settings, for runs with a critic and for --resume, with the words that error messages use."""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
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


# What a value of the declared type must satisfy: (test, its description in error messages).
Rule = tuple[Callable[[Any], bool], str]

_AT_LEAST_0: Rule = (lambda value: value >= 0, ">= 0")

_AT_LEAST_1: Rule = (lambda value: value >= 1, ">= 1")

_POSITIVE: Rule = (lambda value: value > 0, "> 0")

_SEED: Rule = (lambda value: 0 <= value < 2**63, "0 ... 2**63 - 1")

_FILE_NAME: Rule = (_is_file_name, "a name that a file can have")

_BETA: Rule = (lambda value: 0 <= value < 1, "in [0, 1)")


def _some(what: str) -> Rule:
    return lambda value: len(value) > 0 and _is_json(value), f"a list of at least one {what}, no date or .inf in it"


RULES: dict[str, Rule] = {
    "model_name": _FILE_NAME,
    "base_seed": _SEED,
    "base_steps": _AT_LEAST_0,
    "train_file": _FILE_NAME,
    "eval_file": _FILE_NAME,
    "datasets": _some("data set"),
    "total_rows": _AT_LEAST_1,
    "single_turn_ratio": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "rewards": _some("reward"),
    "reward_clip": _POSITIVE,
    "lora_rank": _AT_LEAST_0,
    "lora_alpha": _POSITIVE,
    "stop_strings": (
        lambda value: all(isinstance(item, str) and item for item in value),
        "a list of texts that are not empty",
    ),
    "num_train_epochs": _POSITIVE,
    "max_prompt_length": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "group_size": _AT_LEAST_1,
    "max_completion_length": _AT_LEAST_1,
    "temperature": (lambda value: value > 0, "> 0 (greedy samples are all alike: nothing to compare in a group)"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "top_k": _AT_LEAST_0,
    "clip_range": (lambda value: 0 < value < 1 or value == math.inf, "in (0, 1), or .inf for no clip"),
    "clip_range_high": _POSITIVE,
    "dual_clip": (lambda value: value > 1, "> 1"),
    "kl_coeff": _AT_LEAST_0,
    "ref_update_every": _AT_LEAST_0,
    "entropy_coeff": _AT_LEAST_0,
    "max_resample_rounds": _AT_LEAST_0,
    "gamma": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "gae_lambda": (lambda value: 0 <= value <= 1, "in [0, 1]"),
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
    "output_dir": (lambda value: value != "" and _is_file_name(value), "a folder"),
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
            choices = " | ".join(map(as_yaml, values))
            raise InputError(f"{key}: got {as_yaml(settings[key])}, allowed with a critic: {choices}")


def as_yaml(value: Any) -> str:
    """The value as config.yaml writes it, for error messages.

    >>> as_yaml(None), as_yaml(False), as_yaml(0.5)
    ('null', 'false', '0.5')
    """
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
