"""Copies of the project with one well-known bug, from tests/mutant_list.py. The code itself has no switch for bugs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from tests.mutant_list import MUTANTS, Mutant
from tests.mutants import check, copied


def mutant_named(name: str, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> Mutant:
    """The mutant of this name. Its pattern must occur exactly once in the current code."""
    found = [mutant for mutant in mutants if mutant.name == name]
    if len(found) != 1:
        raise SystemExit(f"tests/mutant_list.py has {len(found)} mutants named {name!r}, expected 1")
    if problems := check(found, root):
        raise SystemExit("; ".join(problems))
    return found[0]


def broken_project(mutant: Mutant, folder: Path, root: Path = ROOT) -> Path:
    """Copy the project to `folder`, which is replaced, and insert the mutant's bug."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy = copied(root, folder)
    file = copy / mutant.file
    file.write_text(file.read_text("utf-8").replace(mutant.pattern, mutant.replacement), "utf-8")
    return copy
