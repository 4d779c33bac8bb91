"""Break the code on purpose, one well-known bug at a time, and see that the tests notice.

    python -m tests.mutants                 all of them, some minutes
    python -m tests.mutants clip "KL sign"  those whose name contains one of these texts

A mutant is one replacement in one file, applied to a copy of the project. It names the tests that must kill it. It
counts as killed only when one of them fails on a check of its own: an AssertionError raised by the test, pytest's
"DID NOT RAISE" or torch's GradcheckError; an import error or another crash is no kill. A control that changes nothing
must survive all of those tests. Exit status: 0 all as it should be, 1 a mutant survived, 2 the list itself is wrong.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
TIMEOUT = 60  # seconds a mutant
CONTROL = "control: nothing is changed"
COPIED = Path.cwd()  # within pytest, the copy: read before a test changes it
LIBRARIES = ("pytest", "torch", "peft", "transformers.models.gpt2.modeling_gpt2")  # loaded once, not once a mutant
Ask = Callable[[dict[str, Any]], int | None]  # a request of tests/forked.py -> its answer
OWN_CHECKS = ("AssertionError", "Failed", "GradcheckError")  # Failed is pytest's DID NOT RAISE


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by `test`, or not and why."""

    is_killed: bool
    by: str
    seconds: float


def check(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """What is wrong with the list: patterns that do not match exactly once, names used twice, mutants without tests."""
    names = [mutant.name for mutant in mutants]
    problems = [f"{name}: the name is used twice" for name in sorted(set(names)) if names.count(name) > 1]
    for mutant in mutants:
        file = root / mutant.file
        matches = file.read_text("utf-8").count(mutant.pattern) if file.is_file() else 0
        if matches != 1:
            problems.append(f"{mutant.name}: its pattern matches {matches} places of {mutant.file}, expected 1")
        if not mutant.tests:
            problems.append(f"{mutant.name}: names no test that must kill it")
    return problems


def copied(root: Path, folder: Path) -> Path:
    """What the tests need of the project."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "checkpoints*", "results", "docs")
    return shutil.copytree(root, folder / "project", ignore=ignore)


@contextmanager
def forks(libraries: Sequence[str]) -> Iterator[Ask]:
    """A process of tests/forked.py, as a function from a request to its answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
    command = [sys.executable, "-P", str(ROOT / "tests" / "forked.py"), *libraries]
    with (
        tempfile.TemporaryDirectory() as nowhere,
        subprocess.Popen(
            command,
            cwd=nowhere,
            env=environment | {"OMP_NUM_THREADS": "1"},  # two mutants share two cores
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(request: dict[str, Any]) -> int | None:
            print(json.dumps(request), file=requests, flush=True)
            if not (line := answers.readline()):
                raise RuntimeError("tests/forked.py ended")
            return json.loads(line)

        yield ask


def run(mutant: Mutant, root: Path, ask: Ask, timeout: float = TIMEOUT) -> Verdict:
    """Copy the project, apply the mutant, run its tests until the first one fails."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy, report = copied(root, Path(folder)), Path(folder) / "failure.json"
        file = copy / mutant.file
        file.write_text(file.read_text("utf-8").replace(mutant.pattern, mutant.replacement), "utf-8")
        environment = {"MUTANT_REPORT": str(report), "GRPO_CACHE": str(Path(folder) / "cache")}
        request = {"folder": str(copy), "tests": mutant.tests, "environment": environment, "timeout": timeout}
        status = ask(request)
        failure = json.loads(report.read_text()) if report.is_file() else {}
    seconds = time.perf_counter() - start
    if status is None:
        return Verdict(False, f"no test failed within {timeout:.0f} s", seconds)
    if status == 0:
        return Verdict(False, "every named test passes", seconds)
    if status != 1 or not failure:
        return Verdict(False, f"the tests could not be run (pytest's exit status {status})", seconds)
    if not failure["is_own_check"]:
        return Verdict(False, f"{failure['test']} crashed: {failure['error']}", seconds)
    return Verdict(True, failure["test"], seconds)


def pytest_exception_interact(node: Any, call: Any, report: Any) -> None:
    """Hook of pytest: note which test failed, and whether by a check of its own."""
    if "MUTANT_REPORT" not in os.environ:
        return
    # Frames of libraries left out: torch's assert_close raises for the test, but an assert deep in torch is a crash.
    paths = [Path(str(entry.path)) for entry in call.excinfo.traceback]
    ours = [path.relative_to(COPIED) for path in paths if path.is_relative_to(COPIED)]
    is_raised_by_test = bool(ours) and ours[-1].parts[0] == "tests"
    is_crash_elsewhere = "Traceback (most recent call last)" in str(call.excinfo.value)  # of a command the test ran
    is_own_check = (
        call.when == "call" and call.excinfo.typename in OWN_CHECKS and is_raised_by_test and not is_crash_elsewhere
    )
    failure = {"test": node.nodeid, "error": call.excinfo.typename, "is_own_check": is_own_check}
    Path(os.environ["MUTANT_REPORT"]).write_text(json.dumps(failure))


def main(
    arguments: Sequence[str] | None = None,
    mutants: Sequence[Mutant] = MUTANTS,
    root: Path = ROOT,
    libraries: Sequence[str] = LIBRARIES,
) -> int:
    """Run the mutants, two at a time, and print what became of each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these")
    names = parser.parse_args(arguments).names
    if problems := check(mutants, root):
        print("\n".join(problems), file=sys.stderr)
        return 2
    chosen = [mutant for mutant in mutants if not names or any(name in mutant.name for name in names)]
    if not chosen:
        print(f"no mutant is named like {' or '.join(names)}", file=sys.stderr)
        return 2
    tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    control = Mutant(CONTROL, chosen[0].file, chosen[0].pattern, chosen[0].pattern, tests)

    start = time.perf_counter()
    survivors = 0
    with ExitStack() as stack:
        snapshot = copied(root, Path(stack.enter_context(tempfile.TemporaryDirectory())))  # for whoever edits meanwhile
        free: SimpleQueue[Ask] = SimpleQueue()
        for _ in range(2):
            free.put(stack.enter_context(forks(libraries)))

        def judge(mutant: Mutant, timeout: float = TIMEOUT) -> Verdict:
            ask = free.get()
            try:
                return run(mutant, snapshot, ask, timeout)
            finally:
                free.put(ask)

        pool = ThreadPoolExecutor(max_workers=2)
        stack.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C
        verdict_of_control = pool.submit(judge, control, 10 * TIMEOUT)
        for mutant, verdict in zip(chosen, pool.map(judge, chosen), strict=True):
            survivors += not verdict.is_killed
            print(f"{'killed' if verdict.is_killed else 'SURVIVED':8} {verdict.seconds:4.0f} s  {mutant.name}")
            print(f"                 {verdict.by}", flush=True)
        verdict = verdict_of_control.result()
    survives = verdict.by == "every named test passes"
    print(
        f"{'survived' if survives else 'KILLED':8} {verdict.seconds:4.0f} s  {CONTROL}\n                 {verdict.by}"
    )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed in {time.perf_counter() - start:.0f} s")
    return 0 if survives and not survivors else 1


if __name__ == "__main__":
    sys.exit(main())
