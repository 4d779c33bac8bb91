"""Numbers in texts: the last integer of a text, or the number that a whole text consists of. Nothing is evaluated."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

# A run of ASCII digits, with commas and points inside it and an optional minus (ASCII or U+2212) before it. A minus
# after a digit is an operator. Runs never overlap, so the search takes linear time.
_NUMBER = re.compile(r"(?P<minus>(?<![0-9])[-\u2212])?(?P<point>(?<!\.)\.)?(?P<digits>[0-9]+(?:[.,][0-9]+)*)")
_INTEGER = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0+)?")


@lru_cache(maxsize=1024)  # completions of a group are often equal, and each is read several times
def last_integer(text: str) -> str | None:
    """The last number of a text in canonical digits, if it is an integer; else None.

    The result is a text, not an int, because a model may write ten thousand digits, which int() refuses.

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
        digits, minus = digits.rpartition(",")[2], None  # "7,8" and "1,2345" are lists; their last entry counts
    if not _INTEGER.fullmatch(digits):
        return None  # "3.5"
    canonical = digits.partition(".")[0].replace(",", "").lstrip("0") or "0"
    return f"-{canonical}" if minus and canonical != "0" else canonical


def only_integer(text: str) -> str | None:
    """The integer in canonical digits, if the text consists of an integer and nothing else; else None.

    >>> [only_integer(text) for text in ["-1,234", " $72$.", "5.0", "5 apples", "3,4", "\\\\frac{1}{2}", ""]]
    ['-1234', '72', '5', None, None, None, None]
    """
    stripped = _bare(text)
    digits = stripped.removeprefix("-").removeprefix("\u2212")
    return last_integer(stripped) if _INTEGER.fullmatch(digits) else None


def expected_integer(sample: dict[str, Any]) -> str:
    """The sample's "answer" in canonical digits.

    Raises:
        ValueError: the answer is not an integer.

    >>> [expected_integer({"answer": answer}) for answer in ["1,234", 5, 1e20]]
    ['1234', '5', '100000000000000000000']
    """
    answer = sample["answer"]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # str(1e20) would be "1e+20"
    expected = last_integer(str(answer)) if type(answer) in (str, int) else None  # bool is a subclass of int
    if expected is None:
        raise ValueError(f'"answer" of {sample.get("prompt")!r} must be an integer, got {sample["answer"]!r}')
    return expected


# LaTeX patterns, also used for formulas: spacing commands to ignore, and commands that put words between braces.
SPACE = r"(?<!\\)\\[!,;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|[~\s]"
TEXT = r"\\(?:text|textup|textbf|mathrm|mathbf|mbox)"

LONGEST = 200  # characters; a longer text is not a number
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_FORMS = re.compile(
    rf"(?P<sign>[-+\u2212]?) ?(?:(?P<decimal>{_DECIMAL})"
    rf"|(?P<whole>[0-9]*) ?\\[dtc]?frac ?"
    rf"(?:\{{(?P<top>-?[0-9]+)\}} ?\{{?(?P<bottom>-?[0-9]+)\}}?|(?P<digits>[0-9]{{2}}))"
    rf"|(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+))"
)
# %, a degree sign, or words as in \text{ cm} or \text{ m}^2. Digits, commas and "or" are excluded, because they could
# be part of a second answer.
_POWER = r"(?:\^\{?[23]\}?)?"
_UNIT = re.compile(
    r"(?:\\?%|\\degree|\u00b0|\^ ?\\circ|\^\{\\circ\}"
    rf"|{TEXT}\{{(?![^{{}}]*\b(?:or|and|not)\b)[a-zA-Z ./()-]*{_POWER}\}}{_POWER})$"
)


def number(text: str) -> Fraction | None:
    """The exact number, if the text consists of a number and nothing else; else None.

    Dollar signs, percent signs, degree signs, a unit in \\text{...} and names are ignored: x = 5 is 5.

    >>> [str(number(text)) for text in ["72.0", "1,234", "1/2", "\\\\frac{-1}{2}", "-.5", "2\\\\frac{1}{4}", "5 or 6"]]
    ['72', '1234', '1/2', '-1/2', '-1/2', '9/4', 'None']
    """
    if len(text) > LONGEST:
        return None
    found = _FORMS.fullmatch(_bare(without_unit(_bare(text))))  # twice, because (5)\text{ cm} leaves parentheses
    if not found:
        return None
    if found["decimal"] is not None:
        value = Fraction(found["decimal"].replace(",", "").rstrip("."))
    else:
        top, bottom = found["top"] or found["over"], found["bottom"] or found["under"]
        if found["digits"]:
            top, bottom = found["digits"][0], found["digits"][1]  # \frac12
        if int(bottom) == 0 or (found["whole"] and "-" in top + bottom):
            return None
        value = int(found["whole"] or 0) + Fraction(int(top), int(bottom))
    return -value if found["sign"] in ("-", "\u2212") else value


def without_unit(text: str) -> str:
    """A number or formula without the unit that follows it.

    >>> without_unit("6\\\\sqrt{2}\\\\text{ cm}")
    '6\\\\sqrt{2}'
    """
    return _UNIT.sub("", text).strip()


_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\,)(?=[0-9]{3}(?![0-9]))")
_SPACES = re.compile(rf"(?:{SPACE})+")
_NO_USE = re.compile(r"\\\$|\\[()]")
_AROUND = re.compile(rf"^(?:\((.*)\)|\{{(.*)\}}|{TEXT}\{{([^{{}}]*)\}})$")
_NAME = re.compile(r"^[a-zA-Z] ?= ?")


def _bare(text: str) -> str:
    """Remove the LaTeX around and within a number: $x = 1{,}234$. and \\left(1,\\!234\\right) become 1,234."""
    text = _NO_USE.sub("", _SPACES.sub(" ", _COMMA.sub(",", text))).strip(" $").removesuffix(".").strip(" $")
    return _NAME.sub("", _AROUND.sub(r"\1\2\3", text)).strip()
