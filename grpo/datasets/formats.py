"""Load datasets from files and from the Hugging Face Hub. Columns may have other names; prompts may be conversations.

    data/train.jsonl            one object per line      data/train.csv        a header, then rows
    data/train.json             a list of objects        data/train.parquet
    openai/gsm8k:main:train     a dataset of the Hugging Face Hub: NAME[:SUBSET]:SPLIT

A row needs a "prompt"; the setting `prompt_column` may name another column. A prompt is a text, a list of messages, or
a conversation in the ShareGPT format, {"from": "human" | "gpt" | "system", "value": ...}. In a conversation, the last
turn of the assistant becomes the "answer", and the messages before it become the prompt.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo.data import Dataset, Sample
from grpo.datasets.rows import as_sample, json_lines, parse_json, with_prompt
from grpo.errors import InputError, missing_package, unreadable

Rows = Iterator[tuple[str, Sample]]  # (place, row); a place is a file and a line, for error messages

SPEAKERS = {  # a value of ShareGPT's "from", or the role of a message -> the role of a message
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Columns:
    """How to turn a row into a sample."""

    prompt: str = "prompt"
    answer: str = "answer"
    single_turn_ratio: float = 0.0  # fraction of conversations reduced to their last question
    seed: int = 0  # determines which conversations are reduced


def load_dataset(path: str, columns: Columns = Columns()) -> Dataset:
    """Load the dataset at `path`, a file or a Hub name.

    Raises:
        InputError: the dataset cannot be read, a row lacks a column, or a prompt is invalid. The message names file
            and row.
    """
    suffix = Path(path).suffix
    if suffix in READERS:
        rows = READERS[suffix](path)
    elif Path(path).exists():
        found = "a folder" if Path(path).is_dir() else f"a file that ends in {suffix or 'nothing'!r}"
        raise InputError(f"{path}: got {found}, allowed: {', '.join(READERS)}")
    else:
        rows = _hub_rows(path)
    return Dataset(path, ((place, _to_sample(row, number, place, columns)) for number, (place, row) in enumerate(rows)))


# Formats


def _json_rows(path: str) -> Rows:
    values = parse_json(_read(path), path)
    if not isinstance(values, list):
        raise InputError(f"{path}: got {type(values).__name__}, expected a list of JSON objects (.jsonl: one a line)")
    for number, value in enumerate(values, start=1):
        place = f"{path}, entry {number}"
        yield place, as_sample(value, place)


def _csv_rows(path: str) -> Rows:
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{place}: has not as many fields as the header ({len(reader.fieldnames or ())})")
            yield place, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _parquet_rows(path: str) -> Rows:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("datasets", f"{path}: Parquet files") from error
    try:
        with Path(path).open("rb") as file:
            rows = parquet.read_table(file).to_pylist()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise unreadable(path, error) from error
    except Exception as error:  # pyarrow may raise any error for a file of the user
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _hub_rows(path: str) -> Rows:
    name, *rest = path.split(":")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or len(rest) not in (1, 2):
        raise InputError(
            f"{path}: there is no such file; a data set of the Hugging Face Hub is named OWNER/NAME[:SUBSET]:SPLIT"
        )
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package("datasets", f"{path}: data sets of the Hugging Face Hub") from error
    *subset, split = rest
    try:
        rows = datasets.load_dataset(name, *subset, split=split)
    except Exception as error:  # no network, dataset or split; the type of the error depends on the library's version
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be had from the Hugging Face Hub: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", dict(row)


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


# Columns and conversations


def _to_sample(row: Sample, number: int, place: str, columns: Columns) -> Sample:
    """Turn a row into a sample: rename the prompt and answer columns, and keep all other columns."""
    for name, key in (("prompt", "prompt_column"), ("answer", "answer_column")):
        column = getattr(columns, name)
        if column not in row and not (name == column == "answer"):  # only some rewards need an "answer"
            raise InputError(f'{place}: has no "{column}" ({key}); it has {", ".join(map(str, row)) or "nothing"}')
    sample = {key: value for key, value in row.items() if key not in (columns.prompt, columns.answer)}
    sample["prompt"] = row[columns.prompt]
    if columns.answer in row:
        sample["answer"] = row[columns.answer]
    if isinstance(sample["prompt"], list):
        prompt, answer = _split(sample["prompt"], place)
        if answer is not None:
            sample.setdefault("answer", answer)
        is_single = np.random.Generator(np.random.Philox(key=[columns.seed, number])).random()
        sample["prompt"] = _last_question(prompt) if is_single < columns.single_turn_ratio else prompt
    return with_prompt(sample, place)


def _split(turns: list[Any], place: str) -> tuple[list[dict[str, str]], str | None]:
    """Split a conversation into the messages before the assistant's last turn, and that turn.

    Messages that end with a message of the user are returned unchanged, without an answer (None).
    """
    is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    who, what = ("from", "value") if is_sharegpt else ("role", "content")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in (who, what)):
            raise InputError(f'{place}: got the turn {turn!r}, expected {{"{who}": …, "{what}": …}}, two texts')
        if turn[who] not in SPEAKERS:
            allowed = ", ".join(SPEAKERS if is_sharegpt else dict.fromkeys(SPEAKERS.values()))
            raise InputError(f"{place}: unknown role {turn[who]!r}, allowed: {allowed}")
        messages.append({"role": SPEAKERS[turn[who]], "content": turn[what]})
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if is_sharegpt and not spoken:
        raise InputError(f"{place}: a conversation without a turn of the assistant: there is nothing to be written")
    if not spoken or (not is_sharegpt and messages[-1]["role"] == "user"):
        return messages, None
    return messages[: spoken[-1]], messages[spoken[-1]]["content"]


def _last_question(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system message and the last message: the last question without the earlier turns."""
    return [message for message in messages[:-1] if message["role"] == "system"] + messages[-1:]
