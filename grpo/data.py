"""Datasets -> prompts: which samples a training step sees, as a pure function of (seed, step).

Reading order: config.yaml -> train_grpo.py -> [grpo/data.py] -> grpo/rollout.py -> ...
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from grpo.errors import InputError, unreadable

Sample = dict[str, Any]  # "prompt" and the columns of its data set; also "prompt_ids" where it has met a tokenizer
SOURCE = "data set"  # key of a sample in a mixture: the name of its data set; no column that a function could name
Prompt = str | list[dict[str, str]]  # a text, or messages: [{"role": "user", "content": ...}, ...]


class Dataset(Sequence[Sample]):
    """Samples, and where each stands."""

    def __init__(self, path: str | Path, rows: Iterable[tuple[str, Sample]]) -> None:
        """`rows`: (place, sample) pairs; a place such as "data/x.jsonl, line 7" is for error messages."""
        self.path = str(path)
        pairs = list(rows)
        if not pairs:
            raise InputError(f"{path}: has no samples")
        self.places, self.samples = [place for place, _ in pairs], [sample for _, sample in pairs]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]

    def place(self, index: int) -> str:
        """Where sample `index` stands, for error messages."""
        return self.places[index]

    @property
    def epoch_size(self) -> int:
        """Samples drawn in one epoch."""
        return len(self)

    def at(self, place: int, epoch: int, seed: int) -> Sample:
        """What stands at `place` of 0 ... epoch_size - 1: the same in every epoch, unless data sets are mixed."""
        return self[place]

    def draw(self, n: int, seed: int) -> Sample:
        """Sample n (0, 1, ...) of an endless stream: epochs, each in an order of its own by (seed, epoch)."""
        epoch, index = divmod(n, self.epoch_size)
        return self.at(_epoch_order(seed, epoch, self.epoch_size)[index], epoch, seed)


class JSONLinesDataset(Dataset):
    """A file with one JSON object a line.

    Only "prompt" is required, a text or a list of messages; what else a line must have is up to the rewards, which name
    the columns they need. Blank lines are passed over. Wrong input is an InputError that names the file and the line.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, ((place, with_prompt(sample, place)) for place, sample in json_lines(path)))


def json_lines(path: str | Path) -> Iterator[tuple[str, Sample]]:
    """(place, sample) of every line that is not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # editors of Windows put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, as_sample(parse_json(line, place), place)


def parse_json(text: str, place: str) -> Any:
    """What a JSON text says; an InputError that names the place if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InputError(f"{place}: not JSON: {error.msg} ({where})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{place}: not JSON: {error}") from error


def as_sample(value: Any, place: str) -> Sample:
    """A JSON value that must be an object."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: got {type(value).__name__}, expected a JSON object")
    return value


def with_prompt(sample: Sample, place: str) -> Sample:
    """The sample, which must have a "prompt" that a model can be asked."""
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
    """[{"role": ..., "content": ...}, ...], a user's message last: what is to be written is the answer to it."""
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


def model_input(sample: Sample) -> Any:
    """What the sampler is given: the token ids where the sample has met a tokenizer, else its text."""
    ids: list[int] | None = sample.get("prompt_ids")
    return sample["prompt"] if ids is None else ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: messages one after another, each behind its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def samples_for_step(dataset: Dataset, *, step: int, batch_size: int, seed: int, round: int = 0) -> list[Sample]:
    """The `batch_size` samples of training step `step` (1, 2, ...).

    The data is read in epochs, each a fresh permutation by (seed, epoch); a step may span two of them. Nothing is
    remembered between calls, so a resumed run goes on exactly where it would have been. Sample p of resampling round
    1, 2, ... is the one to take the place of sample p: `batch_size` of them, drawn from all by (seed, step, round).
    """
    if round > 0:
        return _samples_for_round(dataset, step, batch_size, seed, round)
    return [dataset.draw(n, seed) for n in range((step - 1) * batch_size, step * batch_size)]


def _samples_for_round(dataset: Dataset, step: int, batch_size: int, seed: int, round: int) -> list[Sample]:
    """Drawn without repetition, as far as the data set goes."""
    order = np.random.default_rng([seed, step, round]).permutation(dataset.epoch_size).tolist()
    return [dataset.at(order[place % len(order)], step, seed) for place in range(batch_size)]


@lru_cache(maxsize=32)  # this epoch and the last, of each data set of a mixture
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size).tolist()
