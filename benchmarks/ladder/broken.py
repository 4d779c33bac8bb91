"""A copy of the project with one well-known bug in it, from tests/mutant_list.py: no switch in the code itself."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from tests.mutant_list import MUTANTS, Mutant
from tests.mutants import check, copied


def mutant_named(name: str, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> Mutant:
    """The mutant of that name, its pattern standing exactly once in the code as it is now."""
    found = [mutant for mutant in mutants if mutant.name == name]
    if len(found) != 1:
        raise SystemExit(f"tests/mutant_list.py has {len(found)} mutants named {name!r}, expected 1")
    if problems := check(found, root):
        raise SystemExit("; ".join(problems))
    return found[0]


def broken_project(mutant: Mutant, folder: Path, root: Path = ROOT) -> Path:
    """The project with the mutant's bug, copied anew into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy = copied(root, folder)
    file = copy / mutant.file
    file.write_text(file.read_text("utf-8").replace(mutant.pattern, mutant.replacement), "utf-8")
    return copy
