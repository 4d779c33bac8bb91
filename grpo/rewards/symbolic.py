"""Are two formulas the same? Answered by math-verify (sympy), in a process of its own with limits on time and memory.

What a model writes in a box may take sympy forever, or more memory than there is: 9^{9^{9}}. That process is started
when first asked, answers one question after another, is killed where it takes too long, and ends with this one.

    python -m grpo.rewards.symbolic     the other side: a pair of formulas a line, as JSON; true or false a line
"""

import atexit
import importlib.util
import json
import re
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo.rewards.arguments import check_flag
from grpo.rewards.numerals import without_unit

Equality = Callable[[str, str, str], bool]  # expected, found, prompt

LONGEST = 200  # characters of a formula that is looked at
SECONDS = 2.0  # for one question
STARTING = 60.0  # for the first: sympy is large
MEMORY = 2 << 30  # bytes
PACKAGE = "math_verify"


# Formulas as texts

_DIALECTS = [  # what is written in several ways, and the one that is kept; spaces go when they end no command any more
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\cdot(?![a-zA-Z])", "*"),
        (r"\\(?:text|textup|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
        (r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[$~\s]", ""),
        (r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\{([0-9a-zA-Z])\}", r"^\1"),
        (r"(?<![0-9])\*|\*(?![0-9])", ""),
        (r"\.$", ""),
    )
]


def plain_latex(text: str) -> str:
    """Without what makes no difference: spaces, \\left and \\right, \\dfrac for \\frac, \\text around a word.

    >>> plain_latex("\\\\left( \\\\dfrac{1}{2},\\\\, 2 \\\\cdot \\\\sqrt3, \\\\text{red} \\\\right)")
    '(\\\\frac{1}{2},2\\\\sqrt{3},red)'
    """
    for pattern, plain in _DIALECTS:
        text = pattern.sub(plain, text)
    return text


def same_latex(expected: str, found: str) -> bool:
    """The same text but for dialects, the order of terms or of factors, and in a word the case of letters.

    >>> [same_latex("(x+1)(x-2)", found) for found in ["(x-2)(1+x)", "(x-2)(x-1)"]]
    [True, False]
    """
    expected, found = plain_latex(expected), plain_latex(found)
    if re.fullmatch(r"[a-zA-Z]{3,}", expected):
        expected, found = expected.casefold(), found.casefold()
    return _ordered(expected) == _ordered(found)


def _ordered(text: str) -> str:
    """Its factors in parentheses, or its terms, in alphabetical order."""
    if re.fullmatch(r"(?:\([^()]+\))+", text):
        return "".join(sorted(f"({_ordered(factor)})" for factor in re.findall(r"\(([^()]+)\)", text)))
    if re.search(r"[a-zA-Z]", text) and re.fullmatch(r"[^(){}\\,=<>]+", text):
        terms = re.findall(r"[-+]?[^-+]+", text)
        return "".join(sorted(term if term[0] in "-+" else f"+{term}" for term in terms))
    return text


_FORMULA = re.compile(
    r"(?<!\\)\$\$?([^$]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation|gather)\*?\}(.+?)\\end",
    re.DOTALL,
)


def formulas(prompt: str) -> list[str]:
    """What stands between dollars, \\( and \\), \\[ and \\], or in align, where it is not too long to be looked at.

    >>> formulas("It costs \\\\$5. Simplify $\\\\sqrt{8}.$, or \\\\(x+x = ?\\\\)")
    ['\\\\sqrt{8}', 'x+x']
    """
    found = ["".join(parts).strip(" .,;:?=\n") for parts in _FORMULA.findall(prompt)]
    return [formula for formula in found if 0 < len(formula) <= LONGEST]


# Formulas as mathematics


def symbolic_equality(wanted: bool | None) -> Equality:
    """How `boxed` compares formulas: as mathematics if `wanted`, or if None and math-verify is there; else never.

    What merely repeats the question is no answer, be it equal to it. Where a formula of the prompt is equal to the
    expected one ("Simplify ...", "Expand ...") the form is what was asked for, so no other formula is right; whoever
    asks has compared the texts before.
    """
    if wanted is not None:
        check_flag("symbolic", wanted)
    is_installed = importlib.util.find_spec(PACKAGE) is not None
    if wanted and not is_installed:
        raise ValueError("symbolic: formulas need the package math-verify: pip install math-verify")
    if wanted is False or not is_installed:
        return lambda expected, found, prompt: False

    def is_same(expected: str, found: str, prompt: str) -> bool:
        if max(len(expected), len(found)) > LONGEST:
            return False
        expected, found = _nameless(expected), _nameless(found)
        if not _texts(expected):
            found = without_unit(found)
        if not is_comparable(expected, found) or not _ask(expected, found):
            return False
        asked_about = formulas(prompt)
        if not asked_about:
            return plain_latex(found) not in plain_latex(prompt)
        return not any(_ask(expected, formula) for formula in asked_about if not NEVER_ADDED["work"].search(formula))

    return is_same


_NAME = re.compile(r"(^|,)\s*[a-zA-Z](?:_\w)?(?:\([a-z]\))?\s*=(?=[^=]*(?:,|$))")


def _nameless(formula: str) -> str:
    """Without names: x = 3, f(x) = \\sqrt{2} is 3, \\sqrt{2}."""
    return _NAME.sub(r"\1", formula.strip().strip("$").removesuffix(".")).strip()


NEVER_ADDED = {  # what a formula does not have unless the expected one has it, too
    "work": re.compile(  # left to sympy
        r"\\(?:int|sum|prod|lim|max|min|cup|cap|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|binom)(?![a-zA-Z])"
        r"|\\frac\s*\{\s*(?:d|\\partial)[^{}]*\}\s*\{\s*(?:d|\\partial)\s*[a-zA-Z]|[0-9a-zA-Z)]\s*!"
    ),
    "arithmetic": re.compile(  # 40 + 45, but neither 4 + 5x nor x^4 + 5
        r"(?<![\^_0-9.a-zA-Z])[0-9.]+\s*(?:[-+*]|\\cdot|\\times)\s*[0-9.]+(?![0-9.]|\s*[a-zA-Z\\(^/])"
    ),
    "hopeless": re.compile(r"\^\{[^{}]*\^|\^.\^|\^\{?-?[0-9]{4}|[0-9]{4}!|\\binom\{[0-9]{4}"),  # 9^{9^9}
    "relation": re.compile(r"=|\\approx|\\equiv|\\sim|\\neq?(?![a-zA-Z])"),
    "decimals": re.compile(r"[0-9]\.[0-9]"),
    "product of matrices": re.compile(r"\\begin.*\\begin", re.DOTALL),
}
_TEXT = re.compile(r"\\(?:text|textup|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def is_comparable(expected: str, found: str) -> bool:
    """Are these two formulas of one kind, so that math-verify may be asked? It takes (1,2) for {2,1}, and 5 for 5_7.

    >>> [is_comparable("6\\\\sqrt{2}", found) for found in ["\\\\sqrt{72}", "7=6\\\\sqrt{2}", "8.485"]]
    [True, False, False]
    """
    if re.fullmatch(r"[a-zA-Z]{2,}", plain_latex(expected)) or not plain_latex(found):
        return False  # a word is not the product of its letters: "der" is not "red"
    kinds: tuple[Callable[[str], object], ...] = (_texts, _letters, _brackets, _bases)
    if any(kind(expected) != kind(found) for kind in kinds):
        return False
    return not any(pattern.search(found) and not pattern.search(expected) for pattern in NEVER_ADDED.values())


def _texts(formula: str) -> list[str]:
    return ["".join(text.split()).casefold() for text in _TEXT.findall(formula)]


def _letters(formula: str) -> set[str]:
    return set(re.findall("[a-zA-Z]", _COMMAND.sub(" ", _TEXT.sub(" ", formula))))


def _brackets(formula: str) -> tuple[Any, ...]:
    """Of what lists something: how it opens and closes, and how many there are."""
    plain = plain_latex(formula)
    ends = re.match(r"(\\?[\[({])?.*?(\\?[\])}])?$", plain, re.DOTALL)
    return (*ends.groups(), plain.count(",")) if ends and "," in plain else ()


def _bases(formula: str) -> list[str]:
    return re.findall(r"(?<=[0-9])_\{?([0-9]+)", formula)


class _Mathematician:
    """The process that is asked."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        if self.answer(STARTING) is None:  # without it every formula would be wrong, and nobody would know
            self.end()
            raise RuntimeError(f"math-verify does not start; try it: {sys.executable} -m {__name__}")

    def answer(self, seconds: float) -> bool | None:
        """Its next line; None where it says nothing in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else b""
        return json.loads(line) if line else None

    def ask(self, expected: str, found: str) -> bool | None:
        """Are they the same? None where it takes too long, or has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([expected, found]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(SECONDS)

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.communicate()


_mathematicians: list[_Mathematician] = []  # none or one
_turn = threading.Lock()


def _ask(expected: str, found: str) -> bool:
    try:
        return _answered(expected, found)
    except TimeoutError:
        return False


@lru_cache(maxsize=4096)  # siblings are often the same; what took too long is asked again
def _answered(expected: str, found: str) -> bool:
    with _turn:
        if not _mathematicians:
            _mathematicians.append(_Mathematician())
        answer = _mathematicians[0].ask(expected, found)
        if answer is None:
            _let_go()  # whoever asks next gets another one
            raise TimeoutError
        return answer


@atexit.register
def _let_go() -> None:
    while _mathematicians:
        _mathematicians.pop().end()


def _answer_questions() -> None:
    """The other side: a line when ready, then one for each question."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    print("true", flush=True)
    config = [LatexExtractionConfig()]  # its other way of parsing would evaluate Python
    for line in sys.stdin:
        try:
            expected, found = (
                parse(f"${formula.replace('$', '')}$", extraction_config=config, parsing_timeout=int(SECONDS))
                for formula in json.loads(line)
            )
            is_same = bool(expected and found) and verify(expected, found, timeout_seconds=int(SECONDS))
        except Exception:  # sympy raises anything; what it cannot make sense of is no answer
            is_same = False
        print(json.dumps(bool(is_same)), flush=True)


if __name__ == "__main__":
    _answer_questions()
