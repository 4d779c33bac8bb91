"""LaTeX formulas as text: compare them, find them in a prompt, tell their kind. No formula is evaluated."""

import re
from collections.abc import Callable
from typing import Any

from grpo.rewards.reading.numerals import SPACE, TEXT

LONGEST = 200  # characters; longer formulas are ignored

# Pairs of (a variant, its plain form). Spaces are removed only after the commands that a space may end.
_DIALECTS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\cdot(?![a-zA-Z])", "*"),
        (rf"{TEXT}\{{([^{{}}]*)\}}", r"\1"),
        (rf"{SPACE}|\$", ""),
        (r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\{([0-9a-zA-Z])\}", r"^\1"),
        (r"(?<![0-9])\*|\*(?![0-9])", ""),
        (r"\.$", ""),
    )
]


def plain_latex(text: str) -> str:
    """The formula in a plain form: without spaces, \\left, \\right and \\text, with \\frac for \\dfrac, and so on.

    >>> plain_latex("\\\\left( \\\\dfrac{1}{2},\\\\, 2 \\\\cdot \\\\sqrt3, \\\\text{red} \\\\right)")
    '(\\\\frac{1}{2},2\\\\sqrt{3},red)'
    """
    for pattern, plain in _DIALECTS:
        text = pattern.sub(plain, text)
    return text


def same_latex(expected: str, found: str) -> bool:
    """Whether two formulas are the same text, up to LaTeX variants, the order of terms or factors, and a word's case.

    >>> [same_latex("(x+1)(x-2)", found) for found in ["(x-2)(1+x)", "(x-2)(x-1)"]]
    [True, False]
    """
    expected, found = plain_latex(expected), plain_latex(found)
    if re.fullmatch(r"[a-zA-Z]{3,}", expected):
        expected, found = expected.casefold(), found.casefold()
    return _ordered(expected) == _ordered(found)


def _ordered(text: str) -> str:
    """The formula with its factors in parentheses, or its terms, in alphabetical order."""
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
    """The formulas of a prompt: between dollars, \\( and \\), \\[ and \\], or in align. Long ones are left out.

    >>> formulas("It costs \\\\$5. Simplify $\\\\sqrt{8}.$, or \\\\(x+x = ?\\\\)")
    ['\\\\sqrt{8}', 'x+x']
    """
    found = ["".join(parts).strip(" .,;:?=\n") for parts in _FORMULA.findall(prompt)]
    return [formula for formula in found if 0 < len(formula) <= LONGEST]


# Names and kinds

_NAME = re.compile(r"(^|,)\s*[a-zA-Z](?:_\w)?(?:\([a-z]\))?\s*=(?=[^=]*(?:,|$))")


def without_names(formula: str) -> str:
    """The formula without names: "x = 3, f(x) = \\sqrt{2}" becomes "3, \\sqrt{2}"."""
    return _NAME.sub(r"\1", formula.strip().strip("$").removesuffix(".")).strip()


NEVER_ADDED = {  # a completion's formula may contain these only if the expected formula does, too
    "work": re.compile(  # something that sympy would have to evaluate
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
_TEXT = re.compile(rf"(?:{TEXT}|\\operatorname)\s*\{{([^{{}}]*)\}}?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def is_comparable(expected: str, found: str) -> bool:
    """Whether two formulas are of one kind, so math-verify may compare them. It confuses (1,2) with {2,1}, 5 with 5_7.

    >>> [is_comparable("6\\\\sqrt{2}", found) for found in ["\\\\sqrt{72}", "7=6\\\\sqrt{2}", "8.485"]]
    [True, False, False]
    """
    if re.fullmatch(r"[a-zA-Z]{2,}", plain_latex(expected)) or not plain_latex(found):
        return False  # math-verify reads a word as the product of its letters, so it takes "der" for "red"
    kinds: tuple[Callable[[str], object], ...] = (texts_in, _letters, _brackets, _bases)
    if any(kind(expected) != kind(found) for kind in kinds):
        return False
    return not any(pattern.search(found) and not pattern.search(expected) for pattern in NEVER_ADDED.values())


def texts_in(formula: str) -> list[str]:
    """The contents of all \\text{...}, without spaces and in lower case."""
    return ["".join(text.split()).casefold() for text in _TEXT.findall(formula)]


def _letters(formula: str) -> set[str]:
    return set(re.findall("[a-zA-Z]", _COMMAND.sub(" ", _TEXT.sub(" ", formula))))


def _brackets(formula: str) -> tuple[Any, ...]:
    """For a formula that is a list: its opening and closing bracket, and the number of commas; else ()."""
    plain = plain_latex(formula)
    ends = re.match(r"(\\?[\[({])?.*?(\\?[\])}])?$", plain, re.DOTALL)
    return (*ends.groups(), plain.count(",")) if ends and "," in plain else ()


def _bases(formula: str) -> list[str]:
    return re.findall(r"(?<=[0-9])_\{?([0-9]+)", formula)
