"""Whether two formulas are equivalent, by math-verify (sympy), in a separate process with limits on time and memory.

A formula that a model writes may take sympy unlimited time or memory, for example 9^{9^{9}}. The process is started for
the first question and then answers one question after another. It is killed if an answer takes too long, and it ends
together with this process.

    python -m grpo.rewards.reading.symbolic     the separate process: reads a pair of formulas per line, as JSON, and
                                                writes true or false per line
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

SECONDS = 2.0  # time limit for one question
STARTING = 60.0  # time limit in seconds for the start of the process, because importing sympy is slow
MEMORY = 2 << 30  # memory limit in bytes
PACKAGE = "math_verify"


def symbolic_equality(wanted: bool | None) -> Equality:
    """The function with which `boxed` compares formulas that differ as text.

    If `wanted` is true, or None with math-verify installed, it accepts equivalent formulas. Otherwise it accepts none.

    It does not accept a formula that only repeats the question. If a formula of the prompt is equivalent to the
    expected one ("Simplify ...", "Expand ..."), the task asks for a certain form, so no other form is correct. The
    caller has already compared the texts.
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
        if not work.search(expected):  # an unevaluated integral of the prompt cannot be the expected form
            asked_about = [formula for formula in asked_about if not work.search(formula)]
        return not any(_ask(expected, formula) for formula in asked_about)

    return is_same


class _Mathematician:
    """The separate process that runs math-verify."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).resolve().parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach the process
        )
        if self.answer(STARTING) is None:  # without an error, every formula would silently be wrong
            self.end()
            raise RuntimeError(f"math-verify does not start; try it: {sys.executable} -m {__name__}")

    def answer(self, seconds: float) -> bool | None:
        """The next answer of the process; None if there is none within `seconds`."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else b""
        return json.loads(line) if line else None

    def ask(self, expected: str, found: str) -> bool | None:
        """Whether the formulas are equivalent; None if the answer takes too long or the process has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([expected, found]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(SECONDS)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


_mathematicians: list[_Mathematician] = []  # at most one
_turn = threading.Lock()


def _ask(expected: str, found: str) -> bool:
    try:
        return _answered(expected, found)
    except TimeoutError:
        return False


@lru_cache(maxsize=4096)  # completions of a group are often equal; a timeout is not cached, because it raises an error
def _answered(expected: str, found: str) -> bool:
    with _turn:
        if not _mathematicians:
            _mathematicians.append(_Mathematician())
        answer = _mathematicians[0].ask(expected, found)
        if answer is None:
            _let_go()  # the next question starts a new process
            raise TimeoutError
        return answer


@atexit.register
def _let_go() -> None:
    while _mathematicians:
        _mathematicians.pop().end()


def _answer_questions() -> None:
    """Run the separate process: write one line when ready, then one line per question."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    print("true", flush=True)
    config = [LatexExtractionConfig()]  # LaTeX only: the other way of parsing would evaluate Python
    for line in sys.stdin:
        try:
            expected, found = (
                parse(f"${formula.replace('$', '')}$", extraction_config=config, parsing_timeout=int(SECONDS))
                for formula in json.loads(line)
            )
            is_same = bool(expected and found) and verify(expected, found, timeout_seconds=int(SECONDS))
        except Exception:  # sympy may raise any error; a formula that it cannot read is not correct
            is_same = False
        print(json.dumps(bool(is_same)), flush=True)


if __name__ == "__main__":
    _answer_questions()
