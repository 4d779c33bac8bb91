"""Datasets -> prompts: which samples a training step sees, as a pure function of (seed, step).

Reading order: train_grpo.py -> [grpo/data.py] -> grpo/rollout.py -> ...

Reading files is in grpo/datasets/.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from grpo.errors import InputError

Sample = dict[str, Any]  # "prompt" and the columns of its data set; once it is tokenized also "prompt_ids"
SOURCE = "data set"  # key of a sample in a mixture: the name of its data set; its space keeps it apart from columns
Prompt = str | list[dict[str, str]]  # a text, or messages: [{"role": "user", "content": ...}, ...]


class Dataset(Sequence[Sample]):
    """Samples, each with the place it comes from: "data/x.jsonl, line 7"."""

    def __init__(self, path: object, rows: Iterable[tuple[str, Sample]]) -> None:
        """`path`: where the rows come from. `rows`: (place, sample) pairs, a place such as "data/x.jsonl, line 7"."""
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
        """Where sample `index` comes from, for error messages."""
        return self.places[index]

    @property
    def epoch_size(self) -> int:
        """Samples drawn in one epoch."""
        return len(self)

    def at(self, index: int, epoch: int, seed: int) -> Sample:
        """The sample at position `index` (0 ... epoch_size - 1) of an epoch; only a mixture differs between epochs."""
        return self[index]

    def draw(self, n: int, seed: int) -> Sample:
        """Sample n (0, 1, ...) of an endless stream of epochs, each shuffled by (seed, epoch)."""
        epoch, index = divmod(n, self.epoch_size)
        return self.at(_epoch_order(seed, epoch, self.epoch_size)[index], epoch, seed)


def model_input(sample: Sample) -> Any:
    """What the sampler is given: the token ids if the sample is tokenized, else its text."""
    ids: list[int] | None = sample.get("prompt_ids")
    return sample["prompt"] if ids is None else ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: messages one after another, each behind its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def samples_for_step(dataset: Dataset, *, step: int, batch_size: int, seed: int, round: int = 0) -> list[Sample]:
    """The `batch_size` samples of training step `step` (1, 2, ...).

    The data is read in epochs, each shuffled by (seed, epoch); a step may span several epochs. Nothing is remembered
    between calls, so a resumed run continues exactly where it would have been. For dynamic sampling, `round` 1, 2, ...
    gives `batch_size` other candidates, drawn by (seed, step, round) from all data: candidate p may replace sample p.
    """
    if round > 0:
        return _samples_for_round(dataset, step, batch_size, seed, round)
    return [dataset.draw(n, seed) for n in range((step - 1) * batch_size, step * batch_size)]


def _samples_for_round(dataset: Dataset, step: int, batch_size: int, seed: int, round: int) -> list[Sample]:
    """Drawn without repetition, as far as the data set goes. In a mixture the step takes the place of the epoch."""
    order = np.random.default_rng([seed, step, round]).permutation(dataset.epoch_size).tolist()
    return [dataset.at(order[p % len(order)], step, seed) for p in range(batch_size)]


@lru_cache(maxsize=32)  # this epoch and the previous one, of each data set of a mixture
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size).tolist()


def __getattr__(name: str) -> Any:
    """`from grpo.data import JSONLinesDataset` keeps working for users' code; the class is in grpo/datasets/rows.py."""
    if name == "JSONLinesDataset":
        return getattr(import_module("grpo.datasets.rows"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
