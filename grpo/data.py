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

Sample = dict[str, Any]  # "prompt", the other columns of the row, and "prompt_ids" once it is tokenized
# In a mixture, this key holds the name of the dataset. The space avoids a clash with a column name.
SOURCE = "data set"
Prompt = str | list[dict[str, str]]  # a text or messages: [{"role": "user", "content": ...}, ...]


class Dataset(Sequence[Sample]):
    """A list of samples. Each sample knows where it was read from, for example "data/x.jsonl, line 7"."""

    def __init__(self, path: object, rows: Iterable[tuple[str, Sample]]) -> None:
        """`path`: the source of the rows. `rows`: (place, sample) pairs; a place is like "data/x.jsonl, line 7"."""
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
        """Where sample `index` was read from, for error messages."""
        return self.places[index]

    @property
    def epoch_size(self) -> int:
        """Number of samples drawn per epoch."""
        return len(self)

    def at(self, index: int, epoch: int, seed: int) -> Sample:
        """The sample at `index` (0 ... epoch_size - 1) of an epoch. Only mixtures depend on `epoch` and `seed`."""
        return self[index]

    def draw(self, n: int, seed: int) -> Sample:
        """Sample n (0, 1, ...) of an endless stream of epochs, each shuffled by (seed, epoch)."""
        epoch, index = divmod(n, self.epoch_size)
        return self.at(_epoch_order(seed, epoch, self.epoch_size)[index], epoch, seed)


def model_input(sample: Sample) -> Any:
    """The prompt to give to the sampler: token ids if the sample is tokenized, else the text."""
    ids: list[int] | None = sample.get("prompt_ids")
    return sample["prompt"] if ids is None else ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt as readable text. Messages are printed one per line as "role: content"."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def samples_for_step(dataset: Dataset, *, step: int, batch_size: int, seed: int, round: int = 0) -> list[Sample]:
    """The `batch_size` samples of training step `step` (1, 2, ...).

    The data is read in epochs, each shuffled by (seed, epoch). A step may span several epochs. The function keeps no
    state between calls, so a resumed run sees exactly the samples that an uninterrupted run would see. For dynamic
    sampling, `round` 1, 2, ... gives `batch_size` other samples, drawn from the whole dataset by (seed, step, round).
    Sample p of a round may replace sample p of the step.
    """
    if round > 0:
        return _samples_for_round(dataset, step, batch_size, seed, round)
    return [dataset.draw(n, seed) for n in range((step - 1) * batch_size, step * batch_size)]


def _samples_for_round(dataset: Dataset, step: int, batch_size: int, seed: int, round: int) -> list[Sample]:
    """No sample is drawn twice unless the dataset is too small. For a mixture, the step is used as the epoch number."""
    order = np.random.default_rng([seed, step, round]).permutation(dataset.epoch_size).tolist()
    return [dataset.at(order[p % len(order)], step, seed) for p in range(batch_size)]


@lru_cache(maxsize=32)  # enough for the current and the previous epoch of every dataset of a mixture
def _epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size).tolist()


def __getattr__(name: str) -> Any:
    """Keeps `from grpo.data import JSONLinesDataset` working; the class has moved to grpo/datasets/rows.py."""
    if name == "JSONLinesDataset":
        return getattr(import_module("grpo.datasets.rows"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
