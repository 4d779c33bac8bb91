"""Does the program work? The completion's Python block against the row's tests, in the sandbox.

A row's "tests" is a list; each entry is one test, and each is worth the same:

    "assert add(2, 3) == 5"                     Python with an assert, which calls what the program must define
    {"input": "2 3\\n", "output": "5\\n"}         the program as a script: what it reads, what it must print

One text alone stands for a list of one. A test may be of several lines and import what it needs; the program's
functions take and return plain data (None, numbers, texts, bytes, lists, tuples, sets, dicts), copies of it. What a
script prints is compared line by line, but for white space at the end of lines and of the text.
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
LONGEST = 3600  # seconds that a timeout may be


def code_block(text: str, *, bare: bool = False) -> str | None:
    """What the last fenced block of Python holds, or None where there is none, or it does not close.

    With `bare`, a text without any fence is code as it is.

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
    is_cut_off = start is not None and is_python  # the last one decides, and it has no end
    return "".join(lines[slice(*found)]) if found and not is_cut_off else None


def tests_of(value: Any) -> list[Test]:
    """A row's "tests" as a list; a ValueError if they are none."""
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


@lru_cache(maxsize=65536)  # a row's tests are asked for with each of its completions
def _check_python(number: int, test: str) -> None:
    """A test must be able to fail: it asserts something, about something of the program's."""
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
    """How many of the row's "tests" the completion's program passes.

    Args:
        mode: fraction = the share of tests that pass; all = 1 if all of them do, else 0.
        timeout: seconds for all asserts of a row together, and for each script.
        memory_mb: address space of a program, Python's own included.
        parallel: programs at a time; None: as many as there are cores.
        bare: a completion without any fenced block is a program as it stands.
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
        """What became of each completion's program in each of its runs, and what that run must print."""
        jobs: dict[Job, int] = {}  # what is the same is run once
        rows: list[list[tuple[int, str | None]]] = []  # of each completion: number of the job, what it must print
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
    """What to run for one completion: all its asserts together, each script by itself with what it must print."""
    if program is None:
        return []
    asserts = tuple(test for test in tests if isinstance(test, str))
    scripts = [test for test in tests if isinstance(test, dict)]
    jobs: list[tuple[Job, str | None]] = [(Job(program, asserts), None)] if asserts else []
    return jobs + [(Job(program, stdin=test["input"]), test["output"]) for test in scripts]


def _passed(verdict: Verdict, output: str | None) -> tuple[bool, ...]:
    """Of asserts one each; of a script, which must print `output`, one."""
    if output is None:
        return verdict.passed
    return (verdict.passed == (True,) and _same_output(verdict.output, output),)


def _problem(verdict: Verdict, output: str | None) -> str:
    """Why a run did not pass, in words; empty where it did."""
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
