"""An entry of the config's `rewards` -> a function that scores, its weight, and what it says of itself.

    math    {name: length, weight: 0.5, target: 10, slope: 0.1}    {name: my_module:my_fn, as: mine, strict: true}

A name of the table, whose factory takes the other arguments; or any function, which takes them itself.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from grpo.errors import InputError, did_you_mean
from grpo.rewards.base import SAID_OF_ITSELF, RewardFn, is_number
from grpo.rewards.calls import described

# What every reward function is called with; its other parameters are columns of the data set or arguments.
GIVEN = {"prompts", "completions", "completion_ids"}
OF_TRL = {"trainer_state", "log_extra", "log_metric"}  # what TRL's trainer gives, too


@dataclass(frozen=True)
class Reward:
    """One entry of the config's list."""

    name: str  # as which it is logged
    fn: RewardFn
    weight: float
    full_mark: float | None = 1.0  # the value of a right completion; None: it calls none right or wrong
    lowest: float = 0.0  # no value is less, as far as is known
    has_answer: Callable[[str], object] = str.strip  # true where there is anything to judge
    check_sample: Callable[[dict[str, Any]], object] = lambda sample: None  # a ValueError for a row it cannot score
    is_correct_leniently: Callable[[dict[str, Any], str], bool] | None = None  # wherever the answer stands
    explain: Callable[..., Sequence[str]] | None = None  # what keeps each completion from more; "": nothing does

    @classmethod
    def of(cls, name: str, fn: RewardFn, weight: float, arguments: dict[str, Any]) -> Self:
        """`fn` with `arguments` fixed, and what its attributes say of it; a ValueError where one cannot be used."""
        said = {key: getattr(fn, key) for key in SAID_OF_ITSELF if hasattr(fn, key)}
        for key, value in said.items():
            if key in ("full_mark", "lowest"):
                if not is_number(value) and not (key == "full_mark" and value is None):
                    raise ValueError(f"its attribute {key}: got {value!r}, expected a number")
            elif not callable(value):
                raise ValueError(f"its attribute {key}: got {value!r}, expected a function")
        return cls(name, _with_arguments(fn, arguments), weight, **said)


def _with_arguments(fn: RewardFn, arguments: dict[str, Any]) -> RewardFn:
    """`fn` as it is called: a column never overrides an argument; without **columns it gets what it names, no more."""
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
    wanted = named_parameters(fn)

    @functools.wraps(fn)  # so that its parameters can still be seen
    def called(**given: Any) -> Any:
        return fn(**{key: value for key, value in (given | arguments).items() if takes_all or key in wanted})

    return called


def load_rewards(
    specs: Sequence[str | dict[str, Any]], table: Mapping[str, Callable[..., RewardFn]], combine: str = "sum"
) -> list[Reward]:
    """The config's `rewards` as functions; an InputError names the entry that is wrong."""
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
            return Reward.of(logged_as, table[name](**arguments), weight, {})  # the factory has had them
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
    """Of a factory every parameter is an argument; of a reward function those with a default, others are columns."""
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
    """`module:function`; a ValueError where it cannot be called as a reward."""
    module_name, _, function_name = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module_name), function_name)
        parameters = inspect.signature(fn).parameters.values()
    except (Exception, SystemExit) as error:  # importing runs the user's module, which may raise anything
        raise ValueError(f"cannot be used: {described(error)}") from error
    if inspect.iscoroutinefunction(fn) or inspect.isclass(fn):
        what = "a class" if inspect.isclass(fn) else "an async function"
        raise ValueError(f"got {what}, expected a function that returns its values")
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise ValueError("has parameters without a name, before a /; expected ones that can be given by name")
    if only_there := named_parameters(fn, without_default=True) & OF_TRL:
        raise ValueError(f"needs {', '.join(sorted(only_there))}, which only TRL's own trainer gives")
    return fn


def named_parameters(fn: Callable[..., Any], *, without_default: bool = False) -> set[str]:
    """The parameters that a function names: no *args, no **columns."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind not in variadic]
    return {p.name for p in parameters if not without_default or p.default is p.empty}


def required_columns(reward: Reward) -> set[str]:
    """The columns a reward needs: the parameters it names, without a default."""
    return named_parameters(reward.fn, without_default=True) - GIVEN
