"""Right or wrong where the answer has a place: after ####, in <answer>, in a box. What stands there is all of it.

The row's "answer" is compared as a number where it is one, so that 72.0, 72 and \\frac{144}{2} are the same, and as a
text otherwise. Leniently, for evaluations, it may stand anywhere.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from grpo.rewards.arguments import check_flag, check_numbers, check_rewards, check_tag
from grpo.rewards.base import RewardFn, RewardValue, declare, text_of
from grpo.rewards.reading.answers import after_mark, between_tags, boxed
from grpo.rewards.reading.formulas import plain_latex, same_latex
from grpo.rewards.reading.numerals import last_integer, number, only_integer
from grpo.rewards.reading.symbolic import Equality, symbolic_equality

Find = Callable[[str], str | None]


def expected_text(sample: dict[str, Any]) -> str:
    """What the sample's "answer" holds: all of it, or what stands behind its #### or in its box.

    >>> [expected_text({"answer": answer}) for answer in ["5 * 3 = 15\\n#### 15", "so \\\\boxed{x+1}.", 72.0, "7"]]
    ['15', 'x+1', '72', '7']
    """
    answer = sample["answer"]
    if isinstance(answer, float) and abs(answer) < float("inf"):
        answer = format(Decimal(repr(answer)), "f").removesuffix(".0")  # not 1e-05
    text = str(answer) if type(answer) in (str, int) else ""  # a bool is an int, too
    found = boxed(text) or after_mark(text) or text.strip()
    if not plain_latex(found):  # "$" is nothing, too: the empty answer would be right
        raise ValueError(f'"answer" of {sample.get("prompt")!r} must be a text or a number, got {sample["answer"]!r}')
    return found


def expected_number(sample: dict[str, Any]) -> str:
    """The same, where it must be a number."""
    text = expected_text(sample)
    if number(text) is None:
        raise ValueError(f'"answer" of {sample.get("prompt")!r} must be a number, got {sample["answer"]!r}')
    return text


def _judge(
    find: Find,
    is_same: Equality,
    expected: Callable[[dict[str, Any]], str],
    correct_reward: float,
    wrong_reward: float,
) -> RewardFn:
    """`correct_reward` where what `find` finds is the expected answer, else `wrong_reward`."""
    check_rewards(correct_reward=correct_reward, wrong_reward=wrong_reward)

    def judge_fn(prompts: list, completions: list, answer: list, **_: Any) -> list[RewardValue]:
        values: list[RewardValue] = []
        for prompt, completion, own in zip(prompts, completions, answer, strict=True):
            found, wanted = find(text_of(completion)), expected({"prompt": prompt, "answer": own})
            is_correct = found is not None and is_same(wanted, found, text_of(prompt))
            values.append(correct_reward if is_correct else wrong_reward)
        return values

    def is_correct_leniently(sample: dict[str, Any], completion: str) -> bool:
        wanted, found = expected(sample), find(completion)
        integer = only_integer(wanted)
        if integer is not None and last_integer(completion) == integer:
            return True
        return found is not None and is_same(wanted, found, text_of(sample["prompt"]))

    return declare(
        judge_fn,
        full_mark=correct_reward,
        lowest=wrong_reward,
        has_answer=lambda completion: find(completion) is not None,
        check_sample=expected,
        is_correct_leniently=is_correct_leniently,
    )


def same_number(expected: str, found: str, prompt: str = "") -> bool:
    """Both are numbers, and the same one."""
    value = number(found)
    return value is not None and value == number(expected)


def same_text(expected: str, found: str, prompt: str = "") -> bool:
    """The same number where a number is expected, else the same text but for what makes no difference in LaTeX."""
    if number(expected) is not None:
        return same_number(expected, found)
    return plain_latex(expected) == plain_latex(found)


def gsm8k_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0, lenient: bool = False) -> RewardFn:
    """The number in <answer> ... </answer>, or else after ####, against "answer", whose own text may have a ####.

    `lenient`: where neither is there, the last number of the text counts. Of GSM8K's problems all answers are integers.
    """
    check_flag("lenient", lenient)
    places: list[Find] = [between_tags, after_mark, *([last_integer] if lenient else [])]

    def find(text: str) -> str | None:  # an empty element is an answer that is wrong, not a place to look elsewhere
        return next((found for place in places if (found := place(text)) is not None), None)

    return _judge(find, same_number, expected_number, correct_reward, wrong_reward)


def boxed_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0, symbolic: bool | None = None) -> RewardFn:
    """What the last \\boxed{...} holds against "answer".

    Numbers as numbers, anything else as text, or with `symbolic` as mathematics (math-verify): \\sqrt{8} is 2\\sqrt{2}.
    None: where math-verify is installed. A number is never compared symbolically: 47+38 is no answer to "47+38".
    """
    is_same = symbolic_equality(symbolic)

    def is_same_mathematics(expected: str, found: str, prompt: str = "") -> bool:
        if number(expected) is not None:
            return same_number(expected, found)
        return same_latex(expected, found) or is_same(expected, found, prompt)

    return _judge(boxed, is_same_mathematics, expected_text, correct_reward, wrong_reward)


def correctness_reward(correct_reward: float = 2.0, wrong_reward: float = 0.0, tag: str = "answer") -> RewardFn:
    """What the last <answer> ... </answer> holds against "answer": the recipe's main reward."""
    check_tag("tag", tag)
    return _judge(lambda text: between_tags(text, tag), same_text, expected_text, correct_reward, wrong_reward)


def integer_reward(reward: float = 0.5, tag: str = "answer") -> RewardFn:
    """`reward` where the last <answer> ... </answer> holds an integer, right or wrong."""
    check_numbers(reward=reward)
    check_tag("tag", tag)

    def integer_fn(completions: list, **_: Any) -> list[RewardValue]:
        found = [between_tags(text_of(completion), tag) for completion in completions]
        return [reward if text is not None and only_integer(text) is not None else 0.0 for text in found]

    return declare(integer_fn, full_mark=None, lowest=min(reward, 0.0))
