"""Load the tokenised data of a run: one dataset, or a deterministic mixture of several datasets by weight.

An epoch of a mixture has a fixed number of places, divided among the datasets by weight. Each epoch draws the places in
a new random order (grpo/data.py). A dataset fills its places with its own rows, in its own epochs. Three properties
follow: the shares are exact, the rows of a dataset occur equally often, and sample n is a function of (seed, n).
"""

import math
import sys
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from transformers import PreTrainedTokenizerBase

from grpo.data import SOURCE, Dataset, Sample
from grpo.datasets.chat import PromptFormat, tokenized, unused_template
from grpo.datasets.formats import Columns, load_dataset
from grpo.errors import InputError
from grpo.settings.config import Config
from grpo.settings.sources import Source, sources_of


class Mixture(Dataset):
    """Several datasets. As a sequence they are concatenated; samples are drawn by their shares."""

    def __init__(self, parts: Sequence[Dataset], sizes: Sequence[int]) -> None:
        """`sizes`: how many samples each part contributes to an epoch; may be more than the part has."""
        super().__init__(
            " + ".join(part.path for part in parts),
            [(part.place(index), part[index]) for part in parts for index in range(len(part))],
        )
        self.parts, self.sizes = list(parts), list(sizes)
        self.starts = [0, *accumulate(sizes)]

    @property
    def epoch_size(self) -> int:
        return self.starts[-1]

    def at(self, place: int, epoch: int, seed: int) -> Sample:
        number = next(number for number, end in enumerate(self.starts[1:]) if place < end)
        own_seed = int(
            np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        )  # a different seed for each dataset, so their orders are independent
        n = epoch * self.sizes[number] + place - self.starts[number]
        return self.parts[number].draw(n, own_seed)


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` places by weight into whole numbers. Places left by rounding down go to the largest remainders.

    >>> divide(10, [1.0, 1.0, 1.0])
    [4, 3, 3]
    """
    exact = [total * weight / math.fsum(weights) for weight in weights]
    sizes = [math.floor(size) for size in exact]
    order = sorted(range(len(exact)), key=lambda index: sizes[index] - exact[index])
    for index in order[: total - sum(sizes)]:
        sizes[index] += 1
    return sizes


def load_datasets(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """The training set and the evaluation set, with "prompt_ids". In a mixture, each sample also has its SOURCE."""
    return load_train_set(config, tokenizer), load_eval_set(config, tokenizer)


def load_train_set(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The dataset or mixture to train on."""
    sources = sources_of(vars(config))
    parts = [_load(source.path, source, config, tokenizer) for source in sources]
    if unused_template(tokenizer, config.chat_template, parts[0][0]["prompt"]):
        print("warning: chat_template none: the tokenizer has a template, which auto would use", file=sys.stderr)
    if config.datasets is None:
        return parts[0]
    sizes = divide(config.total_rows or sum(map(len, parts)), [source.weight for source in sources])
    for source, size in zip(sources, sizes, strict=True):
        if size == 0:
            raise InputError(
                f"datasets: {source.name}: its share of an epoch of {sum(sizes)} rows is less than one row"
            )
    return Mixture(parts, sizes)


def load_eval_set(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The held-out data. For a mixture, the complete held-out files of all datasets that have an eval_path."""
    sources = sources_of(vars(config))
    parts = [_load(source.eval_path, source, config, tokenizer) for source in sources if source.eval_path is not None]
    return parts[0] if config.datasets is None else Mixture(parts, [len(part) for part in parts])


def _of(source: Source, sample: Sample, place: str) -> Sample:
    """The sample with the name of its dataset, and with the dataset's system prompt if the sample has none."""
    own = sample.get("system_prompt")
    if own is not None and not isinstance(own, str):
        raise InputError(f"{place}: system_prompt: got {own!r}, expected a text")
    if own is None and source.system_prompt is not None:
        sample = sample | {"system_prompt": source.system_prompt}
    return sample if source.name is None else sample | {SOURCE: source.name}


def _load(path: str, source: Source, config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    ratio = 1.0 if config.force_single_turn else config.single_turn_ratio
    columns = Columns(source.prompt_column, source.answer_column, ratio, config.seed)
    dataset = load_dataset(path, columns)
    dataset = Dataset(
        path, [(dataset.place(i), _of(source, sample, dataset.place(i))) for i, sample in enumerate(dataset)]
    )
    form = PromptFormat(tokenizer, config.chat_template)
    return tokenized(dataset, form, max_prompt_length=config.max_prompt_length, drop_long=config.long_prompts == "drop")
