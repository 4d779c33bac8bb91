"""The mutation runner itself: what counts as a kill and what does not. And its list fits the code as it is."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import later_slow
from tests.mutant_list import MUTANTS, Mutant
from tests.mutants import CONTROL, ROOT, Ask, check, forks, main, run

THING = """
import json
import unittest

def double(number):
    assert number is not None
    json.dumps(number)
    return number + number

def refuse():
    raise ValueError("always")
"""
TESTS = """
import subprocess
import sys

import pytest
import thing

def test_double():
    assert thing.double(3) == 6

def test_refuse():
    with pytest.raises(ValueError):
        thing.refuse()

def test_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing.double(3)

def test_command():
    command = [sys.executable, "-c", "import thing; thing.double(3)"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

def test_nothing():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A module, its tests, and the runner."""
    folder = tmp_path / "project"
    (folder / "tests").mkdir(parents=True)
    (folder / "thing.py").write_text(THING)
    (folder / "tests" / "test_thing.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    for name in ("mutants.py", "mutant_list.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    return folder


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    with forks([]) as ask:
        yield ask


def mutant(pattern: str, replacement: str, *tests: str) -> Mutant:
    return Mutant(
        replacement, "thing.py", pattern, replacement, tuple(f"tests/test_thing.py::{test}" for test in tests)
    )


@pytest.mark.parametrize(
    ("changed", "by"),
    [
        (mutant("number + number", "number", "test_nothing", "test_double"), "tests/test_thing.py::test_double"),
        (mutant('raise ValueError("always")', "pass", "test_refuse"), "tests/test_thing.py::test_refuse"),
    ],
    ids=["AssertionError", "DID NOT RAISE"],
)
def test_a_test_that_fails_on_its_own_check_kills(project: Path, ask: Ask, changed: Mutant, by: str) -> None:
    verdict = run(changed, project, ask)
    assert (verdict.is_killed, verdict.by) == (True, by)
    assert (project / "thing.py").read_text() == THING


@pytest.mark.parametrize(
    ("changed", "why"),
    later_slow(
        [
            (mutant("number + number", "number", "test_nothing"), "every named test passes"),
            (mutant("number + number", "number / 0", "test_double"), "test_double crashed: ZeroDivisionError"),
            (mutant("is not None", "is None", "test_double"), "test_double crashed: AssertionError"),
            (
                mutant("json.dumps(number)", "unittest.TestCase().assertEqual(1, 2)", "test_double"),
                "crashed: AssertionError",
            ),
            (mutant("is not None", "is None", "test_elsewhere"), "test_elsewhere crashed: AssertionError"),
            (mutant("number + number", "number / 0", "test_command"), "test_command crashed: AssertionError"),
            (mutant("import json", "import no_such_module", "test_double"), "could not be run"),
            (mutant("number + number", "number", "test_that_is_not_there"), "could not be run"),
        ],
        3,
    ),
    ids=[
        "no test sees it",
        "a crash",
        "the project's own assert",
        "a library's assert",
        "from another folder",
        "a command that crashes",
        "an import error",
        "no such test",
    ],
)
def test_anything_else_is_no_kill(project: Path, ask: Ask, changed: Mutant, why: str) -> None:
    verdict = run(changed, project, ask)
    assert not verdict.is_killed
    assert why in verdict.by


def test_a_mutant_that_hangs_is_no_kill(project: Path, ask: Ask) -> None:
    verdict = run(mutant("number + number", "__import__('time').sleep(60)", "test_double"), project, ask, timeout=2)
    assert (verdict.is_killed, verdict.by) == (False, "no test failed within 2 s")


def test_the_report_names_mutant_and_killing_test(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = mutant("number + number", "number", "test_double")
    assert main([], [killed], project, []) == 0
    output = capsys.readouterr().out
    assert re.search(r"killed +\d+ s  number\n +tests/test_thing\.py::test_double\n", output)
    assert re.search(rf"survived +\d+ s  {CONTROL}\n", output)
    assert "1 of 1 mutants killed" in output


def test_a_survivor_is_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], [mutant("number + number", "number", "test_nothing")], project, []) == 1
    assert "SURVIVED" in capsys.readouterr().out


def test_a_control_that_dies_is_an_error(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "tests" / "test_thing.py").write_text("def test_double():\n    assert False\n")
    assert main([], [mutant("number + number", "number", "test_double")], project, []) == 1
    assert "KILLED     " in capsys.readouterr().out


@pytest.mark.parametrize(("pattern", "matches"), [("number * number", 0), ("number", 5)])
def test_a_pattern_must_match_exactly_once(
    project: Path, capsys: pytest.CaptureFixture[str], pattern: str, matches: int
) -> None:
    assert main([], [mutant(pattern, "0", "test_double")], project) == 2
    assert f"matches {matches} places of thing.py, expected 1" in capsys.readouterr().err


def test_names_are_unique_and_tests_are_named(project: Path) -> None:
    twice = mutant("number + number", "number")
    assert check([twice, twice], project) == [
        "number: the name is used twice",
        "number: names no test that must kill it",
        "number: names no test that must kill it",
    ]
    assert main(["no such name"], [mutant("number + number", "0", "test_double")], project) == 2


def test_the_list_fits_the_code() -> None:
    assert check(MUTANTS, ROOT) == []
    assert len(MUTANTS) >= 100
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, name = test.split("::")
        assert f"\ndef {name.split('[')[0]}(" in (ROOT / file).read_text(), test
