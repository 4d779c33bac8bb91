"""Rewards for an answer in a fixed place: after ####, in <answer> or in a box. Everything in this place is compared.

If the row's "answer" is a number, it is compared as a number, so 72.0, 72 and \\frac{144}{2} are equal. Otherwise it is
compared as text. The lenient verdict, which evaluations report as well, also accepts an integer answer elsewhere.
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
    """The expected answer: the content of the box in the sample's "answer", or the text after its ####, or all of it.

    >>> [expected_text({"answer": answer}) for answer in ["5 * 3 = 15\\n#### 15", "so \\\\boxed{x+1}.", 72.0, "7"]]
    ['15', 'x+1', '72', '7']
    """
    answer = sample["answer"]
    if isinstance(answer, float) and abs(answer) < float("inf"):
        answer = format(Decimal(repr(answer)), "f").removesuffix(".0")  # not 1e-05
    text = str(answer) if type(answer) in (str, int) else ""  # not isinstance, because bool is a subclass of int
    found = boxed(text) or after_mark(text) or text.strip()
    if not plain_latex(found):  # for example "$"; an empty completion would count as correct
        raise ValueError(f'"answer" of {sample.get("prompt")!r} must be a text or a number, got {sample["answer"]!r}')
    return found


def expected_number(sample: dict[str, Any]) -> str:
    """The expected answer as in `expected_text`, which must be a number."""
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
    """A reward function: `correct_reward` if `find` returns the expected answer, else `wrong_reward`."""
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
    """Whether both texts are numbers and the numbers are equal."""
    value = number(found)
    return value is not None and value == number(expected)


def same_text(expected: str, found: str, prompt: str = "") -> bool:
    """Whether the numbers are equal if a number is expected, otherwise whether the texts are equal as plain LaTeX."""
    if number(expected) is not None:
        return same_number(expected, found)
    return plain_latex(expected) == plain_latex(found)


def gsm8k_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0, lenient: bool = False) -> RewardFn:
    """Compare the number in <answer> ... </answer>, or otherwise after ####, with "answer", which may contain a ####.

    `lenient`: if the completion has neither, its last number counts if it is an integer. All answers of GSM8K are.
    """
    check_flag("lenient", lenient)
    places: list[Find] = [between_tags, after_mark, *([last_integer] if lenient else [])]

    def find(text: str) -> str | None:  # an empty element is a wrong answer; the other places are then not searched
        return next((found for place in places if (found := place(text)) is not None), None)

    return _judge(find, same_number, expected_number, correct_reward, wrong_reward)


def boxed_reward(correct_reward: float = 1.0, wrong_reward: float = 0.0, symbolic: bool | None = None) -> RewardFn:
    """Compare the content of the last \\boxed{...} with "answer".

    Numbers are compared as numbers, and anything else as text. With `symbolic`, math-verify also accepts equivalent
    formulas: \\sqrt{8} equals 2\\sqrt{2}. None: symbolic if math-verify is installed. If a number is expected, symbolic
    comparison is never used, because 47+38 is not an answer to "47+38".
    """
    is_same = symbolic_equality(symbolic)

    def is_same_mathematics(expected: str, found: str, prompt: str = "") -> bool:
        if number(expected) is not None:
            return same_number(expected, found)
        return same_latex(expected, found) or is_same(expected, found, prompt)

    return _judge(boxed, is_same_mathematics, expected_text, correct_reward, wrong_reward)


def correctness_reward(correct_reward: float = 2.0, wrong_reward: float = 0.0, tag: str = "answer") -> RewardFn:
    """Compare the content of the last <answer> ... </answer> with "answer". form.py describes the recipe."""
    check_tag("tag", tag)
    return _judge(lambda text: between_tags(text, tag), same_text, expected_text, correct_reward, wrong_reward)


def integer_reward(reward: float = 0.5, tag: str = "answer") -> RewardFn:
    """`reward` if the last <answer> ... </answer> contains an integer, correct or not."""
    check_numbers(reward=reward)
    check_tag("tag", tag)

    def integer_fn(completions: list, **_: Any) -> list[RewardValue]:
        found = [between_tags(text_of(completion), tag) for completion in completions]
        return [reward if text is not None and only_integer(text) is not None else 0.0 for text in found]

    return declare(integer_fn, full_mark=None, lowest=min(reward, 0.0))
