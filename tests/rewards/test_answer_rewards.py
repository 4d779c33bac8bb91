"""Rewards for answers in their place: in tags, after a mark, in a box; and the form as a reward of its own."""

from typing import Any

import pytest

from grpo.errors import InputError
from grpo.rewards.reading.answers import after_mark, between_tags, boxed, in_tags
from reward_model import load_rewards, only_integer, score_completions, text_of


def values(name: Any, completions: list[str], answer: Any = "5") -> list[float]:
    samples = [{"prompt": "x", "answer": answer}] * len(completions)
    scores = score_completions(load_rewards([name]), samples, completions, [[1]] * len(completions))
    return scores.combined.tolist()


GSM8K = [
    ("<reasoning>2+3</reasoning><answer>5</answer>", 1.0),
    ("<answer>\n 5 \n</answer>", 1.0),
    ("#### 5", 1.0),
    ("4 #### 4\nno: #### 5\n", 1.0),
    ("<answer>$5.</answer>", 1.0),
    ("5", 0.0),  # right, but not where it was asked for
    ("<answer>5", 0.0),
    ("5</answer>", 0.0),
    ("<answer>5 or 6</answer>", 0.0),
    ("<answer>4</answer><answer>5</answer>", 1.0),  # the last one counts
    ("<answer>5</answer> <answer>4</answer>", 0.0),
    ("<answer>15</answer>", 0.0),
    ("<answer>3, 5</answer>", 0.0),
    ("<answer></answer> #### 5", 0.0),  # an answer, and an empty one
    ("#### \n5", 0.0),
    ("", 0.0),
]
BOXED = [
    (r"so \boxed{5}", 1.0),
    (r"\boxed{4} \boxed{5}", 1.0),
    (r"\boxed{5} \boxed{4}", 0.0),
    (r"\boxed{{5}}", 1.0),
    (r"\boxed{5", 0.0),
    (r"\boxed{\frac{1}{5}}", 0.0),
    (r"\boxed{x = 5}", 1.0),
    (r"\boxed{5.0}", 1.0),
    ("5", 0.0),
]


@pytest.mark.parametrize(("completion", "reward"), GSM8K)
def test_gsm8k_wants_the_number_in_its_place(completion: str, reward: float) -> None:
    assert values("gsm8k", [completion]) == [reward]


@pytest.mark.parametrize(("completion", "reward"), BOXED)
def test_a_box_holds_the_answer_and_nothing_else(completion: str, reward: float) -> None:
    assert values("boxed", [completion]) == [reward]


def test_leniently_an_answer_may_stand_anywhere() -> None:
    samples = [{"prompt": "x", "answer": "5"}] * 3
    scores = score_completions(load_rewards(["gsm8k"]), samples, ["it is 5", "6", "#### 5"], [[1]] * 3)
    assert scores.is_correct.tolist() == [0, 0, 1]
    assert scores.is_correct_leniently.tolist() == [1, 0, 1]
    math = score_completions(load_rewards(["math"]), samples, ["it is 5", "6", "#### 5"], [[1]] * 3)
    assert math.is_correct_leniently.isnan().all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1,234", "-1234"), ("\u22127", "-7"), ("$5$", "5"), (" 5. ", "5"), ("1,23", None), ("5 apples", None),
        ("--5", None), ("5-", None), ("\u0665", None), ("", None), ("1e3", None), ("0005", "5"),
        ("1{,}800", "1800"), (r"10,\!000", "10000"), (r"\$5", "5"), ("1{,}80", None),
    ],
)  # fmt: skip
def test_only_an_integer_is_one(text: str, expected: str | None) -> None:
    assert only_integer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<reasoning>a</reasoning>\n<answer>b</answer>\n", True),
        ("<answer>b</answer><reasoning>a</reasoning>", False),
        ("<reasoning>a</reasoning><answer>b</answer> more", False),
        ("so <reasoning>a</reasoning><answer>b</answer>", False),
        ("<reasoning>a</reasoning> <answer>b</answer><answer>b</answer>", False),
        ("<reasoning><reasoning>a</reasoning><answer>b</answer>", False),
        ("<reasoning>a<answer>b</answer></reasoning>", False),
        ("<reasoning></reasoning><answer></answer>", True),
        ("<reasoning></answer></reasoning><answer>never closed", False),
        ("</reasoning><reasoning><answer></answer>", False),
        ("", False),
    ],
)
def test_the_form_is_these_elements_and_nothing_else(text: str, expected: bool) -> None:
    assert in_tags(text, ("reasoning", "answer")) == expected
    assert values("format", [text]) == [0.5 * expected]


@pytest.mark.parametrize("find", [between_tags, after_mark, boxed, lambda text: in_tags(text, ("reasoning", "answer"))])
@pytest.mark.parametrize(
    "unit", ["<answer>", "</answer>", "####", "\\boxed{", "{", "}", "<reasoning></reasoning>", "\n"]
)
def test_a_hundred_kilobytes_take_no_time(find: Any, unit: str) -> None:
    import timeit

    text = unit * (100_000 // len(unit))
    assert min(timeit.repeat(lambda: find(text), number=1, repeat=3)) < 0.05


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "format", "tags": "answer"}, r"rewards: format: tags: got 'answer', expected names"),
        ({"name": "format", "tags": ["a b"]}, r"rewards: format: tags: got \['a b'\], expected names"),
        ({"name": "format", "tags": 5}, r"rewards: format: tags: got 5, expected names"),
        (
            {"name": "soft_format", "tags": ["a", "a"]},
            r"rewards: soft_format: tags: got \['a', 'a'\], expected each name",
        ),
        ({"name": "integer", "tag": 5}, r"rewards: integer: tag: got 5, expected a name"),
        ({"name": "correctness", "tag": "<answer>"}, r"rewards: correctness: tag: got '<answer>', expected a name"),
        (
            {"name": "gsm8k", "correct_reward": 0, "wrong_reward": 1},
            r"gsm8k: correct_reward: got 0, expected more than wrong_reward \(1\)",
        ),
        ({"name": "format", "reward": "much"}, r"rewards: format: reward: got 'much', expected a finite number"),
        ({"name": "gsm8k", "correct_reward": None}, r"rewards: gsm8k: correct_reward: got None"),
    ],
)
def test_wrong_arguments_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_rewards([spec])


# Prompts as messages


def test_messages_get_messages_as_in_trl() -> None:
    seen: list[Any] = []

    def fn(prompts: list, completions: list, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    from reward_model import Reward

    messages = [{"role": "user", "content": "x"}]
    samples = [{"prompt": messages, "prompt_ids": [1]}, {"prompt": "y", "prompt_ids": [2]}]
    score_completions([Reward("fn", fn, 1.0)], samples, ["a", "b"], [[1], [1]])
    assert seen == [(messages, [{"role": "assistant", "content": "a"}]), ("y", "b")]
    assert [text_of(completion) for _, completion in seen] == ["a", "b"]


def test_our_own_rewards_take_messages() -> None:
    samples = [{"prompt": [{"role": "user", "content": "x"}], "answer": "5"}]
    for name, text in [("math", "5"), ("gsm8k", "#### 5"), ("boxed", r"\boxed{5}")]:
        assert score_completions(load_rewards([name]), samples, [text], [[1]]).combined.tolist() == [1.0]
