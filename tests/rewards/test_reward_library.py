"""The reward library: a table of cases for each reward, and what is wrong with its arguments or its rows."""

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from grpo.errors import InputError
from grpo.rewards.library.code import code_block
from grpo.rewards.reading.answers import in_tag_lines, tags_in_place
from grpo.rewards.reading.formulas import plain_latex
from grpo.rewards.reading.numerals import number
from reward_model import Reward, RewardError, check_samples, load_rewards, required_columns, score_completions
from tests.conftest import VOCABULARY, make_tokenizer


def values(
    spec: dict[str, Any], completions: list[str], lengths: list[int] | None = None, **sample: Any
) -> list[float]:
    """What one reward gives these completions to one sample; `lengths` in tokens."""
    samples = [{"prompt": "p", **sample}] * len(completions)
    ids = [[7] * length for length in lengths or [1] * len(completions)]
    return score_completions(load_rewards([spec]), samples, completions, ids).combined.tolist()


def refused(spec: dict[str, Any]) -> str:
    with pytest.raises(InputError) as raised:
        load_rewards([spec])
    return str(raised.value)


# Numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72.0", "72"), ("72", "72"), ("72.", "72"), ("072", "72"), ("1,234", "1234"), ("1,234.50", "2469/2"),
        ("12,34", None), ("1234,567", None), ("-5", "-5"), ("\u22125", "-5"), ("+5", "5"), ("--5", None), (".5", "1/2"),
        ("-.5", "-1/2"), ("0.50", "1/2"), ("1/2", "1/2"), ("-2/4", "-1/2"), ("1/0", None), ("1/2/3", None),
        ("\\frac{1}{2}", "1/2"), ("\\dfrac{3}{6}", "1/2"), ("\\tfrac12", "1/2"), ("\\frac1{2}", None),
        ("\\frac{1}2", "1/2"), ("-\\frac{1}{2}", "-1/2"), ("2\\frac{1}{4}", "9/4"), ("\\frac{1}{0}", None),
        ("\\frac{a}{b}", None), ("$5$", "5"), ("\\$5", "5"), ("5\\%", "5"), ("50%", "50"), ("90^\\circ", "90"),
        ("90^{\\circ}", "90"), ("5\\text{ cm}", "5"), ("5 cm", None), ("1{,}800", "1800"), ("10,\\!000", "10000"),
        ("5 or 6", None), ("5, 6", None), ("x=5", "5"), ("6=5", None),
        ("xy=5", None), ("1e3", None), ("", None), (".", None), ("-", None),
        ("\u0665", None), ("\uff15", None), ("5\u00b2", None), ("\u00bd", None), ("0x10", None), ("1_000", None),
        ("nan", None), ("inf", None), ("7" * 201, None), ("7" * 200, "7" * 200),
    ],
)  # fmt: skip
def test_what_a_number_is(text: str, expected: str | None) -> None:
    assert number(text) == (None if expected is None else Fraction(expected))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.fractions(min_value=-(10**9), max_value=10**9))
def test_every_way_to_write_a_fraction_is_that_fraction(value: Fraction) -> None:
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    frac = f"frac{{{top}}}{{{bottom}}}"
    for written in (f"{sign}{top}/{bottom}", f"{sign}\\{frac}", f" ${sign}\\d{frac}$. "):
        assert number(written) == value
    if bottom == 1:
        for written in (f"{value}.00", f"{int(value):,}", f"{sign}0{top}"):
            assert number(written) == value


# The answer in its place

BOXED = [
    ("72", "\\boxed{72.0}", 1), ("1234", "\\boxed{1,234}", 1), ("1,234", "\\boxed{1234}", 1),
    ("0.5", "\\boxed{\\frac{1}{2}}", 1),
    ("\\frac{1}{2}", "\\boxed{.5}", 1), ("\\frac12", "\\boxed{\\dfrac{2}{4}}", 1), ("-5", "\\boxed{\u22125}", 1),
    ("5", "\\boxed{4} then \\boxed{5}", 1), ("5", "\\boxed{5} then \\boxed{4}", 0), ("5", "\\boxed{5", 0),
    ("5", "5", 0),
    ("5", "\\boxed{ 5 }", 1), ("5", "\\boxed{$5$}", 1), ("5", "\\boxed{5 or 6}", 0), ("5", "\\boxed{4, 5}", 0),
    ("5", "\\boxed{x=5}", 1), ("5", "\\boxed{2+3}", 0), ("5", "\\boxed{\\sqrt{25}}", 0),
    ("5", "\\boxed{\\boxed{5}}", 1), ("5", "\\boxed {5}", 0),
    ("5", "\\fbox{5}", 0), (5, "\\boxed{5}", 1), (0.5, "\\boxed{1/2}", 1), (1e-05, "\\boxed{0.00001}", 1),
    ("so \\boxed{\\frac{3}{4}}.", "\\boxed{0.75}", 1), ("work #### 12", "\\boxed{12}", 1),
    ("x+1", "\\boxed{x + 1}", 1), ("\\text{red}", "\\boxed{red}", 1), ("\\left(1,2\\right)", "\\boxed{(1, 2)}", 1),
    ("red", "\\boxed{blue}", 0), ("x+1", "\\boxed{x+2}", 0), ("x+1", "\\boxed{}", 0),
    ("\\frac{x}{\\sqrt{2}}", "\\boxed{\\dfrac{x}{\\sqrt{2}}}", 1),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "completion", "right"), BOXED)
def test_boxed(answer: Any, completion: str, right: int) -> None:
    assert values({"name": "boxed", "symbolic": False}, [completion], answer=answer) == [right]
    assert values({"name": "boxed", "wrong_reward": -1.0}, [completion], answer=answer) == [right or -1]


@pytest.mark.parametrize("nothing", ["$", " $ $ ", "\\left", "\\boxed{\\,}"])
def test_an_answer_that_is_nothing_is_refused(nothing: str) -> None:
    """The empty answer would be right."""
    for name in ("boxed", "correctness"):
        with pytest.raises(InputError, match=r'row 1: reward \w+: "answer" of .* must be a text or a number'):
            check_samples(load_rewards([name]), [{"prompt": "p", "answer": nothing}], lambda row: f"row {row + 1}")


@pytest.mark.parametrize(
    "text",
    [
        "5\\text{ or 6}", "5\\text{, 6}", "5\\mathrm{4}", "5\\text{ m}^6", "5\\text{{}}", "5\\text{ or six}",
        "5\\text{ not}", "5\\text{ (or -six)}", "5\\mathrm{or}\\text{six}", "5\\,6", "5\\ 6", "5~6",
        "\\frac{-1}{2}\\frac{1}{2}", "1\\frac{-1}{2}",
    ],
)  # fmt: skip
def test_a_second_answer_is_no_unit(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "5\\text{ cm}^2", "5\\text{ m}^{3}", "5\\mathrm{km/h}", "5\\text{ (miles)}", "5\\,\\text{cm}", "5~\\text{cm}",
        "5\\ \\mathrm{cm^2}", "5\\mathrm{~m}", "5\\textup{ cm}", "5°", "5\\degree", "5\\,^\\circ", "5\\,\\%", "n = 5",
        "\\left(5\\right)", "\\(5\\)", "{5}", "\\text{5}", "\\mathbf{5}", "\\frac {10} {2}", "10 / 2",
        "\\displaystyle\\cfrac{-10}{-2}", "$ 5 $",
    ],
)  # fmt: skip
def test_units_and_what_latex_writes_around_do_not_count(text: str) -> None:
    assert number(text) == 5


def test_latex_of_other_dialects_is_the_same() -> None:
    same = ["\\left(\\dfrac{1}{2},\\, \\text{red} \\right)", "(\\frac{1}{2},red)", "$( \\tfrac{1}{2} ,\\mathrm{red})$."]
    assert len({plain_latex(text) for text in same}) == 1
    assert plain_latex("\\leftarrow") == "\\leftarrow"


@pytest.mark.parametrize(
    ("completion", "strict", "lenient"),
    [
        ("#### 72", 1, 1), ("<answer>72.0</answer>", 1, 1), ("#### $72", 1, 1), ("#### 72 apples", 0, 0),
        ("it is 72", 0, 1), ("72 or 73", 0, 0), ("73 or 72", 0, 1), ("", 0, 0), ("#### 7 2", 0, 0),
        ("#### 73\n72", 0, 0),
        ("<answer>72</answer> #### 73", 1, 1), ("<answer></answer> #### 72", 0, 0), ("#### \n72", 0, 0),
        ("<answer>73</answer> 72", 0, 0),
    ],
)  # fmt: skip
def test_gsm8k_strict_and_lenient(completion: str, strict: int, lenient: int) -> None:
    assert values({"name": "gsm8k"}, [completion], answer="so #### 72") == [strict]
    assert values({"name": "gsm8k", "lenient": True}, [completion], answer=72) == [lenient]


def test_gsm8k_takes_any_number_as_answer() -> None:
    assert values({"name": "gsm8k"}, ["#### 1/2", "#### .5", "#### 5"], answer="0.5") == [1, 1, 0]
    (reward,) = load_rewards(["gsm8k"])
    for answer in ("five", "", None, True, [5], float("nan"), float("inf"), "#### "):
        with pytest.raises(InputError, match=r"line 3: reward gsm8k: \"answer\" of 'p' must be a "):
            check_samples([reward], [{"prompt": "p", "answer": answer}], lambda index: "file, line 3")


# The recipe's five

WHOLE = "<reasoning>\n2 + 3\nis 5\n</reasoning>\n<answer>\n5\n</answer>\n"
RECIPE = [  # xml_count, soft_format, strict_format, integer, correctness (answer 5)
    (WHOLE, 0.5, 0.5, 0.5, 0.5, 2.0),
    (WHOLE.rstrip(), 0.5, 0.5, 0.5, 0.5, 2.0),
    (WHOLE.replace("\n5\n", "\n6\n"), 0.5, 0.5, 0.5, 0.5, 0.0),
    (WHOLE.replace("\n5\n", "\nfive\n"), 0.5, 0.5, 0.5, 0.0, 0.0),
    (WHOLE.replace("\n5\n", "\n5.0\n"), 0.5, 0.5, 0.5, 0.5, 2.0),
    (WHOLE.replace("\n5\n", "\n5.5\n"), 0.5, 0.5, 0.5, 0.0, 0.0),
    (WHOLE.replace("\n5\n", "\n\u0665\n"), 0.5, 0.5, 0.5, 0.0, 0.0),
    (WHOLE.replace("\n5\n", "\n4\n5\n"), 0.5, 0.5, 0.5, 0.0, 0.0),
    (WHOLE + "Hope this helps!", 0.375, 0.5, 0.0, 0.5, 2.0),
    (WHOLE + "\n\n", 0.5, 0.5, 0.0, 0.5, 2.0),
    ("Sure!\n" + WHOLE, 0.5, 0.0, 0.0, 0.5, 2.0),
    ("<reasoning>2 + 3</reasoning><answer>5</answer>", 0.0, 0.5, 0.0, 0.5, 2.0),
    ("<reasoning>\na\n</reasoning>\n\n<answer>\n5\n</answer>", 0.5, 0.5, 0.0, 0.5, 2.0),
    ("<reasoning>\na\n</reasoning>\nso\n<answer>\n5\n</answer>", 0.5, 0.0, 0.0, 0.5, 2.0),
    ("<answer>\n5\n</answer>", 0.25, 0.0, 0.0, 0.5, 2.0),
    ("<answer>\n5\n</answer>\n<reasoning>\na\n</reasoning>", 0.25, 0.0, 0.0, 0.5, 2.0),
    (WHOLE + WHOLE, 0.0, 0.0, 0.0, 0.5, 2.0),
    (WHOLE.replace("</answer>\n", ""), 0.375, 0.0, 0.0, 0.0, 0.0),
    (WHOLE.replace("2 + 3", "<answer>"), 0.375, 0.0, 0.0, 0.5, 2.0),
    ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0.5, 0.5, 0.0, 0.0, 0.0),
    ("</answer>\n<answer>\n</reasoning>\n<reasoning>", 0.125, 0.0, 0.0, 0.0, 0.0),
    ("<reasoning> <answer> 5 </answer> </reasoning>", 0.0, 0.0, 0.0, 0.5, 2.0),
    ("5", 0.0, 0.0, 0.0, 0.0, 0.0),
    ("", 0.0, 0.0, 0.0, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "xml_count", "soft", "strict", "integer", "correctness"), RECIPE)
def test_the_five_rewards_of_the_recipe(
    completion: str, xml_count: float, soft: float, strict: float, integer: float, correctness: float
) -> None:
    names = ["correctness", "integer", "strict_format", "soft_format", "xml_count"]
    scores = score_completions(load_rewards(names), [{"prompt": "p", "answer": "5"}], [completion], [[1]])
    got = {name: scores.by_name[name].item() for name in names}
    assert got == {
        "xml_count": xml_count, "soft_format": soft, "strict_format": strict, "integer": integer,
        "correctness": correctness,
    }  # fmt: skip
    assert scores.is_correct.item() == (correctness == 2.0)


def test_their_tags_and_marks_are_arguments() -> None:
    think = "<think>\na\n</think>\n<answer>\n5\n</answer>"
    tags = {"tags": ["think", "answer"]}
    for name, mark in (("xml_count", 4 * 0.5), ("soft_format", 0.5), ("strict_format", 0.5)):
        assert values({"name": name, **tags, "reward": 0.5}, [think, WHOLE.replace("answer", "x")]) == [mark, 0]
    assert values({"name": "integer", "tag": "final", "reward": 3}, ["<final>7</final>", WHOLE]) == [3, 0]
    assert values({"name": "correctness", "tag": "final", "correct_reward": 3}, ["<final>7</final>"], answer=7) == [3]
    assert values({"name": "correctness"}, ["<answer>Paris</answer>", "<answer>paris</answer>"], answer="Paris") == [
        2,
        0,
    ]


def test_windows_lines_are_no_lines_of_their_own() -> None:
    assert not in_tag_lines(WHOLE.replace("\n", "\r\n"), ("reasoning", "answer"))
    assert tags_in_place("", ("a",)) == 0


# A pattern


def test_a_pattern_must_fit_the_whole_text() -> None:
    spec = {"name": "format", "pattern": r"(?s)<a>.+</a>", "reward": 2.0}
    assert values(spec, ["<a>x\ny</a>", "<a>x</a>!", "", "<a></a>"]) == [2, 0, 0, 0]


def test_a_pattern_that_backtracks_pays_nothing_and_costs_little() -> None:
    import time

    start = time.perf_counter()
    assert values({"name": "format", "pattern": r"(a+)+b"}, ["a" * 100_000, "aab"]) == [0, 0.5]
    assert time.perf_counter() - start < 2


# Length, repetition


@pytest.mark.parametrize(
    ("length", "expected"), [(10, 1), (8, 1), (12, 1), (13, 0.75), (7, 0.75), (16, 0), (1, 0), (100, 0)]
)
def test_length_is_a_plateau_with_slopes(length: int, expected: float) -> None:
    assert values({"name": "length", "target": 10, "plateau": 2, "slope": 0.25}, ["x"], [length]) == [expected]


def test_without_a_plateau_length_is_a_peak() -> None:
    assert values({"name": "length", "target": 10, "slope": 0.5}, ["x"] * 3, [9, 10, 11]) == [0.5, 1, 0.5]


def repetition(ids: list[list[int]], **arguments: Any) -> list[float]:
    (reward,) = load_rewards([{"name": "repetition", **arguments}])
    return score_completions([reward], [{"prompt": "p"}] * len(ids), ["c"] * len(ids), ids).combined.tolist()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([1] * 5, -2 / 3), ([1, 2, 3, 1, 2, 3], -1 / 4)],
)
def test_repetition_by_hand(ids: list[int], expected: float) -> None:
    assert repetition([ids]) == [pytest.approx(expected)]
    assert repetition([ids], max_penalty=-0.5) == [pytest.approx(expected / 2)]
    assert str(repetition([ids])[0]) != "-0.0"


@pytest.mark.parametrize("ngram_size", [1, 2, 3, 5, 7, 40])
def test_repetition_is_that_of_trl(ngram_size: int) -> None:
    theirs = pytest.importorskip("trl.rewards").get_repetition_penalty_reward(ngram_size, max_penalty=-0.7)
    ids = [[1], [1, 2, 3, 4], [1, 2, 1, 2, 1, 2, 3], [7] * 40, [1, 1, 2, 2, 1, 1, 2, 2], list(range(50))]
    chance = random.Random(ngram_size)
    ids += [chance.choices(range(kinds), k=200) for kinds in (2, 3, 20)]
    assert repetition(ids, ngram_size=ngram_size, max_penalty=-0.7) == pytest.approx(theirs(completion_ids=ids))


# Code

ADD = [
    "assert add(2, 3) == 5",
    "assert add(0, 0) == 0",
    {"input": "2 3\n", "output": "5\n"},
    {"input": "0 0", "output": "0"},
]
RIGHT = (
    "def add(a, b):\n    return a + b\nprint(add(*map(int, (input() if __name__ == '__main__' else '0 0').split())))"
)


def fenced(program: str, language: str = "python") -> str:
    return f"Here:\n```{language}\n{program}\n```\nDone."


def test_code_passes_a_share_of_its_tests() -> None:
    times = RIGHT.replace("a + b", "a * b")  # right for 0, 0 alone
    completions = [fenced(RIGHT), fenced(times), fenced("x = "), "no code", fenced(RIGHT, "text"), RIGHT]
    assert values({"name": "code"}, completions, tests=ADD) == [1, 0.5, 0, 0, 0, 0]
    assert values({"name": "code", "mode": "all"}, completions, tests=ADD) == [1, 0, 0, 0, 0, 0]
    assert values({"name": "code", "bare": True}, completions, tests=ADD) == [1, 0.5, 0, 0, 0, 1]
    scores = score_completions(load_rewards(["code"]), [{"prompt": "p", "tests": ADD}] * 6, completions, [[1]] * 6)
    assert scores.is_correct.tolist() == [1, 0, 0, 0, 0, 0]
    assert scores.has_answer.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na\n```", "a\n"), ("```py\na\n```\n", "a\n"), ("```Python3\na\n```", "a\n"), ("```\na\n```", None),
        ("```python\na\n```\n```python\nb\n```", "b\n"), ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```python\na", None), ("```python a\n```", None), ("```python\n```", ""), ("  ```python\n a\n  ```", " a\n"),
        ("a", None), ("", None), ("```python\na\n```python\nb\n```", "a\n```python\nb\n"), ("~~~python\na\n~~~", None),
    ],
)  # fmt: skip
def test_the_last_block_of_python_is_the_program(text: str, expected: str | None) -> None:
    assert code_block(text) == expected
    assert code_block(text, bare=True) == (text if "```" not in text else expected)


def test_a_script_is_judged_by_its_lines() -> None:
    outputs = ["5\n", "5", "5  \n\n", " 5", "5\n5", "", "5.0"]
    completions = [fenced(f"print({text!r}, end='')") for text in outputs]
    spec = {"name": "code"}
    assert values(spec, completions, tests=[{"input": "", "output": "5\n"}]) == [1, 1, 1, 0, 0, 0, 0]
    failing = fenced("print(5)\nraise SystemExit(1)")
    assert values(spec, [failing], tests=[{"input": "", "output": "5\n"}]) == [0]


def test_the_same_program_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    from grpo.rewards.library import code

    real = code.run
    monkeypatch.setattr(code, "run", lambda jobs, *a, **k: (seen.append(len(jobs)), real(jobs, *a, **k))[1])
    program = fenced("def add(a, b): return a + b")
    assert values({"name": "code"}, [program] * 8 + ["none"], tests="assert add(1, 2) == 3") == [1] * 8 + [0]
    assert seen == [1]


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, '"tests": got None, expected a list of tests that is not empty'),
        ([], '"tests": got [], expected a list of tests that is not empty'),
        ([5], '"tests", test 1: got 5, expected Python or {"input": …, "output": …}'),
        (["assert f("], "\"tests\", test 1: 'assert f(' is no Python: "),
        (["assert f(1) == 1", "f(1)"], "\"tests\", test 2: 'f(1)' asserts nothing"),
        (
            ["assert sum([1]) == 1"],
            "\"tests\", test 1: 'assert sum([1]) == 1' calls nothing that the program would have to",
        ),
        ([{"input": "x"}], "\"tests\", test 1: got {'input': 'x'}, expected texts"),
        ([{"input": "x", "output": 5}], "\"tests\", test 1: got {'input': 'x', 'output': 5}, expected texts"),
    ],
)
def test_tests_that_are_none_are_refused_before_any_compute(tests: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_samples(load_rewards(["code"]), [{"prompt": "p", "tests": tests}], lambda index: "file, line 4")
    assert str(raised.value).startswith(f"file, line 4: reward code: {message}")


# A classifier


def save_classifier(folder: Path, kind: str = "llama", num_labels: int = 1, template: str | None = None) -> str:
    """A random classifier of a real architecture with a tokenizer of one token a character."""
    torch.manual_seed(0)
    names = {number: f"label-{number}" for number in range(num_labels)}
    common: dict[str, Any] = {"vocab_size": len(VOCABULARY), "id2label": names, "initializer_range": 0.5}
    if kind == "llama":
        model: Any = LlamaForSequenceClassification(
            LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=512, attention_dropout=0.5, **common)
        )  # fmt: skip
    else:
        model = GPT2ForSequenceClassification(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, embd_pdrop=0.5, **common)
        )
    model.config.pad_token_id = None  # as many are published: the text would be judged at its padding
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.padding_side = template, "left"
    tokenizer.save_pretrained(folder)
    return str(folder)


TEMPLATE = "{% for message in messages %}({{ message['role'][0] }}{{ message['content'] }}){% endfor %}"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_is_judged_alike_alone_and_in_a_batch(kind: str, tmp_path: Path) -> None:
    name, texts = (
        save_classifier(tmp_path / "c", kind),
        ["1+2=3", "a", "12-7 is 5, so it is", "", "???", "a b c d e f g"],
    )
    whole = values({"name": "classifier", "model": name, "batch_size": 6}, texts)
    alone = [values({"name": "classifier", "model": name}, [text])[0] for text in texts]
    pairs = values({"name": "classifier", "model": name, "batch_size": 2}, texts)
    assert whole == pytest.approx(alone, abs=1e-5)
    assert pairs == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 3) for value in whole}) == len(texts)
    # By hand: the model itself, on the one text.
    model: Any = {"llama": LlamaForSequenceClassification, "gpt2": GPT2ForSequenceClassification}[kind]
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer("p" + texts[2])["input_ids"]])
    expected = model.from_pretrained(name, dtype=torch.float32).eval()(ids).logits
    assert whole[2] == pytest.approx(expected.item(), abs=1e-5)


def test_a_label_is_rewarded_with_its_probability(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "c", num_labels=3)
    by_label = [values({"name": "classifier", "model": name, "label": label}, ["1+2", "xx"]) for label in range(3)]
    assert [sum(column) for column in zip(*by_label, strict=True)] == pytest.approx([1, 1])
    assert values({"name": "classifier", "model": name, "label": "label-2"}, ["1+2", "xx"]) == by_label[2]
    logits = values({"name": "classifier", "model": name, "label": 2, "output": "logit"}, ["1+2", "xx"])
    assert logits != pytest.approx(by_label[2])
    single = save_classifier(tmp_path / "s")
    (logit,) = values({"name": "classifier", "model": single}, ["1+2"])
    (share,) = values({"name": "classifier", "model": single, "output": "probability"}, ["1+2"])
    assert share == pytest.approx(torch.tensor(logit).sigmoid().item())


def test_prompt_and_completion_stand_in_the_classifiers_own_template(tmp_path: Path) -> None:
    plain, chat = save_classifier(tmp_path / "p"), save_classifier(tmp_path / "t", template=TEMPLATE)
    (direct,) = values({"name": "classifier", "model": plain, "reads": "completion"}, ["(up)(a5)"])
    assert values({"name": "classifier", "model": chat}, ["5"]) == pytest.approx([direct])
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    samples = [{"prompt": messages, "prompt_ids": [1]}]
    rewards = load_rewards([{"name": "classifier", "model": chat}])
    of_messages = score_completions(rewards, samples, ["5"], [[1]]).combined.tolist()
    assert of_messages == pytest.approx(
        values({"name": "classifier", "model": plain, "reads": "completion"}, ["(ss)(up)(a5)"])
    )
    assert values({"name": "classifier", "model": chat, "reads": "completion"}, ["(up)(a5)"]) == pytest.approx([direct])


def test_a_text_longer_than_the_classifier_takes_is_cut(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "c")
    spec = {"name": "classifier", "model": name, "max_length": 8, "reads": "completion"}
    assert values(spec, ["12345678", "12345678" * 1000])[0] == pytest.approx(values(spec, ["123456789"])[0])


def test_of_a_long_text_the_classifier_reads_what_it_can(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "c")  # its tokenizer says: 64 tokens at most
    reads = {"name": "classifier", "model": name, "reads": "completion"}
    assert values(reads, ["1" * 1000]) == values(reads | {"max_length": 64}, ["1" * 64])
    message = (
        "rewards: classifier: max_length: got 65, expected a whole number in 1 ... what the classifier can read (64)"
    )
    assert refused(reads | {"max_length": 65}) == message


# What is wrong with arguments


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "gsm8k", "lenient": 1}, "gsm8k: lenient: got 1, expected true or false"),
        ({"name": "boxed", "symbolic": "yes"}, "boxed: symbolic: got 'yes', expected true or false"),
        ({"name": "boxed", "correct_reward": True}, "boxed: correct_reward: got True, expected a finite number"),
        ({"name": "xml_count", "tags": []}, "xml_count: tags: got [], expected names"),
        ({"name": "integer", "reward": "x"}, "integer: reward: got 'x', expected a finite number"),
        ({"name": "format", "pattern": "("}, "format: pattern: got '(', which is no regular expression: "),
        ({"name": "format", "pattern": 5}, "format: pattern: got 5, which is no regular expression: "),
        ({"name": "format", "pattern": "a", "tags": ["a"]}, "format: pattern: got together with tags, allowed: one"),
        ({"name": "length", "target": 0, "slope": 1}, "length: target: got 0, expected a whole number >= 1"),
        ({"name": "length", "target": 5, "slope": 0}, "length: slope: got 0, expected > 0"),
        (
            {"name": "length", "target": 5, "slope": 1, "plateau": -1},
            "length: plateau: got -1, expected a whole number",
        ),
        ({"name": "length", "slope": 1}, "length: got no target, which it needs"),
        (
            {"name": "repetition", "ngram_size": 41},
            "repetition: ngram_size: got 41, expected a whole number in 1 ... 40",
        ),
        ({"name": "repetition", "max_penalty": 1}, "repetition: max_penalty: got 1, expected <= 0"),
        ({"name": "code", "mode": "some"}, "code: mode: got 'some', allowed: fraction | all"),
        ({"name": "code", "timeout": 0}, "code: timeout: got 0, expected seconds, more than 0 and at most 3600"),
        ({"name": "code", "timeout": 1e30}, "code: timeout: got 1e+30, expected seconds"),
        ({"name": "code", "memory_mb": 1}, "code: memory_mb: got 1, expected a whole number in 64 ... 1048576"),
        ({"name": "code", "memory_mb": 1 << 44}, "code: memory_mb: got 17592186044416, expected a whole number in 64"),
        ({"name": "code", "bare": 7}, "code: bare: got 7, expected true or false"),
        ({"name": "classifier", "model": None}, "classifier: model: got None, expected a folder or a name on the Hub"),
        ({"name": "classifier", "model": "x", "output": False}, "classifier: output: got False, allowed: logit | prob"),
        ({"name": "code", "parallel": 0}, "code: parallel: got 0, expected a whole number in 1 ... 1024"),
        ({"name": "classifier"}, "classifier: got no model, which it needs"),
        ({"name": "classifier", "model": "./nowhere"}, "classifier: model: there is no folder './nowhere'"),
        (
            {"name": "classifier", "model": "x", "reads": "all"},
            "classifier: reads: got 'all', allowed: conversation | com",
        ),
        ({"name": "classifier", "model": "x", "device": "tpu"}, "classifier: device: got 'tpu', allowed: auto | cpu"),
        ({"name": "classifier", "model": "x", "dtype": "int8"}, "classifier: dtype: got 'int8', allowed: float32"),
        (
            {"name": "math", "weigth": 2},
            "math: got 'weigth', allowed: weight, as, correct_reward, wrong_reward; did you",
        ),
        ({"name": "math", "as": "a b"}, "math: as: got 'a b', expected a name without spaces and slashes"),
        ({"name": "correctnes"}, "got 'correctnes', allowed: math"),
    ],
)
def test_wrong_arguments_are_named(spec: dict[str, Any], message: str) -> None:
    assert refused(spec).startswith(f"rewards: {message}")


def test_a_classifier_with_several_labels_must_be_told_which(tmp_path: Path) -> None:
    name = save_classifier(tmp_path / "c", num_labels=2)
    assert refused({"name": "classifier", "model": name}) == (
        "rewards: classifier: label: the classifier has 2 of them, so one must be named: 0 (label-0), 1 (label-1)"
    )
    for label in ("label-9", 2, True, -1):
        assert refused({"name": "classifier", "model": name, "label": label}) == (
            f"rewards: classifier: label: got {label!r}, allowed: 0 (label-0), 1 (label-1)"
        )


def test_a_language_model_is_no_classifier(tmp_path: Path, llama: Any, tokenizer: Any) -> None:
    llama.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert refused({"name": "classifier", "model": str(tmp_path / "m")}) == (
        f"rewards: classifier: model: '{tmp_path / 'm'}' is no sequence classifier, but LlamaForCausalLM"
    )
    (tmp_path / "m" / "config.json").write_text("{")
    assert "cannot be loaded" in refused({"name": "classifier", "model": str(tmp_path / "m")})


# Columns


@pytest.mark.parametrize(
    ("name", "arguments", "columns"),
    [
        ("gsm8k", {}, {"answer"}), ("boxed", {}, {"answer"}), ("correctness", {}, {"answer"}), ("integer", {}, set()),
        ("xml_count", {}, set()), ("soft_format", {}, set()), ("strict_format", {}, set()), ("format", {}, set()),
        ("length", {"target": 5, "slope": 1}, set()), ("repetition", {}, set()), ("code", {}, {"tests"}),
    ],
)  # fmt: skip
def test_rows_without_the_column_that_a_reward_needs_are_named(name: str, arguments: dict, columns: set[str]) -> None:
    (reward,) = load_rewards([{"name": name, **arguments}])
    assert required_columns(reward) == columns
    for column in columns:
        with pytest.raises(InputError, match=rf'file, line 7: has no "{column}", which reward {name} needs'):
            check_samples([reward], [{"prompt": "p"}], lambda index: "file, line 7")


def test_every_reward_takes_messages(tmp_path: Path) -> None:
    """As TRL calls them: prompt and completion as lists of messages."""
    sample = {"prompt": [{"role": "user", "content": "x"}], "answer": "5", "tests": ["assert f(1) == 1"]}
    specs: list[Any] = [
        "math", "gsm8k", "boxed", "correctness", "integer", "xml_count", "soft_format", "strict_format", "format",
        {"name": "length", "target": 1, "slope": 1}, {"name": "overlong", "max_length": 3, "cache": 1}, "repetition",
        "code", {"name": "classifier", "model": save_classifier(tmp_path / "c", template=TEMPLATE)},
    ]  # fmt: skip
    scores = score_completions(
        load_rewards(specs), [sample], [WHOLE + "\\boxed{5}" + fenced("def f(n): return n")], [[1]]
    )
    assert all(not scores.by_name[reward.name].isnan().any() for reward in load_rewards(specs))
    assert scores.by_name["boxed"].item() == scores.by_name["code"].item() == 1


# How they combine


def test_combine_by_hand() -> None:
    def fn(*numbers: float | None) -> Callable[..., Any]:
        return lambda prompts, completions, **_: list(numbers)

    rewards = [
        Reward("a", fn(1.0, 0.5, None, None, 0.0), 1.0),
        Reward("b", fn(0.5, None, 1.0, None, 1.0), 3.0),
        Reward("logged", fn(9.0, 9.0, 9.0, 9.0, None), 0.0),
    ]
    samples = [{"prompt": "p"}] * 5
    expected = {
        "sum": [2.5, 0.5, 3.0, None, 3.0],
        "mean": [2.5 / 4, 0.5, 1.0, None, 0.75],
        "product": [1.5, 0.5, 3.0, None, 0.0],
    }
    for how, numbers in expected.items():
        combined = score_completions(rewards, samples, ["c"] * 5, [[1]] * 5, combine=how).combined.tolist()
        assert [None if value != value else value for value in combined] == pytest.approx(numbers)


def test_a_product_takes_no_negative_factor() -> None:
    with pytest.raises(InputError, match="rewards: format: weight: got -1, allowed with combine product: >= 0"):
        load_rewards(["math", {"name": "format", "weight": -1}], "product")
    assert load_rewards(["math", {"name": "format", "weight": -1}], "sum")
    with pytest.raises(InputError, match="allowed with combine mean: >= 0"):
        load_rewards(["math", {"name": "format", "weight": -1}], "mean")
    negative: list[dict[str, Any]] = [
        {"name": "repetition"}, {"name": "overlong", "max_length": 3, "cache": 1},
        {"name": "gsm8k", "wrong_reward": -1}, {"name": "format", "reward": -0.5},
        {"name": "xml_count", "reward": -1}, {"name": "integer", "reward": -1},
    ]  # fmt: skip
    for spec in negative:
        with pytest.raises(InputError, match=rf"rewards: {spec['name']}: its values may be negative \(down to -"):
            load_rewards(["math", spec], "product")
        assert load_rewards(["math", spec | {"weight": 0}], "product")
    reward = Reward("mine", lambda prompts, completions, **_: [-0.8], 1.0)  # it had not said so
    with pytest.raises(RewardError, match=r"reward mine returned -0.8 for 'p', expected >= 0 with combine product"):
        score_completions([reward], [{"prompt": "p"}], ["5"], [[1] * 7], combine="product")


def test_a_long_completion_is_shortened_in_an_error() -> None:
    def culprit(prompts: list, completions: list, **_: Any) -> list[float]:
        raise ValueError("no")

    with pytest.raises(RewardError) as raised:
        score_completions([Reward("culprit", culprit, 1.0)], [{"prompt": "p"}], ["x" * 100_000], [[1]])
    assert "reward culprit raised ValueError: no" in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert json.dumps(str(raised.value)).count("\\n") == 0
