"""Load the config's `rewards` as a list of `Reward`: functions with their weights and attributes.

    rewards: [math, {name: length, weight: 0.5, target: 10, slope: 0.1}, {name: "my_module:my_fn", as: mine, n: 3}]

A name is a key of the table `REWARDS` in reward_model.py, or `module:function`. All other keys of an entry (besides
`weight` and `as`) are arguments: of the factory in the table, or of the function itself.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from grpo.errors import InputError, did_you_mean
from grpo.rewards.base import ATTRIBUTES, RewardFn, is_number
from grpo.rewards.calls import describe
from grpo.settings.sources import Source

# Every reward function is called with these. Its other parameters are columns of the dataset or arguments.
GIVEN = {"prompts", "completions", "completion_ids"}
OF_TRL = {"trainer_state", "log_extra", "log_metric"}  # TRL's trainer passes these, ours does not


@dataclass(frozen=True)
class Reward:
    """One entry of the config's `rewards`. grpo/rewards/base.py explains the attributes from `full_mark` on."""

    name: str  # its name in the logs
    fn: RewardFn
    weight: float
    full_mark: float | None = 1.0
    lowest: float = 0.0
    has_answer: Callable[[str], object] = str.strip  # truthy: there is an answer
    check_sample: Callable[[dict[str, Any]], object] = lambda sample: None
    is_correct_leniently: Callable[[dict[str, Any], str], bool] | None = None
    explain: Callable[..., Sequence[str]] | None = None

    @classmethod
    def of(cls, name: str, fn: RewardFn, weight: float, arguments: dict[str, Any]) -> Self:
        """`fn` with `arguments` fixed, and with the attributes that it carries.

        Raises:
            ValueError: an attribute has the wrong type.
        """
        attributes = {key: getattr(fn, key) for key in ATTRIBUTES if hasattr(fn, key)}
        if hasattr(fn, "is_right_leniently"):  # the name of this attribute until December 2026
            attributes.setdefault("is_correct_leniently", fn.is_right_leniently)
        for key, value in attributes.items():
            if key in ("full_mark", "lowest"):
                if not is_number(value) and not (key == "full_mark" and value is None):
                    raise ValueError(f"its attribute {key}: got {value!r}, expected a number")
            elif not callable(value):
                raise ValueError(f"its attribute {key}: got {value!r}, expected a function")
        return cls(name, _with_arguments(fn, arguments), weight, **attributes)


RewardsOf = Mapping[str | None, Sequence[Reward]]  # the rewards of each dataset, by its name; None if there is only one


def _with_arguments(fn: RewardFn, arguments: dict[str, Any]) -> RewardFn:
    """`fn` with its arguments fixed. An argument takes precedence over a column of the same name.

    If `fn` has no **columns, it is called with the parameters that it names, and no others.
    """
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
    wanted = named_parameters(fn)

    @functools.wraps(fn)  # inspect.signature still shows the parameters of `fn`
    def called(**given: Any) -> Any:
        return fn(**{key: value for key, value in (given | arguments).items() if takes_all or key in wanted})

    return called


def load_rewards(
    specs: Sequence[str | dict[str, Any]], table: Mapping[str, Callable[..., RewardFn]], combine: str = "sum"
) -> list[Reward]:
    """The functions for the config's `rewards`.

    Args:
        specs: the entries, each a name or a dict.
        table: name -> factory.
        combine: how the rewards will be combined; some weights are not allowed with mean and product.

    Raises:
        InputError: an entry is wrong; the message names it.
    """
    rewards = [_load_reward(spec, table) for spec in specs]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"rewards: got {', '.join(names)}: {twice} twice; {{name: {twice}, as: …}} gives another name")
    if not any(reward.weight for reward in rewards):
        raise InputError("rewards: got weight 0 everywhere, at least one must count")
    for reward in rewards:
        if reward.weight < 0 and combine != "sum":
            allowed = f"allowed with combine {combine}: >= 0"
            raise InputError(f"rewards: {reward.name}: weight: got {reward.weight}, {allowed}")
        if reward.weight and reward.lowest < 0 and combine == "product":
            found = f"its values may be negative (down to {reward.lowest:g})"
            raise InputError(f"rewards: {reward.name}: {found}; of two such factors the product would be positive")
    return rewards


def load_rewards_of(
    sources: Sequence[Source], table: Mapping[str, Callable[..., RewardFn]], combine: str = "sum"
) -> RewardsOf:
    """The rewards of each dataset, see `load_rewards`.

    Raises:
        InputError: an entry is wrong; the message names it, and in a mixture its dataset.
    """
    rewards: dict[str | None, list[Reward]] = {}
    for source in sources:
        try:
            rewards[source.name] = load_rewards(source.rewards, table, combine)
        except InputError as error:
            raise InputError(str(error) if source.name is None else f"datasets: {source.name}: {error}") from error
    return rewards


def _load_reward(spec: str | dict[str, Any], table: Mapping[str, Callable[..., RewardFn]]) -> Reward:
    arguments: dict[str, Any] = {"name": spec} if not isinstance(spec, dict) else dict(spec)
    name, weight = arguments.pop("name", None), arguments.pop("weight", 1.0)
    if not isinstance(name, str):
        raise InputError(f"rewards: got {spec!r}, expected a name or {{name: …, weight: …}}")
    logged_as = arguments.pop("as", name)
    if not isinstance(logged_as, str) or not re.fullmatch(r"[^\s/]+", logged_as):
        raise InputError(f"rewards: {name}: as: got {logged_as!r}, expected a name without spaces and slashes")
    if isinstance(weight, bool) or not is_number(weight):
        raise InputError(f"rewards: {name}: weight: got {weight!r}, expected a number")
    try:
        if name in table:
            _check_arguments(table[name], arguments)
            return Reward.of(logged_as, table[name](**arguments), weight, {})  # the factory has used the arguments
        if ":" in name:
            fn = _import_function(name)
            _check_arguments(fn, arguments, is_factory=False)
            return Reward.of(logged_as, fn, weight, arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"rewards: {name}: {error}") from error
    raise InputError(
        f"rewards: got {name!r}, allowed: {', '.join(table)}, or module:function{did_you_mean(name, table)}"
    )


def _check_arguments(fn: Callable[..., Any], arguments: Mapping[str, Any], *, is_factory: bool = True) -> None:
    """Check that `fn` takes these arguments.

    All parameters of a factory are arguments. For a reward function, only the parameters with a default are arguments;
    the others are columns of the data.
    """
    needed = named_parameters(fn, without_default=True)
    own = named_parameters(fn) if is_factory else named_parameters(fn) - needed - GIVEN
    allowed = ["weight", "as", *sorted(own)]
    for key in sorted(arguments.keys() - own):
        if key in needed - GIVEN:
            raise ValueError(f"got {key!r}, which has no default in the function and so is a column of the data")
        raise ValueError(f"got {key!r}, allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}")
    if is_factory and (missing := needed - arguments.keys()):
        raise ValueError(f"got no {' and no '.join(sorted(missing))}, which it needs")


def _import_function(name: str) -> RewardFn:
    """Import `module:function`. Raises a ValueError if it cannot be called as a reward function."""
    module_name, _, function_name = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module_name), function_name)
        parameters = inspect.signature(fn).parameters.values()
    except (Exception, SystemExit) as error:  # importing runs the user's module, which may raise anything
        raise ValueError(f"cannot be used: {describe(error)}") from error
    if inspect.iscoroutinefunction(fn) or inspect.isclass(fn):
        what = "a class" if inspect.isclass(fn) else "an async function"
        raise ValueError(f"got {what}, expected a function that returns its values")
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise ValueError("has parameters without a name, before a /; expected ones that can be given by name")
    if only_there := named_parameters(fn, without_default=True) & OF_TRL:
        raise ValueError(f"needs {', '.join(sorted(only_there))}, which only TRL's own trainer gives")
    return fn


def named_parameters(fn: Callable[..., Any], *, without_default: bool = False) -> set[str]:
    """The names of a function's parameters, without *args and **columns."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind not in variadic]
    return {p.name for p in parameters if not without_default or p.default is p.empty}


def required_columns(reward: Reward) -> set[str]:
    """The columns that a reward needs: the parameters of its function without a default."""
    return named_parameters(reward.fn, without_default=True) - GIVEN
