"""Shared code of the prepare_*.py scripts: convert questions with worked solutions to JSON lines in our columns."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `grpo` can be imported

from grpo.datasets.formats import Columns, load_dataset
from grpo.errors import InputError, errors_explained
from grpo.files import write_atomically

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """A published dataset."""

    name: str
    sources: dict[str, str]  # split -> file or Hub name
    question: str  # the column that becomes "prompt"
    solution: str  # the column that ends with the answer
    find_answer: Callable[[str], str | None]  # solution -> answer; None: the row is left out


def main(task: Task, description: str | None) -> None:
    """The command line: write each split and print how many rows it has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split, source in task.sources.items():
        parser.add_argument(
            f"--{split}", metavar="SOURCE", default=source, help=f"file or Hub name (default: {source})"
        )
    parser.add_argument("--out", metavar="FOLDER", default=str(FOLDER), help="where to write (default: data/)")
    arguments = parser.parse_args()
    with errors_explained():
        out = Path(arguments.out)
        if not out.is_dir():
            raise InputError(f"--out: there is no folder {out}")
        texts = {
            split: prepared(task, getattr(arguments, split)) for split in task.sources
        }  # all splits are prepared before the first one is written
        for split, text in texts.items():
            path = out / f"{task.name}_{split}.jsonl"
            write_atomically(path, text)
            print(f"{path}: {text.count(chr(10))} problems")


def prepared(task: Task, source: str) -> str:
    """The rows of `source`, one JSON object per line, with prompt, answer, solution and the other columns."""
    dataset = load_dataset(source, Columns(prompt=task.question))
    lines = []
    for index, sample in enumerate(dataset):
        solution = sample.get(task.solution)
        if not isinstance(solution, str):
            raise InputError(f'{dataset.place(index)}: has no "{task.solution}"; it has {", ".join(sample)}')
        answer = task.find_answer(solution)
        if answer:
            others = {key: value for key, value in sample.items() if key not in ("prompt", task.solution)}
            row = {"prompt": sample["prompt"], "answer": answer, "solution": solution, **others}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        raise InputError(f"{source}: no row has an answer that can be judged")
    if len(lines) < len(dataset):
        num_without = len(dataset) - len(lines)
        print(f"{source}: {num_without} of {len(dataset)} rows have no answer that can be judged: left out")
    return "".join(lines)
