"""Formulas: which ones are the same, which ones only math-verify takes for the same, and what goes wrong in between."""

import pytest

from grpo.rewards.reading import symbolic
from reward_model import RewardError, load_rewards, score_completions
from tests.rewards.test_reward_library import refused, values

BY_MEANING = {"name": "boxed", "symbolic": True}

# As mathematics

SYMBOLIC = [
    ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}", 1), ("x+1", "\\boxed{\\frac{2x+2}{2}}", 1), ("x^2-1", "\\boxed{(x-1)(x+1)}", 1),
    ("x+1", "\\boxed{x+2}", 0), ("2\\sqrt{2}", "\\boxed{\\sqrt{8}, \\sqrt{9}}", 0), ("x", "\\boxed{x = 1 = 2}", 0),
    ("\\sqrt{2}", "\\boxed{9^{9^{9^{9}}}}", 0), ("\\sqrt{2}", "\\boxed{" + "(" * 90 + "1" + ")" * 90 + "}", 0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "completion", "right"), SYMBOLIC)
def test_boxed_formulas_are_compared_as_mathematics(answer: str, completion: str, right: int) -> None:
    assert values(BY_MEANING, [completion], answer=answer) == [right]
    assert values({"name": "boxed", "symbolic": False}, [completion], answer=answer) == [0]


REWRITTEN = [  # what the prompt asks about, the answer, the same formula in other words, the answer in other words
    ("Simplify $\\sqrt{50}+\\sqrt{2}$.", "6\\sqrt{2}", "\\sqrt{2}+\\sqrt{50}", "6 \\sqrt{2}"),
    ("Simplify $\\sqrt{50}+\\sqrt{2}$.", "6\\sqrt{2}", "\\sqrt{50}+\\sqrt{2}+0", "6\\sqrt{2}."),
    ("Simplify \\(\\sqrt{50}+\\sqrt{2}\\).", "6\\sqrt{2}", "\\sqrt{50}+\\sqrt2", "$6\\sqrt{2}$"),
    ("Expand $$(x+1)^2$$", "x^2+2x+1", "(1+x)^2", "x^2 + 2x + 1"),
    ("Factor \\[x^2-1\\]", "(x-1)(x+1)", "-1+x^2", "\\left(x-1\\right)(x+1)"),
    ("Evaluate $\\int_0^1 \\frac{1}{1+x^2} dx$.", "\\frac{\\pi}{4}", "\\int_0^1 \\frac{1}{1+t^2} dt", "\\pi/4"),
    ("How long is the diagonal?", "6\\sqrt{2}", "7=6\\sqrt{2}", "d=\\sqrt{72}"),
    ("In base 7?", "5_7", "5", "5_7"),
    ("Write $\\sin 2x$ in terms of x.", "2\\sin x\\cos x", "\\sin 2x", "2 \\sin x \\cos x"),
    ("In base 7?", "5_7", "5_{8}", "5_{7}"),
    ("Which colour?", "red", "der", "\\text{red}"),
    ("What is the limit?", "\\frac{e}{2}", "\\lim_{n\\to\\infty}\\frac{(1+1/n)^n}{2}", "e/2"),
]


@pytest.mark.parametrize(("prompt", "answer", "rewritten", "right"), REWRITTEN)
def test_a_formula_that_only_says_the_question_again_is_no_answer(
    prompt: str, answer: str, rewritten: str, right: str
) -> None:
    completions = [f"\\boxed{{{rewritten}}}", f"\\boxed{{{right}}}"]
    assert values(BY_MEANING, completions, prompt=prompt, answer=answer) == [0, 1]


UNLIKE = [  # the answer, and what math-verify takes for it (or would have to work at)
    ("\\sqrt{2}", "\\sqrt2\\text{ or \\sqrt3}"), ("\\sqrt{2}", "\\sqrt{2}\\mathrm{or}\\sqrt{3}"), ("\\sqrt{2}", "\\sqrt2\\text{ or 1.7}"),
    ("\\sqrt{2}", "\\sqrt2\\approx\\sqrt3"), ("\\sqrt{2}", "\\min(\\sqrt2,\\sqrt3)"), ("\\sqrt{2}", "\\max(\\sqrt2,1)"),
    ("\\sqrt{2}", "\\sqrt{2}\\text{ not}"), ("(1,2)", "(1,2)\\text{ or (2,1)}"), ("x+1", "x+1\\text{ or x+2}"),
    ("6", "6\\text{ or seven}"), ("85 apples", "38+47"), ("x+85=y", "x+38+47=y"), ("(\\frac52,\\frac92)", "(\\frac{1+4}{2},\\frac{2+7}{2})"),
    ("3x^2", "\\frac{d}{dx}x^3"), ("3x^2", "\\frac{d x^3}{dx}"), ("3x^2", "\\frac{\\partial}{\\partial x} x^3"),
    ("\\{1,2,3\\}", "\\{1,2\\}\\cup\\{3\\}"), ("\\frac{\\sqrt6+\\sqrt2}{4}", "\\cos\\frac{\\pi}{12}"), ("24x", "4! x"),
    ("\\begin{pmatrix}7\\\\15\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
    ("(1,2)", "\\{1,2\\}"), ("\\{1,2\\}", "(2,1)"), ("(3,\\infty)", "3,\\infty"), ("1,2", "1,1,2"), ("x^2+1", "X^2+1"),
    ("no", "on"), ("\\pi", "3.14159265"), ("1000\\sqrt2", "1414.213562"), ("10\\sqrt2\\text{ cm}", "10\\sqrt2\\text{ m}"),
]  # fmt: skip
ALIKE = [  # the answer, and other honest ways to write it
    ("\\sqrt{5}", "n=\\sqrt5"), ("6\\sqrt{2}", "\\sqrt{72}\\text{ cm}"), ("\\{1,2\\}", "\\{2, 1\\}"), ("1,-2", "x=1, x=-2"),
    ("2x", "f(x) = 2x"), ("x^2+1", "P(x)=1+x^2"), ("\\text{even}", "\\text{Even}"), ("\\emptyset", "\\varnothing"),
    ("x+y", "y+x."), ("y=2x+3", "y = 3 + 2x"), ("\\frac{\\pi}{2}", "\\pi/2"), ("x^{2}-4", "(x-2)(x+2)"), ("2x+y=3", "y+2x=3"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"), ("[0,1)", "\\left[0, 1\\right)"),
    ("x^4+5", "5+x^4"), ("2^{10}x", "1024x"), ("3+4i", "4i+3"), ("10 - 3x", "-3x+10"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "found"), UNLIKE)
def test_what_only_math_verify_takes_for_the_answer_is_wrong(answer: str, found: str) -> None:
    assert values(BY_MEANING, [f"\\boxed{{{found}}}"], answer=answer) == [0]


@pytest.mark.parametrize(("answer", "found"), ALIKE)
def test_an_honest_answer_may_be_written_in_other_ways(answer: str, found: str) -> None:
    assert values(BY_MEANING, [f"\\boxed{{{found}}}"], answer=answer) == [1]


ASKED_ABOUT = [
    "It costs \\$5. Expand $(x+1)^2$",
    "Expand $(x+1)^2.$",
    "$(x+1)^2 = ?$",
    "\\begin{align*}(x+1)^2\\end{align*}",
]


@pytest.mark.parametrize("prompt", ASKED_ABOUT)
def test_the_formula_of_a_prompt_is_found(prompt: str) -> None:
    completions = ["\\boxed{(1+x)^2}", "\\boxed{2x + x^{2} + 1}"]
    assert values(BY_MEANING, completions, prompt=prompt, answer="x^2+2x+1") == [0, 1]


SAME_FORM = [
    ("Simplify $\\sqrt{8}$.", "2\\sqrt{2}", "2\\cdot\\sqrt2"), ("Factor $x^2+3x+2$.", "(x+1)(x+2)", "(x+2)(x+1)"),
    ("Rationalize $\\frac{1}{\\sqrt3}$.", "\\frac{\\sqrt{3}}{3}", "\\dfrac{\\sqrt3}{3}"),
    ("The sides are $\\sqrt{2}$ and $3$; find x.", "\\sqrt{2}", "\\sqrt2"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "answer", "found"), SAME_FORM)
def test_where_the_form_is_asked_for_dialects_make_no_difference(prompt: str, answer: str, found: str) -> None:
    assert values(BY_MEANING, [f"\\boxed{{{found}}}"], prompt=prompt, answer=answer) == [1]


def test_what_sympy_has_no_chance_at_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "_ask", lambda expected, found: pytest.fail(found))
    towers = ["9^{9^{9}}", "9^9^9", "2^{99999999}", "99999999!", "\\binom{99999999}{9999}", "x^{-10000}"]
    assert values(BY_MEANING, [f"\\boxed{{{t}}}" for t in towers], answer="x+1") == [0] * 6


def test_an_echo_of_the_prompt_is_no_answer() -> None:
    samples = [
        {"prompt": "Simplify \\sqrt{8}.", "answer": "2\\sqrt{2}"},
        {"prompt": "What is 47 + 38?", "answer": "85"},
    ]
    echoes = ["\\boxed{\\sqrt{8}}", "\\boxed{47 + 38}"]
    rewards = load_rewards([BY_MEANING])
    assert score_completions(rewards, samples, echoes, [[1]] * 2).combined.tolist() == [0, 0]
    assert score_completions(rewards, samples, ["\\boxed{2\\sqrt{2}}", "\\boxed{85}"], [[1]] * 2).combined.tolist() == [
        1,
        1,
    ]


def test_a_formula_that_takes_too_long_is_wrong_and_the_next_one_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic._answered.cache_clear()
    assert values(BY_MEANING, ["\\boxed{\\frac{2a}{2b}}"], answer="\\frac{a}{b}") == [1]  # it is there now
    monkeypatch.setattr(symbolic, "SECONDS", 0.1)
    assert values(BY_MEANING, ["\\boxed{(a+b+1)^{99}}"], answer="\\frac{a}{b}") == [0]
    assert symbolic._mathematicians == []
    monkeypatch.undo()
    symbolic._answered.cache_clear()
    assert values(BY_MEANING, ["\\boxed{\\frac{2a}{2b}}"], answer="\\frac{a}{b}") == [1]
    symbolic._mathematicians[0].process.kill()
    symbolic._mathematicians[0].process.wait()
    assert values(BY_MEANING, ["\\boxed{\\frac{2c}{2b}}"], answer="\\frac{c}{b}") == [0]  # nobody there
    symbolic._answered.cache_clear()
    assert values(BY_MEANING, ["\\boxed{\\frac{2c}{2b}}"], answer="\\frac{c}{b}") == [1]


def test_math_verify_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a world in which every formula is wrong."""
    symbolic._answered.cache_clear()
    symbolic._let_go()
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(
        RewardError, match=r"math-verify does not start; try it: /bin/false -m grpo.rewards.reading.symbolic"
    ):
        values(BY_MEANING, ["\\boxed{\\frac{2a}{2b}}"], answer="\\frac{a}{b}")
    assert symbolic._mathematicians == []


def test_without_math_verify_formulas_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "PACKAGE", "no_such_package_of_anybody")
    assert values({"name": "boxed"}, ["\\boxed{\\sqrt{8}}", "\\boxed{2 \\sqrt{2}}"], answer="2\\sqrt{2}") == [0, 1]
    assert refused({"name": "boxed", "symbolic": True}) == (
        "rewards: boxed: symbolic: formulas need the package math-verify: pip install math-verify"
    )
