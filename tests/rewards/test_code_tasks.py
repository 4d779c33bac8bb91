"""The programming problems: the files are the script's, and their tests tell right programs from wrong ones."""

import ast
import builtins
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.datasets.rows import JSONLinesDataset
from grpo.rewards.library.code import code_block, code_reward
from reward_model import load_rewards, score_completions

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": 96, "eval": 24}  # rows, at least
Row = dict[str, Any]


def rows_of(split: str) -> list[Row]:
    return list(JSONLinesDataset(ROOT / f"data/code_tasks_{split}.jsonl"))


ROWS = [row for split in SPLITS for row in rows_of(split)]


def is_script(row: Row) -> bool:
    return isinstance(row["tests"][0], dict)


def signature(row: Row) -> str:
    """What the prompt asks for: add(a, b)."""
    return re.match(r"Write a Python function (\w+\([\w, ]+\)) that returns ", row["prompt"])[1]


def name_of(row: Row) -> str:
    return signature(row).partition("(")[0]


def calls(row: Row) -> list[tuple[str, list[Any], Any]]:
    """Of each assert the function's name, the arguments and the expected value."""
    found = []
    for test in row["tests"]:
        compare = ast.parse(test).body[0].test
        call, [expected] = compare.left, compare.comparators
        assert isinstance(compare.ops[0], ast.Eq)
        # set() is no literal
        values = [set() if ast.unparse(node) == "set()" else ast.literal_eval(node) for node in (*call.args, expected)]
        found.append((call.func.id, values[:-1], values[-1]))
    return found


def rewards(rows: list[Row], completions: list[str]) -> list[float]:
    scores = score_completions(load_rewards([{"name": "code"}]), rows, completions, [[1]] * len(rows))
    return scores.combined.tolist()


def test_the_script_reproduces_the_files_byte_for_byte(tmp_path: Path) -> None:
    script = tmp_path / "make_code_tasks.py"
    script.write_bytes((ROOT / "data/make_code_tasks.py").read_bytes())
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    for split in SPLITS:
        file = f"code_tasks_{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (ROOT / "data" / file).read_bytes()


def test_every_solution_passes_all_tests() -> None:
    values = rewards(ROWS, [row["solution"] for row in ROWS])
    assert [row["prompt"] for row, value in zip(ROWS, values, strict=True) if value != 1] == []


WRONG: dict[str, tuple[bool, Callable[[Row], str]]] = {  # for scripts?, the program
    "returns None": (False, lambda row: f"def {signature(row)}:\n    return None"),
    "returns its first argument": (False, lambda row: f"def {name_of(row)}(first, *others):\n    return first"),
    "prints nothing": (True, lambda row: "import sys\n\ntext = sys.stdin.read()"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_program_never_gets_full_marks(kind: str) -> None:
    for_scripts, program = WRONG[kind]
    rows = [row for row in ROWS if is_script(row) == for_scripts]
    values = rewards(rows, [f"```python\n{program(row)}\n```" for row in rows])
    assert [row["prompt"] for row, value in zip(rows, values, strict=True) if value == 1] == []
    assert sum(values) / len(values) < 0.2


def test_no_constant_and_no_argument_is_the_answer_to_most_tests() -> None:
    """Whichever value a program always returns, and whichever of its arguments it hands back."""
    for row in ROWS:
        if is_script(row):
            expected = [test["output"] for test in row["tests"]]
        else:
            expected = [repr(value) for _, _, value in calls(row)]
            for position in range(len(calls(row)[0][1])):
                same = [repr(arguments[position]) == repr(value) for _, arguments, value in calls(row)]
                assert sum(same) <= 0.6 * len(same), row["prompt"]
        assert max(Counter(expected).values()) <= 0.6 * len(expected), row["prompt"]


def test_no_problem_is_in_two_files() -> None:
    train, held_out = (rows_of(split) for split in SPLITS)
    for rows, least in zip((train, held_out), SPLITS.values(), strict=True):
        assert len(rows) >= least
        assert any(map(is_script, rows))
    prompts = [row["prompt"] for row in ROWS]
    names = [name_of(row) for row in ROWS if not is_script(row)]
    codes = [row["solution"] if is_script(row) else row["solution"].replace(name_of(row), "f") for row in ROWS]
    for texts in (prompts, names, codes):
        assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_every_row_can_be_scored_and_asks_for_what_it_tests() -> None:
    reward = code_reward()
    for row in ROWS:
        assert set(row) == {"prompt", "tests", "solution"}
        reward.check_sample(row)
        assert row["prompt"].endswith("Answer with one Python block.")
        assert code_block(row["solution"]).count("\n") <= 14
        if is_script(row):
            assert 3 <= len(row["tests"]) <= 4
            assert "reads from standard input" in row["prompt"]
        else:
            assert 4 <= len(row["tests"]) <= 6
            assert f"def {signature(row)}:" in row["solution"]
            assert {name for name, _, _ in calls(row)} == {name_of(row)}
            assert not hasattr(builtins, name_of(row))


def test_the_example_in_a_prompt_is_right_and_no_test() -> None:
    for row in ROWS:
        if is_script(row):
            given, printed = re.search(
                r"Example input:\n(.*)\nExample output:\n(.*)\nAnswer", row["prompt"], re.S
            ).groups()
            assert {"input": given, "output": printed} not in row["tests"]
            continue
        call, result = re.search(r"For example, (.*) returns (.*)\. Answer", row["prompt"]).groups()
        assert f"assert {call} == {result}" not in row["tests"]
        names: dict[str, Any] = {}
        exec(code_block(row["solution"]), names)
        assert eval(call, names) == ast.literal_eval(result)
