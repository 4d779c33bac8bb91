"""What a completion is worth. Change this file to change what the model learns.

Reading order: ... -> grpo/rollout.py -> [reward_model.py] -> grpo/advantages.py -> ...

A reward function has TRL's signature: it takes all completions of a step at once and returns one value each,

    fn(prompts, completions, completion_ids=..., **columns) -> list[float | None]

with the columns of the data set repeated per completion, and None for "does not apply here". The columns it needs are
the parameters it names. Where a prompt is a list of messages, so is its completion: [{"role": "assistant", "content":
...}]; `text_of` gives the text of either.

`REWARDS` maps a name to a factory, `factory(**arguments) -> fn`; in the config:

    rewards: [math]
    rewards: [{name: math, weight: 1.0, correct_reward: 1.0}, {name: my_module:my_fn, weight: 0.5}]

With a learned critic (examples/train_ppo.py) a value may also be a list of floats, one for each of `completion_ids`.

A function may carry attributes that say more about it:

    full_mark                  what it gives a right completion (1.0 where it does not say); None: it calls none right
    has_answer(completion)     is there anything to judge? (any text at all where it does not say); only for statistics
    check_sample(sample)       raises a ValueError for a row of the data that it cannot score, before any compute
    is_right_leniently(sample, completion)   right, be it not in the form that was asked for; only for evaluations
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import numbers
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from grpo.data import SOURCE
from grpo.errors import InputError, RunError
from grpo.rewards.answers import after_mark, between_tags, boxed, in_tags
from grpo.sources import Source

RewardValue = float | list[float] | None  # of one completion: as a whole, token by token, not applicable
RewardFn = Callable[..., Sequence[RewardValue]]

# A run of ASCII digits with the commas and points inside it, an optional minus (ASCII or U+2212) before it. After a
# digit a minus is an operator. One run never overlaps the next, so the search is linear in the text.
_NUMBER = re.compile(r"(?P<minus>(?<![0-9])[-\u2212])?(?P<point>(?<!\.)\.)?(?P<digits>[0-9]+(?:[.,][0-9]+)*)")
_INTEGER = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0+)?")


@lru_cache(maxsize=1024)  # siblings are often the same, and each is asked for several times
def last_integer(text: str) -> str | None:
    """The last number of a text, if it is an integer: canonical digits, or None.

    Canonical text instead of an int: a model may well write ten thousand digits, which int() refuses.

    >>> [last_integer(text) for text in ["5 or 6", "1,234", "\u22127", "12-7", "5.0", "3.5", "007", "", "x=5 y"]]
    ['6', '1234', '-7', '7', '5', None, '7', None, '5']
    """
    numbers_found = list(_NUMBER.finditer(text))
    if not numbers_found:
        return None
    last = numbers_found[-1]
    digits, minus = last["digits"], last["minus"]
    if last["point"]:  # ".5"
        return None
    if not _INTEGER.fullmatch(digits) and "," in digits:
        digits, minus = digits.rpartition(",")[2], None  # "7,8" and "1,2345" are lists: their last entry counts
    if not _INTEGER.fullmatch(digits):
        return None  # "3.5"
    canonical = digits.partition(".")[0].replace(",", "").lstrip("0") or "0"
    return f"-{canonical}" if minus and canonical != "0" else canonical


def only_integer(text: str) -> str | None:
    """The integer that a text is, not one among other things: canonical digits, or None.

    >>> [only_integer(text) for text in ["-1,234", " $72$.", "5.0", "5 apples", "3,4", "\\\\frac{1}{2}", ""]]
    ['-1234', '72', '5', None, None, None, None]
    """
    for latex, plain in (("{,}", ","), (",\\!", ","), ("\\$", "")):  # 1{,}234 and 1,\!234 are 1,234
        text = text.replace(latex, plain)
    stripped = text.strip().removesuffix(".").strip("$").strip()
    number = stripped.removeprefix("-").removeprefix("\u2212")
    return last_integer(stripped) if _INTEGER.fullmatch(number) else None


def _is_number(value: Any) -> bool:
    """A real number that float32, in which rewards are combined, can hold."""
    largest = torch.finfo(torch.float32).max
    return isinstance(value, numbers.Real) and -largest <= value <= largest  # type: ignore[operator]


class MathRewardModel:
    """Right or wrong: the last number of the completion against the sample's "answer", strictly."""

    def __init__(self, correct_reward: float = 1.0, wrong_reward: float = 0.0) -> None:
        for name, value in (("correct_reward", correct_reward), ("wrong_reward", wrong_reward)):
            if not _is_number(value):
                raise ValueError(f"{name}: got {value!r}, expected a finite number")
        self.correct_reward = correct_reward
        self.wrong_reward = wrong_reward

    def compute_reward(self, sample: dict[str, Any], completion: str) -> float:
        """`correct_reward` if the completion's last number is the sample's answer, else `wrong_reward`.

        >>> MathRewardModel().compute_reward({"answer": "5"}, "12-7=5 5")
        1.0
        """
        is_right = last_integer(completion) == self.expected_integer(sample)
        return self.correct_reward if is_right else self.wrong_reward

    def expected_integer(self, sample: dict[str, Any]) -> str:
        """The sample's "answer" in canonical digits; a ValueError if it has no integer."""
        answer = sample["answer"]
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # str(1e20) would be "1e+20"
        expected = last_integer(str(answer)) if type(answer) in (str, int) else None  # bool is a subclass of int
        if expected is None:
            raise ValueError(f'"answer" of {sample.get("prompt")!r} must be an integer, got {sample["answer"]!r}')
        return expected


def math_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0) -> RewardFn:
    """MathRewardModel as a reward function."""
    model = MathRewardModel(correct_reward, wrong_reward)

    def math_fn(prompts: list, completions: list, answer: list, **_: Any) -> list[RewardValue]:
        rows = zip(prompts, answer, map(text_of, completions), strict=True)
        return [model.compute_reward({"prompt": p, "answer": a}, text) for p, a, text in rows]

    math_fn.full_mark = correct_reward  # type: ignore[attr-defined]
    math_fn.has_answer = lambda completion: last_integer(completion) is not None  # type: ignore[attr-defined]
    math_fn.check_sample = model.expected_integer  # type: ignore[attr-defined]
    return math_fn


def overlong_reward(max_length: int, cache: int) -> RewardFn:
    """DAPO's soft punishment of completions that are too long: 0, then falling linearly, then -1.

        n = tokens of the completion, the stop token included
        n <= max_length - cache               0
        max_length - cache < n <= max_length  (max_length - cache - n) / cache
        n > max_length                        -1

    It calls nothing right or wrong: a second reward, beside one that does.

    Args:
        max_length: in tokens; max_completion_length, or less.
        cache: the tokens over which it falls, 1 ... max_length.

    Raises:
        ValueError: an argument is no whole number, or out of range.

    Paper: "DAPO" (2503.14476) eq. 13.

    >>> overlong_reward(max_length=10, cache=4)(completion_ids=[[7] * n for n in (6, 7, 10, 11)])
    [0.0, -0.25, -1.0, -1.0]
    """
    for name, value, most in (("max_length", max_length, math.inf), ("cache", cache, max_length)):
        if type(value) is not int or not 1 <= value <= most:
            allowed = "a whole number >= 1" if most == math.inf else f"a whole number in 1 ... max_length ({most})"
            raise ValueError(f"{name}: got {value!r}, expected {allowed}")

    def overlong_fn(completion_ids: list, **_: Any) -> list[RewardValue]:
        return [-min(max(len(ids) - (max_length - cache), 0) / cache, 1.0) + 0.0 for ids in completion_ids]  # no -0.0

    overlong_fn.full_mark = None  # type: ignore[attr-defined]
    return overlong_fn


def _exact_reward(find: Callable[[str], str | None], correct_reward: float, wrong_reward: float) -> RewardFn:
    """An integer that must stand where it was asked for: `find` looks there. Leniently, it may stand anywhere."""
    model = MathRewardModel(correct_reward, wrong_reward)

    def only(found: str | None) -> str:
        return (only_integer(found) if found is not None else None) or ""

    def exact_fn(prompts: list, completions: list, answer: list, **_: Any) -> list[RewardValue]:
        rows = zip(prompts, answer, map(text_of, completions), strict=True)
        return [model.compute_reward({"prompt": p, "answer": a}, only(find(text))) for p, a, text in rows]

    exact_fn.full_mark = correct_reward  # type: ignore[attr-defined]
    exact_fn.has_answer = lambda completion: find(completion) is not None  # type: ignore[attr-defined]
    exact_fn.check_sample = model.expected_integer  # type: ignore[attr-defined]
    exact_fn.is_right_leniently = (  # type: ignore[attr-defined]
        lambda sample, completion: last_integer(completion) == model.expected_integer(sample)
    )
    return exact_fn


def gsm8k_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0) -> RewardFn:
    """The integer in <answer> ... </answer>, or else after ####, against "answer", whose own text may have a ####."""
    return _exact_reward(lambda text: between_tags(text) or after_mark(text), correct_reward, wrong_reward)


def boxed_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0) -> RewardFn:
    """The integer in the last \\boxed{...} against "answer"."""
    return _exact_reward(boxed, correct_reward, wrong_reward)


def format_reward(tags: Sequence[str] = ("reasoning", "answer"), reward: float = 0.5) -> RewardFn:
    """`reward` for a completion that is these elements in this order and nothing else. It calls nothing right."""
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and tag.isidentifier() for tag in tags):
        raise ValueError(f"tags: got {tags!r}, expected names, such as [reasoning, answer]")
    if not _is_number(reward):
        raise ValueError(f"reward: got {reward!r}, expected a finite number")

    def format_fn(completions: list, **_: Any) -> list[RewardValue]:
        return [reward if in_tags(text_of(completion), tuple(tags)) else 0.0 for completion in completions]

    format_fn.full_mark = None  # type: ignore[attr-defined]
    return format_fn


# What every reward function is called with; its other parameters are columns of the data set or arguments.
GIVEN = {"prompts", "completions", "completion_ids"}

REWARDS: dict[str, Callable[..., RewardFn]] = {
    "math": math_reward,
    "gsm8k": gsm8k_reward,
    "boxed": boxed_reward,
    "format": format_reward,
    "overlong": overlong_reward,
}


SAID_OF_ITSELF = ("full_mark", "has_answer", "check_sample", "is_right_leniently")  # attributes of a function


@dataclass(frozen=True)
class Reward:
    """One entry of the config's list."""

    name: str
    fn: RewardFn
    weight: float
    full_mark: float | None = 1.0  # the value of a right completion; None: it calls none right or wrong
    has_answer: Callable[[str], object] = str.strip  # true where there is anything to judge
    check_sample: Callable[[dict[str, Any]], object] = lambda sample: None  # a ValueError for a row it cannot score
    is_right_leniently: Callable[[dict[str, Any], str], bool] | None = None  # wherever the answer stands

    @classmethod
    def of(cls, name: str, fn: RewardFn, weight: float, arguments: dict[str, Any]) -> Self:
        """`fn` with `arguments` fixed, and what its attributes say of it."""
        declared = {key: getattr(fn, key) for key in SAID_OF_ITSELF if hasattr(fn, key)}
        return cls(name, functools.partial(fn, **arguments) if arguments else fn, weight, **declared)


@dataclass(frozen=True)
class Scores:
    """The rewards of B completions; NaN = not applicable."""

    by_name: dict[str, Tensor]  # each (B,)
    combined: Tensor  # (B,) sum of weight * value over the applicable rewards of non-zero weight
    is_right: Tensor  # (B,) 1.0 right, 0.0 wrong: the first reward of the list gives its full mark
    has_answer: Tensor  # (B,) bool: there is something to be right or wrong about
    is_right_leniently: Tensor  # (B,) 1.0, 0.0, or NaN where the first reward knows no lenient way
    token_rewards: Tensor | None = None  # (B, C) where asked for; a row sums to `combined`, or to 0 where that is NaN

    def select(self, rows: Tensor) -> Self:
        """The scores of these completions alone. `rows`: (b,) indices."""
        rows = rows.cpu()
        return type(self)(
            by_name={name: values[rows] for name, values in self.by_name.items()},
            combined=self.combined[rows],
            is_right=self.is_right[rows],
            has_answer=self.has_answer[rows],
            is_right_leniently=self.is_right_leniently[rows],
            token_rewards=None if self.token_rewards is None else self.token_rewards[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The scores of all completions of `parts`, one after another, without token rewards: C may differ."""
        return cls(
            by_name={name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
            combined=torch.cat([part.combined for part in parts]),
            is_right=torch.cat([part.is_right for part in parts]),
            has_answer=torch.cat([part.has_answer for part in parts]),
            is_right_leniently=torch.cat([part.is_right_leniently for part in parts]),
        )

    def with_names(self, names: Iterable[str]) -> Self:
        """The same with NaN for the rewards among `names` that it has not got: they do not apply."""
        nothing = torch.full_like(self.combined, torch.nan)
        return dataclasses.replace(self, by_name={name: self.by_name.get(name, nothing) for name in names})

    def metrics(self) -> dict[str, float]:
        """Means and unbiased standard deviations over the batch, of the combined reward and of each one."""
        row = {"reward": self.combined.nanmean().item(), "reward_std": nan_std(self.combined)}
        for name, values in self.by_name.items():
            row |= {f"rewards/{name}/mean": values.nanmean().item(), f"rewards/{name}/std": nan_std(values)}
        return row


def nan_std(values: Tensor) -> float:
    """Unbiased standard deviation of the values that are not NaN; 0.0 for fewer than two."""
    valid = values[~values.isnan()]
    return valid.std().item() if len(valid) > 1 else 0.0


class RewardError(RunError):
    """A reward function raised, or returned something that is no list of rewards."""


def load_rewards(specs: Sequence[str | dict[str, Any]]) -> list[Reward]:
    """The config's `rewards` as functions; an InputError names the entry that is wrong."""
    rewards = [_load_reward(spec) for spec in specs]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise InputError(f"rewards: got {', '.join(names)}; every reward may stand there once")
    if not any(reward.weight for reward in rewards):
        raise InputError("rewards: got weight 0 everywhere, at least one must count")
    return rewards


def _load_reward(spec: str | dict[str, Any]) -> Reward:
    arguments: dict[str, Any] = (
        {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, dict) else {}
    )
    name, weight = arguments.pop("name", None), arguments.pop("weight", 1.0)
    if not isinstance(name, str):
        raise InputError(f"rewards: got {spec!r}, expected a name or {{name: …, weight: …}}")
    if isinstance(weight, bool) or not _is_number(weight):
        raise InputError(f"rewards: {name}: weight: got {weight!r}, expected a number")
    if name in REWARDS:
        try:
            fn = REWARDS[name](**arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"rewards: {name}: {error}") from error
        return Reward.of(name, fn, weight, {})
    if ":" in name:
        fn = _import_function(name)
        allowed = _named_parameters(fn) - GIVEN
        if unknown := [key for key in arguments if key not in allowed]:
            raise InputError(f"rewards: {name}: got {unknown[0]!r}, allowed: {', '.join(['weight', *sorted(allowed)])}")
        return Reward.of(name, fn, weight, arguments)
    nearest = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"rewards: got {name!r}, allowed: {', '.join(REWARDS)}, or module:function{hint}")


def _import_function(name: str) -> RewardFn:
    module_name, _, function_name = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module_name), function_name)
        inspect.signature(fn)
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise InputError(f"rewards: {name}: cannot be used: {type(error).__name__}: {error}") from error
    return fn


def _named_parameters(fn: RewardFn, *, without_default: bool = False) -> set[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.kind not in variadic]
    return {p.name for p in parameters if not without_default or p.default is p.empty}


def required_columns(reward: Reward) -> set[str]:
    """The columns a reward needs: the parameters it names, without a default."""
    return _named_parameters(reward.fn, without_default=True) - GIVEN


RewardsOf = Mapping[str | None, Sequence[Reward]]  # of each data set, by its name; None where there is only one


def load_rewards_of(sources: Sequence[Source]) -> RewardsOf:
    """What each data set's completions are judged by; an InputError names the data set and the entry."""
    rewards: dict[str | None, list[Reward]] = {}
    for source in sources:
        try:
            rewards[source.name] = load_rewards(source.rewards)
        except InputError as error:
            raise InputError(str(error) if source.name is None else f"datasets: {source.name}: {error}") from error
    return rewards


def check_mixture(rewards: RewardsOf, samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """`check_samples` for samples each of which has the rewards of its own data set."""
    for name, rows in _rows_by_dataset(samples).items():
        places = [place(row) for row in rows]
        check_samples(rewards[name], [samples[row] for row in rows], places.__getitem__)


def score_mixture(
    rewards: RewardsOf,
    samples: Sequence[dict[str, Any]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    per_token: bool = False,
) -> Scores:
    """`score_completions` for samples each of which is judged by the rewards of its own data set, and by no other's."""
    parts = [
        (
            rows,
            score_completions(
                rewards[name],
                [samples[row] for row in rows],
                [completions[row] for row in rows],
                [completion_ids[row] for row in rows],
                per_token=per_token,
            ),
        )
        for name, rows in _rows_by_dataset(samples).items()
    ]
    if len(rewards) == 1:
        return parts[0][1]
    names = dict.fromkeys(reward.name for own in rewards.values() for reward in own)  # also of data sets not drawn from
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    return Scores.cat([scores.with_names(names) for _, scores in parts]).select(order)


def _rows_by_dataset(samples: Sequence[dict[str, Any]]) -> dict[str | None, list[int]]:
    rows: dict[str | None, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(sample.get(SOURCE), []).append(row)
    return rows


def check_samples(rewards: Sequence[Reward], samples: Sequence[dict[str, Any]], place: Callable[[int], str]) -> None:
    """Every sample must be one that the rewards can score; `place(i)` says where sample i stands."""
    for reward in rewards:
        columns = sorted(required_columns(reward))
        for index, sample in enumerate(samples):
            for column in columns:
                if column not in sample:
                    raise InputError(f'{place(index)}: has no "{column}", which reward {reward.name} needs')
            try:
                reward.check_sample(sample)
            except ValueError as error:
                raise InputError(f"{place(index)}: reward {reward.name}: {error}") from error


def score_completions(
    rewards: Sequence[Reward],
    samples: Sequence[dict[str, Any]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    per_token: bool = False,
) -> Scores:
    """Score B completions, each with its sample.

    With `per_token` a value may be a list, one reward for each of the completion's tokens, and the scores have
    `token_rewards`: a reward for the completion as a whole is then its last token's.

    Raises:
        RewardError: a function raised (the first sample it also raises on alone is named), or returned the wrong number
            of values, or a value that is neither a finite number nor None (the sample is named too), or a list of
            values where `per_token` is false or which is not as long as the completion.
    """
    keys = {key for sample in samples for key in sample} - {
        "prompt",
        "prompt_ids",
        SOURCE,
    }  # the union: rows may differ
    columns = {key: [sample.get(key) for sample in samples] for key in sorted(keys)}
    prompts = [sample["prompt"] for sample in samples]
    answers = [_like(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    given = {"prompts": prompts, "completions": answers, "completion_ids": completion_ids, **columns}
    lengths = [len(ids) for ids in completion_ids]  # B of them, in tokens
    returned: dict[str, list[RewardValue]] = {}
    for reward in rewards:
        try:
            # its own lists: it may edit them
            values = reward.fn(**{name: list(column) for name, column in given.items()})
        except Exception as error:  # a user's function may raise anything; it must stop the run, by name
            place = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
            row = _first_failing_row(reward.fn, given)
            culprit = "" if row is None else f" for prompt {prompts[row]!r}, completion {completions[row]!r}"
            raise RewardError(f"reward {reward.name} raised {message}{culprit}") from error
        returned[reward.name] = _checked(reward.name, values, prompts, lengths if per_token else None)
    by_name = {
        name: torch.tensor([_total(value) for value in values]) for name, values in returned.items()
    }  # each (B,)
    totals = torch.stack(list(by_name.values()))  # (F, B)
    weights = torch.tensor([reward.weight for reward in rewards], dtype=totals.dtype).unsqueeze(1)  # (F, 1)
    applies = ~totals.isnan() & (weights != 0)  # (F, B)
    combined = torch.where(applies, weights * totals, 0.0).sum(0)  # (B,)
    first, full_mark = totals[0], rewards[0].full_mark
    judges = ~first.isnan() if full_mark is not None else torch.zeros_like(first, dtype=torch.bool)  # (B,)
    is_right = ((first - (full_mark or 0.0)).abs() <= 1e-6).to(first.dtype)
    return Scores(
        by_name=by_name,
        combined=combined.masked_fill(~applies.any(0), torch.nan),
        is_right=is_right.masked_fill(~judges, torch.nan),
        has_answer=torch.tensor([bool(rewards[0].has_answer(completion)) for completion in completions]),
        is_right_leniently=_leniently(rewards[0], samples, completions),
        token_rewards=sum(
            (reward.weight * _by_token(returned[reward.name], lengths) for reward in rewards if reward.weight),
            start=torch.zeros(len(lengths), max(lengths)),
        )
        if per_token
        else None,
    )


def _leniently(reward: Reward, samples: Sequence[dict[str, Any]], completions: Sequence[str]) -> Tensor:
    """(B,) 1.0 or 0.0; NaN where the reward knows no lenient way."""
    if reward.is_right_leniently is None:
        return torch.full((len(samples),), torch.nan)
    pairs = zip(samples, completions, strict=True)
    return torch.tensor([float(reward.is_right_leniently(sample, text)) for sample, text in pairs])


def text_of(completion: str | list[dict[str, str]]) -> str:
    """What the model wrote, be it given as text or as a message."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _like(prompt: Any, completion: str) -> Any:
    """The completion in the form of its prompt: a text, or a list with the assistant's message."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def _total(value: RewardValue) -> float:
    """Of one completion; NaN = not applicable."""
    return math.nan if value is None else float(sum(value) if isinstance(value, list) else value)


def _by_token(values: Sequence[RewardValue], lengths: Sequence[int]) -> Tensor:
    """(B, C): what each token earned, 0 behind the end; a reward for the whole completion stands on its last token."""
    table = torch.zeros(len(lengths), max(lengths))
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if isinstance(value, list):
            table[row, :length] = torch.tensor(value)
        elif value is not None:
            table[row, length - 1] = value
    return table


def _first_failing_row(fn: RewardFn, given: dict[str, Sequence[Any]]) -> int | None:
    """Which completion a function that raised on a batch raises on alone; None if it takes each of them."""
    for row in range(len(given["prompts"])):
        try:
            fn(**{name: values[row : row + 1] for name, values in given.items()})
        except Exception:
            return row
    return None


def _checked(name: str, values: Any, prompts: Sequence[str], lengths: Sequence[int] | None) -> list[RewardValue]:
    """One value a completion; lists of so many token rewards are allowed where `lengths` are given."""
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise RewardError(f"reward {name} returned {got} for {len(prompts)} completions, expected a list of as many")
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        if not isinstance(value, list):
            if value is not None and not _is_number(value):
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
        elif wrong := [item for item in value if not _is_number(item)]:
            raise RewardError(f"reward {name} returned {wrong[0]!r} in a list for {prompt!r}, expected finite numbers")
        elif not _is_number(sum(value)):
            raise RewardError(f"reward {name} returned a list for {prompt!r} whose sum is {sum(value)!r}: not finite")
    return list(values)
