"""Datasets -> prompts: which samples a training step sees, as a pure function of (seed, step).

Reading order: config.yaml -> train_grpo.py -> [grpo/data.py] -> grpo/rollout.py -> ...
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.errors import InputError, unreadable

Sample = dict[str, Any]


class JSONLinesDataset(Sequence[Sample]):
    """A file with one JSON object a line, as a sequence of dicts.

    Only "prompt" is required; what else a line must have is up to the rewards, which name the columns they need.
    Blank lines are passed over. Wrong input is an InputError that names the file and the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples: list[Sample] = []
        self.line_numbers: list[int] = []  # of each sample, for error messages
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, error) from error
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                self.samples.append(self._parse(line, number))
                self.line_numbers.append(number)
        if not self.samples:
            raise InputError(f"{path}: has no samples, expected one JSON object a line")

    def _parse(self, line: str, number: int) -> Sample:
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{self.path}, line {number}: not JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise InputError(f"{self.path}, line {number}: not JSON: {error}") from error
        if not isinstance(sample, dict):
            raise InputError(f"{self.path}, line {number}: got {type(sample).__name__}, expected a JSON object")
        if "prompt" not in sample:
            raise InputError(f'{self.path}, line {number}: has no "prompt"; it has {", ".join(sample) or "nothing"}')
        if not isinstance(sample["prompt"], str) or not sample["prompt"]:
            raise InputError(f'{self.path}, line {number}: "prompt" must be a text that is not empty')
        if re.search("[\ud800-\udfff]", sample["prompt"]):
            raise InputError(f'{self.path}, line {number}: "prompt" has half a surrogate pair: no tokenizer takes it')
        return sample

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        return self.samples[index]

    def place(self, index: int) -> str:
        """Where sample `index` stands, for error messages: "data/x.jsonl, line 7"."""
        return f"{self.path}, line {self.line_numbers[index]}"


def check_prompt_lengths(dataset: JSONLinesDataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> int:
    """Every prompt must fit before the run starts: cutting it silently would ask another question.

    Returns the length of the longest one, in tokens.
    """
    lengths = [len(ids) for ids in tokenizer([sample["prompt"] for sample in dataset])["input_ids"]]
    shortest, longest = int(np.argmin(lengths)), int(np.argmax(lengths))
    if lengths[shortest] == 0:
        raise InputError(f"{dataset.place(shortest)}: the prompt has no tokens")
    if lengths[longest] > max_prompt_length:
        raise InputError(
            f"{dataset.place(longest)}: the longest prompt has {lengths[longest]} tokens, "
            f"max_prompt_length allows {max_prompt_length}"
        )
    return lengths[longest]


def samples_for_step(
    dataset: Sequence[Sample], *, step: int, batch_size: int, seed: int, round: int = 0
) -> list[Sample]:
    """The `batch_size` samples of training step `step` (1, 2, ...).

    The data is read in epochs, each a fresh permutation by (seed, epoch); a step may span two of them. Nothing is
    remembered between calls, so a resumed run goes on exactly where it would have been. Sample p of resampling round
    1, 2, ... is the one to take the place of sample p: `batch_size` of them, drawn from all by (seed, step, round).
    """
    if round > 0:
        return _samples_for_round(dataset, step, batch_size, seed, round)
    places = range((step - 1) * batch_size, step * batch_size)
    return [dataset[_epoch_order(seed, place // len(dataset), len(dataset))[place % len(dataset)]] for place in places]


def _samples_for_round(dataset: Sequence[Sample], step: int, batch_size: int, seed: int, round: int) -> list[Sample]:
    """Drawn without repetition, as far as the data set goes."""
    order = np.random.default_rng([seed, step, round]).permutation(len(dataset)).tolist()
    return [dataset[order[place % len(order)]] for place in range(batch_size)]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size).tolist()
