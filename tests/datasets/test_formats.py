"""Files of every kind -> the same samples; columns of other names; conversations; errors that name file and row."""

import builtins
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.datasets.formats import READERS, Columns, load_dataset
from grpo.errors import InputError

ROWS = [{"prompt": "1+1=", "answer": "2", "level": "a"}, {"prompt": "2+2=\nsay", "answer": "4", "level": "b, c"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_samples(suffix: str, tmp_path: Path) -> None:
    dataset = load_dataset(str(write(tmp_path / f"data{suffix}", ROWS)))
    assert list(dataset) == ROWS
    assert all(dataset.place(index).startswith(str(tmp_path)) for index in range(2))
    assert dataset.place(0) != dataset.place(1)


@pytest.mark.parametrize("suffix", READERS)
def test_columns_of_other_names(suffix: str, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "solution": row["answer"], "level": row["level"]} for row in ROWS]
    path = str(write(tmp_path / f"data{suffix}", rows))
    assert list(load_dataset(path, Columns("question", "solution"))) == ROWS
    with pytest.raises(
        InputError, match=r'data\S*(, \w+ \d+)?: has no "prompt" \(prompt_column\); it has question, solution, level'
    ):
        load_dataset(path)
    with pytest.raises(InputError, match=r'has no "gold" \(answer_column\); it has question, solution, level'):
        load_dataset(path, Columns("question", "gold"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"prompt": "x"}', r"a\.json: got dict, expected a list of JSON objects \(\.jsonl: one a line\)"),
        ("a.json", '[{"prompt": "x"}, 5]', r"a\.json, entry 2: got int, expected a JSON object"),
        ("a.json", "[\n{]", r"a\.json: not JSON: .* \(line 2, column 2\)"),
        ("a.json", "[]", r"a\.json: has no samples"),
        ("a.csv", "prompt,answer\nx\n", r"a\.csv, line 2: has not as many fields as the header \(2\)"),
        ("a.csv", "prompt,answer\nx,1,2\n", r"a\.csv, line 2: has not as many fields as the header \(2\)"),
        ("a.csv", 'prompt,answer\n"x,1\n', r"a\.csv, line \d: not CSV: "),
        ("a.csv", "", r"a\.csv: has no samples"),
        ("a.parquet", "PAR1 no", r"a\.parquet: cannot be read as Parquet: "),
        ("a.txt", "x", r"a\.txt: got a file that ends in '\.txt', allowed: \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_dataset(str(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.json", "missing.csv", "missing.parquet"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name}: cannot be read: No such file"):
        load_dataset(str(tmp_path / name))


@pytest.mark.parametrize("name", ["nothing", "a/b", "./a/b:train", "a/b/c:train", "a/b:c:d:e"])
def test_what_is_neither_file_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=r"there is no such file; a data set of the Hugging Face Hub is named OWNER/NAME"
    ):
        load_dataset(name)


def without(package: str) -> Callable[..., Any]:
    """An import that does not find this package."""
    real = builtins.__import__

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    return find


def test_a_missing_package_is_named_with_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setattr(builtins, "__import__", without("pyarrow"))
    with pytest.raises(InputError, match=r"a\.parquet: Parquet files need the package datasets: pip install datasets"):
        load_dataset(str(path))
    monkeypatch.setattr(builtins, "__import__", without("datasets"))
    with pytest.raises(InputError, match=r"a/b:train: data sets of the Hugging Face Hub need the package datasets"):
        load_dataset("a/b:train")


def test_a_hub_name_is_split_into_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*names: str, split: str) -> list[dict[str, Any]]:
        asked.append((*names, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(load_dataset("a/b:train")) == list(load_dataset("a/b:main:test")) == ROWS
    assert asked == [("a/b", "train"), ("a/b", "main", "test")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"a/b:train: cannot be had from the Hugging Face Hub: division by zero"):
        load_dataset("a/b:train")


# Conversations

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "1+1?"},
    {"from": "gpt", "value": "2"},
    {"from": "human", "value": "plus 3?"},
    {"from": "gpt", "value": "5"},
    {"from": "human", "value": "thanks"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
HISTORY = [SYSTEM, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
QUESTION = {"role": "user", "content": "plus 3?"}


def conversation(tmp_path: Path, turns: Any, **columns: Any) -> dict[str, Any]:
    path = write(tmp_path / "talk.jsonl", [{"conversations": turns, "id": 7}])
    (sample,) = load_dataset(str(path), Columns("conversations", **columns))
    return sample


def test_the_last_turn_of_the_assistant_is_what_is_to_be_written(tmp_path: Path) -> None:
    assert conversation(tmp_path, SHAREGPT) == {"prompt": [*HISTORY, QUESTION], "answer": "5", "id": 7}


def test_a_single_turn_is_the_last_question_and_the_system_prompt(tmp_path: Path) -> None:
    single = conversation(tmp_path, SHAREGPT, single_turn_ratio=1.0)
    assert single == {"prompt": [SYSTEM, QUESTION], "answer": "5", "id": 7}


def test_the_ratio_of_single_turns_is_kept_and_decided_by_the_seed(tmp_path: Path) -> None:
    path = str(write(tmp_path / "talk.jsonl", [{"prompt": SHAREGPT}] * 1000))

    def singles(ratio: float, seed: int) -> list[bool]:
        columns = Columns(single_turn_ratio=ratio, seed=seed)
        return [len(sample["prompt"]) == 2 for sample in load_dataset(path, columns)]

    assert sum(singles(0.0, 0)) == 0
    assert abs(sum(singles(0.3, 0)) - 300) < 4 * (1000 * 0.3 * 0.7) ** 0.5
    assert singles(0.3, 0) == singles(0.3, 0) != singles(0.3, 1)


def test_messages_that_end_with_the_users_are_a_prompt_as_they_stand(tmp_path: Path) -> None:
    assert conversation(tmp_path, [*HISTORY, QUESTION]) == {"prompt": [*HISTORY, QUESTION], "id": 7}


def test_messages_that_end_with_the_assistants_are_split(tmp_path: Path) -> None:
    turns = [*HISTORY, QUESTION, {"role": "assistant", "content": "5"}]
    assert conversation(tmp_path, turns) == {"prompt": [*HISTORY, QUESTION], "answer": "5", "id": 7}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "human", "value": "x"}], r"line 1: a conversation without a turn of the assistant"),
        ([{"from": "alien", "value": "x"}], r"line 1: unknown role 'alien', allowed: system, human, user, gpt"),
        ([{"role": "alien", "content": "x"}], r"line 1: unknown role 'alien', allowed: system, user, assistant"),
        ([{"from": "human"}], r"line 1: got the turn \{'from': 'human'\}, expected"),
        ([{"from": "human", "value": 5}], r"line 1: got the turn .*, two texts"),
        ([5], r"line 1: got the turn 5, expected"),
        ([{"from": ["human"], "value": "x"}], r"line 1: got the turn .*, two texts"),
        ([], r'line 1: "prompt" is an empty list of messages'),
        ([{"from": "gpt", "value": "x"}], r'line 1: "prompt" is an empty list of messages'),
        ([SYSTEM], r'line 1: "prompt" must end with a message of the user'),
    ],
)
def test_a_conversation_that_is_none_is_named(turns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        conversation(tmp_path, turns)
