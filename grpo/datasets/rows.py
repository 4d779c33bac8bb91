"""Read JSON lines files, and check that every sample has a valid prompt.

Invalid input raises an InputError that names the file and the line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.data import Dataset, Sample
from grpo.errors import InputError, unreadable


class JSONLinesDataset(Dataset):
    """A file with one JSON object per line.

    Only "prompt" is required, a text or a list of messages. The rewards may need further columns. Blank lines are
    skipped. Invalid input raises an InputError that names the file and the line.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, ((place, with_prompt(sample, place)) for place, sample in json_lines(path)))


def json_lines(path: str | Path) -> Iterator[tuple[str, Sample]]:
    """Yield (place, sample) for every line that is not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors may write a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, as_sample(parse_json(line, place), place)


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text. Raises an InputError that names the place if the text is not valid JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InputError(f"{place}: not JSON: {error.msg} ({where})") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
        raise InputError(f"{place}: not JSON: {error}") from error


def as_sample(value: Any, place: str) -> Sample:
    """Check that a JSON value is an object, and return it."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: got {type(value).__name__}, expected a JSON object")
    return value


def with_prompt(sample: Sample, place: str) -> Sample:
    """Check that the sample has a valid "prompt", and return the sample."""
    if "prompt" not in sample:
        raise InputError(f'{place}: has no "prompt"; it has {", ".join(sample) or "nothing"}')
    prompt = sample["prompt"]
    texts = [prompt]
    if isinstance(prompt, list):
        check_messages(prompt, place)
        texts = [message["content"] for message in prompt]
    elif not isinstance(prompt, str) or not prompt:
        raise InputError(f'{place}: "prompt" must be a text that is not empty, or a list of messages')
    if any(re.search("[\ud800-\udfff]", text) for text in texts):
        raise InputError(f'{place}: "prompt" has half a surrogate pair: no tokenizer takes it')
    return sample


ROLES = ("system", "user", "assistant")


def check_messages(messages: list[Any], place: str) -> None:
    """Check that the messages are [{"role": ..., "content": ...}, ...] and that the last one is the user's."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise InputError(f'{place}: "prompt": got {message!r}, expected {{"role": …, "content": …}}')
        if message["role"] not in ROLES:
            raise InputError(f'{place}: "prompt": unknown role {message["role"]!r}, allowed: {", ".join(ROLES)}')
        if not isinstance(message["content"], str):
            raise InputError(f'{place}: "prompt": content: got {type(message["content"]).__name__}, expected a text')
    if not messages:
        raise InputError(f'{place}: "prompt" is an empty list of messages')
    if messages[-1]["role"] != "user":
        raise InputError(f'{place}: "prompt" must end with a message of the user')
