"""The `code` reward: run the Python program in the completion against the row's tests, in the sandbox.

A row's "tests" is a list. Each entry is one test, and all tests have equal weight:

    "assert add(2, 3) == 5"                     Python code with an assert that calls what the program must define
    {"input": "2 3\\n", "output": "5\\n"}         run the program as a script: its input and its expected output

A single text is treated as a list with one entry. A test may have several lines and may import modules. The program's
functions take and return copies of plain data (None, numbers, texts, bytes, lists, tuples, sets, dicts). The output of
a script is compared line by line; white space at the end of a line or of the whole text is ignored.
"""

import ast
from collections.abc import Sequence
from functools import lru_cache
from itertools import starmap
from typing import Any

from grpo.rewards.arguments import check_choice, check_count, check_flag, check_numbers
from grpo.rewards.base import RewardFn, RewardValue, declare, text_of
from grpo.rewards.calls import short
from grpo.rewards.sandbox.host import Job, Limits, Verdict, check_platform, run
from grpo.rewards.sandbox.jail.inside import names_of_program

Test = str | dict[str, str]
FENCE = "```"
MODES = ("fraction", "all")
LONGEST = 3600  # the maximum timeout in seconds


def code_block(text: str, *, bare: bool = False) -> str | None:
    """The content of the last fenced Python block; None if there is no such block or it is not closed.

    With `bare`, a text without any fence is returned unchanged.

    >>> code_block("So:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    if bare and FENCE not in text:
        return text
    found: tuple[int, int] | None = None
    start, is_python = None, False
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        mark = line.strip()
        if start is None and mark.startswith(FENCE):
            start, is_python = number + 1, mark.removeprefix(FENCE).strip().lower() in ("python", "py", "python3")
        elif start is not None and mark == FENCE:
            found = (start, number) if is_python else found
            start = None
    is_cut_off = start is not None and is_python  # the last block counts, and it is not closed
    return "".join(lines[slice(*found)]) if found and not is_cut_off else None


def tests_of(value: Any) -> list[Test]:
    """A row's "tests" as a list. Raises a ValueError if one of them is not a valid test."""
    tests = [value] if isinstance(value, str) else value
    if not isinstance(tests, list) or not tests:
        raise ValueError(f'"tests": got {short(value)}, expected a list of tests that is not empty')
    for number, test in enumerate(tests, start=1):
        if isinstance(test, dict):
            if test.keys() != {"input", "output"} or not all(isinstance(text, str) for text in test.values()):
                raise ValueError(f'"tests", test {number}: got {short(test)}, expected texts "input" and "output"')
        elif isinstance(test, str):
            _check_python(number, test)
        else:
            allowed = 'Python or {"input": …, "output": …}'
            raise ValueError(f'"tests", test {number}: got {short(test)}, expected {allowed}')
    return tests


@lru_cache(maxsize=65536)  # called once per completion with the same tests
def _check_python(number: int, test: str) -> None:
    """Check that a test can fail: it must have an assert, and use a name that the program defines."""
    try:
        has_assert = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'"tests", test {number}: {short(test)} is no Python: {error}') from error
    if not has_assert:
        raise ValueError(f'"tests", test {number}: {short(test)} asserts nothing')
    if not names_of_program(test):
        raise ValueError(f'"tests", test {number}: {short(test)} calls nothing that the program would have to define')


def code_reward(
    mode: str = "fraction",
    timeout: float = 5.0,
    memory_mb: int = 256,
    parallel: int | None = None,
    bare: bool = False,
) -> RewardFn:
    """The fraction of the row's "tests" that the completion's program passes.

    Args:
        mode: fraction = the fraction of tests that pass; all = 1 if all tests pass, else 0.
        timeout: in seconds; one limit for all asserts of a row together, and one for each script.
        memory_mb: address space of a program in MB, including what Python itself needs.
        parallel: programs that run at the same time; None: the number of cores.
        bare: whether a completion without any fenced block is taken as the program.
    """
    check_choice("mode", mode, MODES)
    check_numbers(timeout=timeout)
    if not 0 < timeout <= LONGEST:
        raise ValueError(f"timeout: got {timeout!r}, expected seconds, more than 0 and at most {LONGEST}")
    check_count("memory_mb", memory_mb, least=64, most=1 << 20)
    if parallel is not None:
        check_count("parallel", parallel, most=1024)
    check_flag("bare", bare)
    check_platform()
    limits = Limits(seconds=float(timeout), memory_mb=memory_mb)

    def judged(completions: Sequence[str], tests: Sequence[Any]) -> list[list[tuple[Verdict, str | None]]]:
        """Run the programs. Returns the verdict and the expected output of each run of each completion."""
        jobs: dict[Job, int] = {}  # job -> its number; equal jobs are run once
        rows: list[list[tuple[int, str | None]]] = []  # for each completion: number and expected output of its jobs
        for completion, own in zip(completions, tests, strict=True):
            planned = _jobs(code_block(completion, bare=bare), tests_of(own))
            rows.append([(jobs.setdefault(job, len(jobs)), output) for job, output in planned])
        verdicts = run(list(jobs), limits, parallel=parallel)
        return [[(verdicts[number], output) for number, output in row] for row in rows]

    def code_fn(completions: list, tests: list, **_: Any) -> list[RewardValue]:
        values: list[RewardValue] = []
        for runs in judged([text_of(completion) for completion in completions], tests):
            passed = [is_correct for verdict, output in runs for is_correct in _passed(verdict, output)]
            share = sum(passed) / len(passed) if passed else 0.0
            values.append(share if mode == "fraction" else float(share == 1.0))
        return values

    def explain(samples: Sequence[dict[str, Any]], completions: Sequence[str]) -> list[str]:
        rows = judged(completions, [sample["tests"] for sample in samples])
        return [next(filter(None, starmap(_problem, runs)), "") if runs else "no block of Python" for runs in rows]

    return declare(
        code_fn,
        full_mark=1.0,
        has_answer=lambda completion: code_block(completion, bare=bare) is not None,
        check_sample=lambda sample: tests_of(sample["tests"]),
        explain=explain,
    )


def _jobs(program: str | None, tests: Sequence[Test]) -> list[tuple[Job, str | None]]:
    """The jobs of one completion, each with its expected output: one job for all asserts, and one for each script."""
    if program is None:
        return []
    asserts = tuple(test for test in tests if isinstance(test, str))
    scripts = [test for test in tests if isinstance(test, dict)]
    jobs: list[tuple[Job, str | None]] = [(Job(program, asserts), None)] if asserts else []
    return jobs + [(Job(program, stdin=test["input"]), test["output"]) for test in scripts]


def _passed(verdict: Verdict, output: str | None) -> tuple[bool, ...]:
    """Which tests of one run passed: one value per assert, or one value for a script, which must print `output`."""
    if output is None:
        return verdict.passed
    return (verdict.passed == (True,) and _same_output(verdict.output, output),)


def _problem(verdict: Verdict, output: str | None) -> str:
    """Why a run failed, in words; empty if it passed."""
    passed = _passed(verdict, output)
    if all(passed):
        return ""
    if output is None:
        return f"assert {passed.index(False) + 1}: {verdict.why}"
    return verdict.why or f"printed {short(verdict.output)}, expected {short(output)}"


def _same_output(written: str, expected: str) -> bool:
    return [line.rstrip() for line in written.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]
