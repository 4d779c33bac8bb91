"""Are two formulas the same? Answered by math-verify (sympy), in a process of its own with limits on time and memory.

What a model writes in a box may take sympy forever, or more memory than there is: 9^{9^{9}}. That process is started
when first asked, answers one question after another, is killed where it takes too long, and ends with this one.

    python -m grpo.rewards.reading.symbolic     the other side: a pair of formulas a line, as JSON; true or false a line
"""

import atexit
import importlib.util
import json
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from grpo.rewards.arguments import check_flag
from grpo.rewards.reading.formulas import (
    LONGEST,
    NEVER_ADDED,
    formulas,
    is_comparable,
    plain_latex,
    texts_in,
    without_names,
)
from grpo.rewards.reading.numerals import without_unit

Equality = Callable[[str, str, str], bool]  # expected, found, prompt

SECONDS = 2.0  # for one question
STARTING = 60.0  # for the first: sympy is large
MEMORY = 2 << 30  # bytes
PACKAGE = "math_verify"


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
        expected, found = without_names(expected), without_names(found)
        if not texts_in(expected):
            found = without_unit(found)
        if not is_comparable(expected, found) or not _ask(expected, found):
            return False
        asked_about, work = formulas(prompt), NEVER_ADDED["work"]
        if not asked_about:
            return plain_latex(found) not in plain_latex(prompt)
        if not work.search(expected):  # then an integral of the prompt is no answer in any form
            asked_about = [formula for formula in asked_about if not work.search(formula)]
        return not any(_ask(expected, formula) for formula in asked_about)

    return is_same


class _Mathematician:
    """The process that is asked."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).resolve().parents[3],
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
