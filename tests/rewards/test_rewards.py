"""Rewards: which number a text ends with, how scores combine, and errors that name the function."""

import math
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.errors import InputError
from reward_model import (
    MathRewardModel,
    Reward,
    RewardError,
    Scores,
    check_samples,
    last_integer,
    load_rewards,
    nan_std,
    required_columns,
    score_completions,
)

NAN = float("nan")

LAST_INTEGER = [
    # the rows of PITFALLS.md
    ("5 or 6", "6"),
    ("1,234", "1234"),
    ("\u22127", "-7"),  # unicode minus
    ("12-7", "7"),  # after a digit a minus is an operator
    ("5.0", "5"),
    ("3.5", None),
    ("007", "7"),
    ("", None),
    ("x=5 y", "5"),
    ("9**9**9", "9"),  # never eval
    # nothing to find
    ("no number here", None),
    ("-", None),
    (".", None),
    ("five", None),
    ("\n\t ", None),
    # signs
    ("-7", "-7"),
    ("x-3", "-3"),
    ("(-7)", "-7"),
    ("= -12.", "-12"),
    ("12\u22127", "7"),
    ("12 - 7", "7"),
    ("12 -7", "-7"),
    ("12--7", "-7"),
    ("-0", "0"),
    ("\u22120.0", "0"),
    ("+5", "5"),
    # thousands groups, and lists that only look like them
    ("1,234,567", "1234567"),
    ("-1,234", "-1234"),
    ("1,234.00", "1234"),
    ("12,34", "34"),
    ("1234,567", "567"),
    ("7,8", "8"),
    ("7,-8", "-8"),
    ("-7,8", "8"),
    ("7, 8", "8"),
    ("1,234,", "1234"),
    ("0,123", "123"),
    ("1,2345", "2345"),
    # decimals are no integers, and never give their digits away
    ("3.50", None),
    ("1,234.5", None),
    (".5", None),
    ("-.5", None),
    ("1.2.3", None),
    ("it is 4, or 3.5", None),  # the last number decides; an earlier integer does not step in
    ("3.5 or 4", "4"),
    # sentences around the number
    ("The answer is 42.", "42"),
    ("42!", "42"),
    ("wait...5", "5"),
    ("\\boxed{17}", "17"),
    ("#### 18", "18"),
    ("$1,000", "1000"),
    ("50%", "50"),
    ("7+8=15 4+3+1=8 85", "85"),
    ("85 = 85", "85"),
    ("1 2 3 4 5 6 7 8 9 10", "10"),  # every answer is not the right answer
    ("5\n", "5"),
    # digits of other scripts do not count
    ("\u0665", None),  # Arabic-Indic 5
    ("\uff15", None),  # fullwidth 5
    ("\u00bd", None),
    ("x\u00b2", None),
    ("5\u00b2", "5"),
    ("4 \u0665", "4"),
    # zeros
    ("0", "0"),
    ("000", "0"),
    ("0.000", "0"),
    ("100", "100"),
]


@pytest.mark.parametrize(("text", "expected"), LAST_INTEGER)
def test_last_integer_where_others_take_the_first_number_a_substring_or_eval(text: str, expected: str | None) -> None:
    assert last_integer(text) == expected


def test_the_table_is_long_and_without_repetition() -> None:
    texts = [text for text, _ in LAST_INTEGER]
    assert len(set(texts)) == len(texts) >= 40


ADVERSARIAL = [
    *("1", "-", ".", ",", "\u2212", " ", "a", "0"),
    *("1,", "1.", ".1", "-1", "1-", "1,111", "1,234,", "1.1,", "--", "..", "9**", "\u0665"),
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ADVERSARIAL)
@pytest.mark.parametrize("tail", ["", "x", "."])
def test_adversarial_texts_of_100_kilobytes_are_fast(unit: str, tail: str) -> None:
    text = unit * (100_000 // len(unit)) + tail
    find = last_integer.__wrapped__  # what it remembers would be too fast
    assert (
        min(timeit.repeat(lambda: find(text), number=1, repeat=3)) < 0.5
    )  # the best of three: a busy machine is no fault
    found = find(text)
    assert found is None or found.lstrip("-").isascii()


def test_huge_digit_runs_are_compared_and_never_converted() -> None:
    digits = "7" * 10_000
    with pytest.raises(ValueError, match="4300"):
        int(digits)
    assert last_integer(f"so {digits}.") == digits
    assert last_integer(f"-{digits}") == f"-{digits}"
    assert last_integer("0" * 10_000 + "5") == "5"
    model = MathRewardModel()
    assert model.compute_reward({"answer": digits}, digits) == 1.0
    assert model.compute_reward({"answer": digits}, digits + "7") == 0.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(number=st.integers(-(10**12), 10**12), before=st.text(alphabet="abc =+.,123", max_size=12))
def test_every_way_to_write_an_integer_is_read_as_that_integer(number: int, before: str) -> None:
    for written in (f"{number}", f"{number:,}", f"{number}.0", f"{number:,}.", f"{number}".replace("-", "\u2212")):
        assert last_integer(f"{before} {written}") == str(number)
    assert last_integer(f"{before} {number}.5") is None


# Right or wrong


@pytest.mark.parametrize("answer", [5, "5", " 5", "5.0", 5.0, "005", "#### 5"])
def test_an_answer_may_be_a_json_number_or_a_text(answer: Any) -> None:
    model = MathRewardModel()
    assert model.compute_reward({"answer": answer}, "2+3=5") == 1.0
    assert model.compute_reward({"answer": answer}, "-5") == 0.0


def test_a_completion_without_a_number_is_wrong_whatever_the_answer() -> None:
    for answer in (0, -1, 5):
        assert MathRewardModel().compute_reward({"answer": answer}, "none") == 0.0


@pytest.mark.parametrize("answer", ["five", None, "3.5", "", True, False, [5], {"value": 5}])
def test_an_answer_that_is_no_integer_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="answer"):
        MathRewardModel().compute_reward({"answer": answer}, "5")


def test_the_marks_are_settings() -> None:
    model = MathRewardModel(correct_reward=2.0, wrong_reward=-0.5)
    assert [model.compute_reward({"answer": 5}, text) for text in ("5", "6")] == [2.0, -0.5]


# Scoring and combining


def returning(*values: Any) -> Callable[..., Any]:
    return lambda prompts, completions, **_: list(values)


def entry(name: str, fn: Callable[..., Any], weight: float = 1.0, full_mark: float = 1.0) -> Reward:
    return Reward(name, fn, weight, full_mark)


def score(rewards: Sequence[Reward], num_rows: int = 3) -> Scores:
    samples = [{"prompt": f"prompt {row}", "answer": row} for row in range(num_rows)]
    return score_completions(
        rewards, samples, [str(row) for row in range(num_rows)], [[row] for row in range(num_rows)]
    )


def same(tensor: torch.Tensor, *expected: float) -> bool:
    return torch.equal(tensor.isnan(), torch.tensor(expected).isnan()) and torch.allclose(
        tensor.nan_to_num(0), torch.tensor(expected).nan_to_num(0), rtol=0, atol=1e-6
    )


def test_rewards_combine_by_weight_over_those_that_apply() -> None:
    rewards = [
        entry("a", returning(1.0, 0.0, None, None), weight=2.0),
        entry("b", returning(0.5, None, 1.0, None), weight=-1.0),
        entry("logged", returning(100.0, 100.0, None, 100.0), weight=0),
    ]
    scores = score(rewards, num_rows=4)
    # 2 * 1 - 0.5 · 2 * 0 · -1 · none of non-zero weight applies: NaN, not 0
    assert same(scores.combined, 1.5, 0.0, -1.0, NAN)
    assert same(scores.by_name["a"], 1.0, 0.0, NAN, NAN)
    assert same(scores.by_name["logged"], 100.0, 100.0, NAN, 100.0)
    assert same(scores.is_correct, 1.0, 0.0, NAN, NAN)


def test_metrics_by_hand() -> None:
    rewards = [entry("a", returning(1.0, 0.0, None), weight=2.0), entry("b", returning(0.5, None, None), weight=0)]
    row = score(rewards).metrics()
    # combined 2, 0, NaN: mean 1, unbiased std sqrt(2); a: mean 0.5, std sqrt(0.5); b: one value, no std
    assert row == pytest.approx(
        {
            "reward": 1.0,
            "reward_std": math.sqrt(2),
            "rewards/a/mean": 0.5,
            "rewards/a/std": math.sqrt(0.5),
            "rewards/b/mean": 0.5,
            "rewards/b/std": 0.0,
        }
    )
    assert nan_std(torch.tensor([NAN, NAN])) == 0.0


def test_is_right_uses_the_full_mark_of_the_first_reward() -> None:
    first = entry("a", returning(0.3, 1.0, None), full_mark=0.3)
    second = entry("b", returning(1.0, 1.0, 1.0), weight=5.0)
    assert same(score([first, second]).is_correct, 1.0, 0.0, NAN)
    assert same(score([second, first]).is_correct, 1.0, 1.0, 1.0)
    # Weight 0 leaves it the measure of what is right.
    assert same(score([entry("a", returning(0.3, 1.0, None), 0.0, 0.3), second]).is_correct, 1.0, 0.0, NAN)


def test_the_full_mark_of_math_is_its_correct_reward() -> None:
    rewards = load_rewards([{"name": "math", "correct_reward": 2.0, "wrong_reward": 1.0, "weight": 0.5}])
    samples = [{"prompt": "p", "answer": 5}] * 2
    scores = score_completions(rewards, samples, ["5", "6"], [[5], [6]])
    assert same(scores.combined, 1.0, 0.5)
    assert same(scores.is_correct, 1.0, 0.0)  # 1.0 is what a wrong completion gets here
    assert rewards[0].full_mark == 2.0


def test_functions_get_the_arguments_of_trl() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(prompts)

    samples = [{"prompt": "p", "answer": 1}, {"prompt": "q", "level": "hard"}]
    score_completions([entry("spy", spy)], samples, ["x", "y"], [[7, 8], [9]])
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["x", "y"],
        "completion_ids": [[7, 8], [9]],
        "answer": [1, None],  # the union of the columns; None where a sample has not got it
        "level": [None, "hard"],
    }


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "colour"])
def test_a_reward_that_edits_its_lists_edits_no_others(name: str) -> None:
    seen: list[dict[str, Any]] = []

    def editing(**lists: list[Any]) -> list[float]:
        lists[name][:] = [None, None]
        return [0.0, 0.0]

    def watching(**lists: list[Any]) -> list[float]:
        seen.append(lists)
        return [0.0, 0.0]

    completions = ["5", "6"]
    samples = [{"prompt": "p", "colour": "red"}, {"prompt": "q", "colour": "blue"}]
    score_completions([entry("editing", editing), entry("watching", watching)], samples, completions, [[5], [6]])
    expected = {
        "prompts": ["p", "q"],
        "completions": ["5", "6"],
        "completion_ids": [[5], [6]],
        "colour": ["red", "blue"],
    }
    assert seen == [expected]
    assert completions == ["5", "6"]  # the caller writes them to samples.jsonl


def test_a_bad_answer_in_the_data_names_the_reward() -> None:
    with pytest.raises(RewardError, match=r"reward math raised ValueError.*answer"):
        score_completions(load_rewards(["math"]), [{"prompt": "p", "answer": "five"}], ["5"], [[5]])


def test_integers_bools_and_numpy_numbers_are_numbers() -> None:
    assert same(score([entry("a", returning(1, True, np.float32(0.5)))]).combined, 1.0, 1.0, 0.5)


# The config's list


def test_an_unknown_reward_is_an_input_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="rewards: got 'maths', allowed: math"):
        load_rewards(["maths"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([5], "rewards: got 5"),
        ([{"weight": 1.0}], "rewards: got"),
        ([{"name": "math", "weight": "much"}], "weight: got 'much'"),
        ([{"name": "math", "weight": NAN}], "weight: got nan"),
        ([{"name": "math", "weight": True}], "weight: got True"),
        ([{"name": "math", "weight": 0}], "weight 0"),
        ([{"name": "math", "mark": 1.0}], "rewards: math: .*mark"),
        (["math", {"name": "math", "weight": 0.5}], "math, math"),
        (["no_such_module:fn"], "no_such_module"),
        (["math:no_such_function"], "no_such_function"),
    ],
)
def test_a_wrong_entry_is_an_input_error_that_names_it(specs: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_rewards(specs)


MODULE = """
def count(prompts, completions, level, letter="a", **_):
    return [float(text.count(letter)) for text in completions]

count.full_mark = 3.0

def plain(prompts, completions, **_):
    return [1.0 for _ in prompts]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_of_a_user"


def test_module_function_works(module: str) -> None:
    rewards = load_rewards([f"{module}:count", {"name": f"{module}:plain", "weight": 0.5}])
    assert [reward.full_mark for reward in rewards] == [3.0, 1.0]  # 1.0 where undeclared
    samples = [{"prompt": "p", "level": 1}] * 2
    scores = score_completions(rewards, samples, ["banana", "b"], [[1], [2]])
    assert same(scores.combined, 3.5, 0.5)
    assert same(scores.is_correct, 1.0, 0.0)


def test_arguments_of_the_config_reach_the_function(module: str) -> None:
    (reward,) = load_rewards([{"name": f"{module}:count", "letter": "n", "weight": 2.0}])
    assert reward.full_mark == 3.0
    assert required_columns(reward) == {"level"}
    assert same(score_completions([reward], [{"prompt": "p", "level": 1}], ["banana"], [[1]]).combined, 4.0)


def test_columns_a_reward_needs_are_checked_and_the_place_is_named(module: str) -> None:
    rewards = load_rewards(["math", f"{module}:count"])
    assert [required_columns(reward) for reward in rewards] == [{"answer"}, {"level"}]
    samples = [{"prompt": "p", "answer": 1, "level": 1}, {"prompt": "q", "answer": 2}]
    with pytest.raises(InputError, match=r'file, line 2: has no "level", which reward rewards_of_a_user:count needs'):
        check_samples(rewards, samples, lambda index: f"file, line {index + 1}")
    assert check_samples(rewards, samples[:1], str) is None


@pytest.mark.parametrize("answer", ["0.5", "", "five", None, True, 0.5])
def test_an_answer_without_an_integer_is_found_before_any_compute(answer: object) -> None:
    samples = [{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": answer}]
    with pytest.raises(InputError, match=r"file, line 2: reward math: \"answer\" of 'q' must be an integer, got"):
        check_samples(load_rewards(["math"]), samples, lambda index: f"file, line {index + 1}")


def test_what_an_answer_is_says_the_first_reward() -> None:
    texts = ["so 5", "no idea", " ", "3.5"]
    samples = [{"prompt": "p", "answer": 1}] * 4
    assert score_completions(load_rewards(["math"]), samples, texts, [[1]] * 4).has_answer.tolist() == [
        True, False, False, False,
    ]  # fmt: skip
    (any_text,) = load_rewards(["tests.toy_rewards:even_digits"])
    assert score_completions([any_text], samples, texts, [[1]] * 4).has_answer.tolist() == [True, True, False, True]


def test_of_several_rewards_the_first_says_what_an_answer_is() -> None:
    math_first = load_rewards(["math", "tests.toy_rewards:even_digits"])
    for rewards, has_answer in [(math_first, False), (math_first[::-1], True)]:
        scores = score_completions(rewards, [{"prompt": "p", "answer": 1}], ["no idea"], [[1]])
        assert scores.has_answer.tolist() == [has_answer]


def test_an_answer_given_as_a_json_number_is_read_in_full() -> None:
    model = MathRewardModel()
    assert model.compute_reward({"answer": 1e20}, "20") == 0.0
    assert model.compute_reward({"answer": 1e20}, "100000000000000000000") == 1.0
    for answer in (1e-5, 0.5, float("inf"), "none"):
        with pytest.raises(ValueError, match="must be an integer"):
            model.compute_reward({"answer": answer}, "-5")


@pytest.mark.parametrize("value", [10**400, 1e39, -1e39])
def test_a_reward_that_float32_cannot_hold_is_refused(value: float) -> None:
    reward = Reward("huge", lambda prompts, completions, **_: [value], 1.0, 1.0)
    with pytest.raises(RewardError, match="huge"):
        score_completions([reward], [{"prompt": "p"}], ["c"], [[1]])


@pytest.mark.parametrize("name", ["tests.toy_rewards:pi", ":fn", "..x:fn", "tests.toy_rewards:missing", "a.b.c:d"])
def test_what_is_no_importable_function_is_wrong_input(name: str) -> None:
    with pytest.raises(InputError, match="rewards: "):
        load_rewards([name])


@pytest.mark.parametrize("mark", ["x", float("nan"), None, float("inf")])
def test_the_full_mark_must_be_a_number(mark: object) -> None:
    with pytest.raises(InputError, match="rewards: math: correct_reward: got"):
        load_rewards([{"name": "math", "correct_reward": mark}])


def test_a_misspelt_argument_of_a_users_reward_is_named() -> None:
    """Without the check **kwargs would swallow it, and the weight would silently stay 1."""
    (reward,) = load_rewards([{"name": "tests.toy_rewards:scaled", "scale": 3.0, "weight": 0.5}])
    assert reward.fn(prompts=["p"], completions=["c"]) == [3.0]
    with pytest.raises(
        InputError, match=r"tests.toy_rewards:scaled: got 'wieght', allowed: weight, as, scale; did you mean weight"
    ):
        load_rewards([{"name": "tests.toy_rewards:scaled", "wieght": 0.5}])


def test_a_raising_reward_is_reported_with_its_place() -> None:
    with pytest.raises(
        RewardError, match=r"tests.toy_rewards:raises raised KeyError: 'oops' \(toy_rewards.py, line \d+\)"
    ):
        score_completions(load_rewards(["tests.toy_rewards:raises"]), [{"prompt": "p"}], ["c"], [[1]])


def test_an_answer_that_is_no_integer_is_reported_with_its_prompt() -> None:
    with pytest.raises(RewardError, match=r"\"answer\" of 'What is 1 / 2\?' must be an integer, got '0.5'"):
        score_completions(load_rewards(["math"]), [{"prompt": "What is 1 / 2?", "answer": "0.5"}], ["c"], [[1]])


def test_a_raising_reward_names_the_sample_it_raises_on() -> None:
    def picky(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    samples = [{"prompt": prompt} for prompt in ("p", "q", "r")]
    with pytest.raises(RewardError, match=r"reward picky raised ZeroDivisionError: .* for prompt 'q', completion ''$"):
        score_completions([entry("picky", picky)], samples, ["a", "", ""], [[1]] * 3)


def test_a_reward_that_raises_on_the_batch_alone_names_no_sample() -> None:
    def wary(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        if len(prompts) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"reward wary raised ValueError: too many \(test_rewards.py, line \d+\)$"):
        score_completions([entry("wary", wary)], [{"prompt": "p"}] * 2, ["a", "b"], [[1]] * 2)


# Rewards of single tokens


def score_tokens(rewards: list[Reward], lengths: list[int]) -> Scores:
    """Completions of so many tokens each, with `per_token`."""
    samples = [{"prompt": f"prompt {row}"} for row in range(len(lengths))]
    ids = [[7] * length for length in lengths]
    return score_completions(rewards, samples, ["x" * length for length in lengths], ids, per_token=True)


def test_token_rewards_combine_by_weight_and_a_whole_reward_stands_on_the_last_token() -> None:
    rewards = [
        entry("a", returning([0.1, 0.2, 0.3], [1.0], None, None), weight=2.0),
        entry("b", returning(0.5, None, 4.0, None), weight=-1.0),
        entry("logged", returning([9.0, 9.0, 9.0], 9.0, [9.0, 9.0], 9.0), weight=0),
    ]
    scores = score_tokens(rewards, [3, 1, 2, 2])
    expected = [[0.2, 0.4, 0.1], [2.0, 0.0, 0.0], [0.0, -4.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.allclose(scores.token_rewards, torch.tensor(expected))
    assert same(scores.by_name["a"], 0.6, 1.0, NAN, NAN)
    assert same(scores.by_name["logged"], 27.0, 9.0, 18.0, 9.0)
    assert same(scores.combined, 0.7, 2.0, -4.0, NAN)  # sums of the rows, and NaN where nothing applies
    assert same(scores.is_correct, 0.0, 1.0, NAN, NAN)  # the sum is what is compared with the full mark


def test_without_asking_there_are_no_token_rewards() -> None:
    assert score([entry("a", returning(1.0, 0.0, None))]).token_rewards is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, [0.5]], "reward mine returned 1 token rewards for 'prompt 1', whose completion has 2 tokens"),
        ([1.0, []], "reward mine returned 0 token rewards for 'prompt 1', whose completion has 2 tokens"),
        ([[0.0, 0.0, NAN], 0.0], "reward mine returned nan in a list for 'prompt 0', expected finite numbers"),
        ([[0.0, None, 0.0], 0.0], "reward mine returned None in a list for 'prompt 0', expected finite numbers"),
        ([[0.0, "1", 0.0], 0.0], "reward mine returned '1' in a list for 'prompt 0', expected finite numbers"),
        ([[1e300, 0.0, 0.0], 0.0], "reward mine returned 1e+300 in a list for 'prompt 0', expected finite numbers"),
        ([NAN, 0.0], "reward mine returned nan for 'prompt 0', expected a finite number or None"),
        ([[1.0] * 3], "reward mine returned 1 values for 2 completions, expected a list of as many"),
    ],
)
def test_wrong_token_rewards_are_reported_with_function_and_sample(values: list[Any], message: str) -> None:
    with pytest.raises(RewardError) as raised:
        score_tokens([entry("mine", returning(*values))], [3, 2])
    assert str(raised.value) == message


def test_token_rewards_are_refused_where_a_completion_has_one_advantage() -> None:
    with pytest.raises(RewardError) as raised:
        score([entry("mine", returning(1.0, [0.5, 0.5]))], num_rows=2)
    assert str(raised.value).startswith("reward mine returned a list for 'prompt 1', expected one number or None")
    assert "examples/train_ppo.py" in str(raised.value)


# Some of the completions


def test_scores_can_be_taken_apart_and_put_together() -> None:
    rewards = [entry("a", returning(1.0, 0.0, None, 0.5)), entry("b", returning(None, 1.0, None, 2.0), weight=0.5)]
    whole = score(rewards, num_rows=4)
    parts = [whole.select(torch.tensor([2, 0])), whole.select(torch.tensor([3]))]
    assert same(parts[0].combined, NAN, 1.0)
    again = Scores.cat(parts)
    assert same(again.combined, NAN, 1.0, 1.5)
    assert same(again.by_name["b"], NAN, NAN, 2.0)
    assert same(again.is_correct, NAN, 1.0, 0.0)
    assert again.has_answer.tolist() == [True] * 3
    chosen = score_tokens(rewards, [1, 2, 1, 2]).select(torch.tensor([3, 1]))
    assert chosen.token_rewards is not None
    assert chosen.token_rewards.tolist() == [[0.0, 1.5], [0.0, 0.5]]


# Too long


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (20, -1.0), (21, -1.0)]
)
def test_overlong_falls_from_0_to_minus_1_over_the_cache(length: int, expected: float) -> None:
    """max_length 20, cache 8: DAPO's equation 13 by hand."""
    (reward,) = load_rewards([{"name": "overlong", "max_length": 20, "cache": 8}])
    value = score_completions([reward], [{"prompt": "p"}], ["x"], [[7] * length]).combined.item()
    assert value == expected
    assert math.copysign(1, value) == (1 if expected == 0 else -1)


@pytest.mark.parametrize("cache", [1, 5, 12])
def test_overlong_is_that_of_trl(cache: int) -> None:
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=12, soft_punish_cache=cache)
    (ours,) = load_rewards([{"name": "overlong", "max_length": 12, "cache": cache}])
    ids = [[7] * length for length in range(1, 16)]
    values = ours.fn(prompts=[""] * 15, completions=[""] * 15, completion_ids=ids)
    assert values == pytest.approx(theirs(completion_ids=ids))


def test_overlong_calls_nothing_right_or_wrong() -> None:
    overlong = {"name": "overlong", "max_length": 4, "cache": 2, "weight": 0.5}
    samples, ids = [{"prompt": "p", "answer": 5}] * 2, [[7] * 2, [7] * 3]
    second = score_completions(load_rewards(["math", overlong]), samples, ["5", "5"], ids)
    assert same(second.combined, 1.0, 0.75)
    assert same(second.is_correct, 1.0, 1.0)
    first = score_completions(load_rewards([overlong, "math"]), samples, ["5", "5"], ids)
    assert same(first.combined, 1.0, 0.75)
    assert same(first.is_correct, NAN, NAN)  # not 0: there is no accuracy then, instead of a wrong one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 4, "cache": 5}, "cache: got 5, expected a whole number in 1 ... max_length (4)"),
        ({"max_length": 4, "cache": 0}, "cache: got 0, expected a whole number in 1 ... max_length (4)"),
        ({"max_length": 4, "cache": 1.5}, "cache: got 1.5, expected a whole number in 1 ... max_length (4)"),
        ({"max_length": 4, "cache": True}, "cache: got True, expected a whole number in 1 ... max_length (4)"),
        ({"max_length": 0, "cache": 1}, "max_length: got 0, expected a whole number >= 1"),
        ({"max_length": "x", "cache": 1}, "max_length: got 'x', expected a whole number >= 1"),
    ],
)
def test_wrong_arguments_of_overlong_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_rewards([{"name": "overlong", **arguments}])
    assert str(raised.value) == f"rewards: overlong: {message}"


def test_overlong_must_be_told_how_long_is_too_long() -> None:
    with pytest.raises(InputError, match=r"^rewards: overlong: got no cache"):
        load_rewards([{"name": "overlong", "max_length": 9}])
