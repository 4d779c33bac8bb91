"""Answers to held-out problems: one greedy completion per problem, or k sampled completions per problem."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.data import SOURCE, Sample, model_input
from grpo.errors import InputError
from grpo.evaluation.statistics import wilson_interval
from grpo.rewards.scores import Scores
from grpo.rollout import Rollout, generate_completions

ScoreFn = Callable[[Sequence[Sample], Rollout], Scores]  # B samples and their B completions -> the scores


@dataclass(frozen=True)
class Evaluation:
    """One greedy completion per sample of a dataset. Samples to which no reward applies are excluded from metrics."""

    completions: list[str]
    is_correct: list[bool | None]  # None: the first reward does not apply to this sample
    reward: float  # the mean of the combined reward
    rewards: dict[str, float]  # the mean of each reward function
    mean_length: float  # tokens per completion, the stop token included
    clipped_ratio: float  # fraction of completions cut off at max_completion_length
    seconds: float
    is_correct_leniently: Sequence[bool | None] = ()  # correct, even if the form is not; None: unknown
    combined: Sequence[float] = ()  # the combined reward of each sample, NaN = not applicable
    datasets: Sequence[str | None] = ()  # the dataset of each sample; None: there is only one

    @property
    def num_correct(self) -> int:
        return sum(verdict is True for verdict in self.is_correct)

    @property
    def num_scored(self) -> int:
        return sum(verdict is not None for verdict in self.is_correct)

    @property
    def accuracy(self) -> float | None:
        """The fraction of scored samples that are correct; None if no sample is scored."""
        return self.num_correct / self.num_scored if self.num_scored else None

    def metrics(self) -> dict[str, float]:
        """The eval/* columns of metrics.jsonl. Accuracies are left out if no sample is scored."""
        row = {
            "eval/reward": self.reward,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.clipped_ratio,
            "eval/time": self.seconds,
        }
        row |= _accuracy("eval/accuracy", self.is_correct) | _accuracy(
            "eval/accuracy_lenient", self.is_correct_leniently
        )
        for name, numbers in self.by_dataset().items():
            row |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
        return row

    def by_dataset(self) -> dict[str, dict[str, float]]:
        """n, reward and accuracies of each dataset of a mixture; empty if there is only one dataset."""
        parts = {}
        for name in dict.fromkeys(name for name in self.datasets if name is not None):
            rows = [index for index, own in enumerate(self.datasets) if own == name]
            parts[name] = {"n": len(rows), "reward": mean_of([self.combined[index] for index in rows])}
            parts[name] |= _accuracy("accuracy", [self.is_correct[index] for index in rows])
            parts[name] |= _accuracy("accuracy_lenient", [self.is_correct_leniently[index] for index in rows])
        return parts

    def having(self, metric: str) -> Self:
        """Returns itself. Raises an InputError if `metric`, which chooses best/, is not defined."""
        if math.isnan(self.reward):
            raise InputError("rewards: none of them applies to any row of eval_file")
        if metric not in self.metrics():
            raise InputError(
                f"eval_metric: got {metric}, which is undefined here: the first of the rewards applies to no row of "
                "eval_file; use eval/reward"
            )
        return self

    def __str__(self) -> str:
        row = self.metrics()
        text = f"reward {self.reward:.3f}  length {self.mean_length:.1f}"
        if self.accuracy is not None:
            interval = f"[{row['eval/accuracy_low']:.3f}, {row['eval/accuracy_high']:.3f}]"
            text = f"held-out accuracy {self.accuracy:.3f} {interval} of {self.num_scored}  {text}"
        return text


def _accuracy(name: str, verdicts: Sequence[bool | None]) -> dict[str, float]:
    """The fraction of verdicts that are True and its 95 % interval; empty if there are no verdicts."""
    scored = [verdict for verdict in verdicts if verdict is not None]
    if not scored:
        return {}
    low, high = wilson_interval(sum(scored), len(scored))
    return {name: sum(scored) / len(scored), f"{name}_low": low, f"{name}_high": high}


def mean_of(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def evaluate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    score_fn: ScoreFn,
    *,
    max_completion_length: int,
    batch_rows: int,
    stop_strings: Sequence[str] = (),
    progress: str | None = None,
    generate: Callable[..., Rollout] | None = None,
) -> Evaluation:
    """Generate one greedy completion for every sample, and score it.

    Args:
        model, tokenizer: the model to evaluate.
        samples: the held-out problems.
        score_fn: scores a rollout; that of the training run, so the same rewards apply.
        max_completion_length: in tokens.
        batch_rows: completions generated at once; affects memory and speed only.
        stop_strings: a completion ends after the first of these.
        progress: the name of a progress bar; None = no bar.
        generate: called instead of `generate_completions`, for example to keep completions in a file.
    """
    start_time = time.perf_counter()
    rollouts: list[Rollout] = []
    parts: list[Scores] = []
    for start in _batches(len(samples), batch_rows, progress):
        batch = samples[start : start + batch_rows]
        rollout = (generate or generate_completions)(
            model,
            tokenizer,
            [model_input(sample) for sample in batch],
            group_size=1,
            max_completion_length=max_completion_length,
            temperature=0.0,
            stop_strings=stop_strings,
        )
        rollouts.append(rollout)
        parts.append(score_fn(batch, rollout))
    scores = type(parts[0]).cat(parts)
    return Evaluation(
        completions=[text for rollout in rollouts for text in rollout.completions],
        is_correct=verdicts_of(scores.is_correct),
        reward=mean_of(scores.combined.tolist()),
        rewards={name: mean_of(values.tolist()) for name, values in scores.by_name.items()},
        mean_length=sum(int(rollout.completion_mask.sum()) for rollout in rollouts) / len(samples),
        clipped_ratio=sum(int(rollout.is_truncated.sum()) for rollout in rollouts) / len(samples),
        seconds=time.perf_counter() - start_time,
        is_correct_leniently=verdicts_of(scores.is_correct_leniently),
        combined=scores.combined.tolist(),
        datasets=[sample.get(SOURCE) for sample in samples],
    )


def count_correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    score_fn: ScoreFn,
    *,
    k: int,
    max_completion_length: int,
    batch_rows: int,
    seed: int,
    stop_strings: Sequence[str] = (),
    progress: str | None = None,
    generate: Callable[..., Rollout] | None = None,
) -> list[int | None]:
    """For every sample, how many of k completions sampled at temperature 1 are correct; None if not all are scored.

    The sampling noise of completion g of sample i is a function of (seed, i, g), so `batch_rows` does not change what
    is sampled. For the other arguments see `evaluate_greedy`.
    """
    counts: list[int | None] = []
    size = max(1, batch_rows // k)  # samples per batch
    for start in _batches(len(samples), size, progress):
        batch = samples[start : start + size]
        rollout = (generate or generate_completions)(
            model,
            tokenizer,
            [model_input(sample) for sample in batch],
            group_size=k,
            stop_strings=stop_strings,
            max_completion_length=max_completion_length,
            seed=seed,
            completion_indices=range(start * k, (start + len(batch)) * k),
        )
        verdicts = verdicts_of(score_fn([sample for sample in batch for _ in range(k)], rollout).is_correct)
        for row in range(0, len(verdicts), k):
            scored = [verdict for verdict in verdicts[row : row + k] if verdict is not None]
            counts.append(sum(scored) if len(scored) == k else None)
    return counts


def _batches(num_samples: int, size: int, progress: str | None) -> Iterator[int]:
    """The index of the first sample of each batch. A progress bar counts the samples."""
    with tqdm(total=num_samples, desc=progress, unit="problem", disable=progress is None, leave=False) as bar:
        for start in range(0, num_samples, size):
            yield start
            bar.update(min(size, num_samples - start))


def verdicts_of(is_correct: Tensor) -> list[bool | None]:
    """(b,) 1.0, 0.0 or NaN -> True, False or None (no verdict)."""
    return [None if math.isnan(value) else value == 1.0 for value in is_correct.tolist()]
