"""Entries of the config -> rewards: names, arguments, columns, and what a function says of itself."""

from typing import Any

import numpy as np
import pytest

from grpo.errors import InputError
from reward_model import Reward, RewardError, check_samples, load_rewards, required_columns, score_completions
from tests import toy_rewards

MINE = "tests.toy_rewards:"


def scores(spec: Any, *completions: str, **sample: Any) -> list[float]:
    samples = [{"prompt": "p", **sample}] * len(completions)
    return score_completions(load_rewards([spec]), samples, completions, [[1]] * len(completions)).combined.tolist()


# Arguments and columns


def test_a_function_may_name_what_it_wants_and_no_more() -> None:
    assert scores(f"{MINE}brief", "ab", "abcd", answer="5", level=3) == [1, 0]
    assert scores({"name": f"{MINE}brief", "limit": 1}, "ab") == [0]


def test_an_argument_of_the_config_comes_before_a_column_of_its_name() -> None:
    (reward,) = load_rewards([{"name": f"{MINE}scaled", "scale": 3.0}])
    assert reward.fn(prompts=["p"], completions=["a"], scale=[9.0]) == [3.0]


def test_a_column_is_no_argument() -> None:
    """It would be taken and ignored, and rows without the column be scored without it."""
    assert required_columns(load_rewards([f"{MINE}needs_colour"])[0]) == {"colour"}
    with pytest.raises(InputError, match=r"needs_colour: got 'colour', which has no default in the function and so is"):
        load_rewards([{"name": f"{MINE}needs_colour", "colour": "red"}])


def test_what_every_function_is_given_is_no_argument() -> None:
    with pytest.raises(InputError, match="scaled: got 'prompts', allowed: weight, as, scale"):
        load_rewards([{"name": f"{MINE}scaled", "prompts": ["x"]}])


# Names


def test_a_reward_may_stand_there_twice_under_two_names() -> None:
    long, short = {"name": f"{MINE}brief", "as": "long", "limit": 9}, {"name": f"{MINE}brief", "as": "short"}
    rewards = load_rewards([long, short])
    assert [reward.name for reward in rewards] == ["long", "short"]
    assert list(score_completions(rewards, [{"prompt": "p"}], ["abcd"], [[1]]).by_name) == ["long", "short"]
    with pytest.raises(InputError, match=r"got brief, brief: brief twice; \{name: brief, as: …\} gives another name"):
        load_rewards([long | {"as": "brief"}, short | {"as": "brief"}])


# What TRL's trainer has, and this one has not


def test_an_async_function_is_refused() -> None:
    with pytest.raises(InputError, match="waits: got an async function, expected a function that returns its values"):
        load_rewards([f"{MINE}waits"])


def test_what_only_trl_gives_is_named() -> None:
    with pytest.raises(InputError, match="logs: needs log_metric, which only TRL's own trainer gives"):
        load_rewards([f"{MINE}logs"])


# What goes wrong


def test_a_function_that_ends_the_process_does_not() -> None:
    """The run would end with status 0, nothing saved."""
    with pytest.raises(RewardError, match=r"exits raised SystemExit: 0 \(toy_rewards.py, line \d+\) for prompt 'p'"):
        scores(f"{MINE}exits", "a")


def test_an_error_of_several_lines_is_told_in_one() -> None:
    reward = Reward("r", lambda **_: int("a\n\nb"), 1.0)
    with pytest.raises(RewardError, match=r"reward r raised ValueError: .*") as raised:
        score_completions([reward], [{"prompt": "p"}], ["a"], [[1]])
    assert "\n" not in str(raised.value)
    reward = Reward("r", lambda **_: broken_in_lines(), 1.0)
    with pytest.raises(RewardError, match=r"reward r raised ValueError: one two \(") as raised:
        score_completions([reward], [{"prompt": "p"}], ["a"], [[1]])


def broken_in_lines() -> None:
    raise ValueError("one\n  two")


def test_a_module_that_ends_the_process_is_wrong_input(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="rewards: ends_at_once:fn: cannot be used: SystemExit: 0"):
        load_rewards(["ends_at_once:fn"])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("full_mark", "one", "got 'one', expected a number"),
        ("full_mark", float("nan"), "got nan, expected a number"),
        ("lowest", None, "got None, expected a number"),
        ("has_answer", True, "got True, expected a function"),
        ("check_sample", "x", "got 'x', expected a function"),
        ("is_correct_leniently", None, "got None, expected a function"),
    ],
)
def test_an_attribute_that_is_none_is_wrong_input(
    attribute: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_rewards.brief, attribute, value, raising=False)
    with pytest.raises(InputError, match=f"rewards: {MINE}brief: its attribute {attribute}: {message}"):
        load_rewards([f"{MINE}brief"])


def broken(*_: Any) -> float:
    return 1 / 0


def test_an_array_is_no_list() -> None:
    with pytest.raises(
        RewardError, match=r"returned ndarray for 1 completions, expected a list of as many: use .tolist"
    ):
        score_completions([Reward("r", lambda **_: np.ones(1), 1.0)], [{"prompt": "p"}], ["a"], [[1]])


def test_an_answer_that_is_neither_true_nor_false_is_named() -> None:
    reward = Reward("r", lambda **_: [1.0], 1.0, has_answer=lambda text: np.ones(2))
    with pytest.raises(
        RewardError, match="reward r: its attribute has_answer raised ValueError: The truth value of an"
    ):
        score_completions([reward], [{"prompt": "p"}], ["a"], [[1]])


@pytest.mark.parametrize("name", ["Scorer", "by_place"])
def test_what_cannot_be_called_by_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: (got a class, expected a function|has parameters without a name)"):
        load_rewards([f"{MINE}{name}"])


@pytest.mark.parametrize("attribute", ["has_answer", "is_correct_leniently"])
def test_an_attribute_that_raises_is_named(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_rewards.brief, attribute, broken, raising=False)
    message = f"reward {MINE}brief: its attribute {attribute} raised ZeroDivisionError: division by zero, for .*'ab'"
    with pytest.raises(RewardError, match=message):
        scores(f"{MINE}brief", "ab")


def test_a_check_that_raises_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_rewards.brief, "check_sample", lambda sample: sample["level"], raising=False)
    message = f"row 2: reward {MINE}brief: its attribute check_sample raised KeyError: 'level'"
    with pytest.raises(InputError, match=message):
        check_samples(
            load_rewards([f"{MINE}brief"]), [{"prompt": "p", "level": 1}, {"prompt": "p"}], lambda row: f"row {row + 1}"
        )


def test_the_former_name_of_an_attribute_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_rewards.brief, "is_right_leniently", lambda sample, completion: True, raising=False)
    (reward,) = load_rewards(["tests.toy_rewards:brief"])
    assert reward.is_correct_leniently is toy_rewards.brief.is_right_leniently
