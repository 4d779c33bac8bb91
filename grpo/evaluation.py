"""Greedy accuracy on held-out problems, its interval, and pass@k."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.data import Sample
from grpo.rollout import Rollout, generate_completions

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Scored(Protocol):
    """What a score function returns for b completions; NaN = not applicable."""

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Each (b,), one entry a reward function."""

    @property
    def combined(self) -> Tensor:
        """(b,) the combined reward."""

    @property
    def is_right(self) -> Tensor:
        """(b,) 1.0 right, 0.0 wrong."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over a data set, one greedy completion a sample. Rows where no reward applies count nowhere."""

    completions: list[str]
    is_right: list[bool | None]  # None: the first reward does not apply to this row
    reward: float
    mean_length: float  # tokens, the stop token included
    clipped_ratio: float  # share of completions cut off at max_completion_length
    seconds: float

    @property
    def num_right(self) -> int:
        return sum(right is True for right in self.is_right)

    @property
    def num_scored(self) -> int:
        return sum(right is not None for right in self.is_right)

    @property
    def accuracy(self) -> float | None:
        """None where no row is scored as right or wrong."""
        return self.num_right / self.num_scored if self.num_scored else None

    def metrics(self) -> dict[str, float]:
        """The eval/* columns of metrics.jsonl; no accuracy where it is defined for no row."""
        row = {
            "eval/reward": self.reward,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.clipped_ratio,
            "eval/time": self.seconds,
        }
        if self.accuracy is not None:
            low, high = wilson_interval(self.num_right, self.num_scored)
            row |= {"eval/accuracy": self.accuracy, "eval/accuracy_low": low, "eval/accuracy_high": high}
        return row

    def __str__(self) -> str:
        row = self.metrics()
        text = f"reward {self.reward:.3f}  length {self.mean_length:.1f}"
        if self.accuracy is not None:
            interval = f"[{row['eval/accuracy_low']:.3f}, {row['eval/accuracy_high']:.3f}]"
            text = f"held-out accuracy {self.accuracy:.3f} {interval} of {self.num_scored}  {text}"
        return text


def evaluate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    score_fn: Callable[[Sequence[Sample], Rollout], Scored],
    *,
    max_completion_length: int,
    batch_rows: int,
) -> Evaluation:
    """One greedy completion for every sample, `batch_rows` at a time.

    `score_fn(samples, rollout)` is the training run's own, so held-out problems are judged by the same rewards.
    """
    start_time = time.perf_counter()
    rollouts: list[Rollout] = []
    rewards: list[Tensor] = []
    rights: list[bool | None] = []
    for start in range(0, len(samples), batch_rows):
        batch = samples[start : start + batch_rows]
        rollout = generate_completions(
            model,
            tokenizer,
            [sample["prompt"] for sample in batch],
            group_size=1,
            max_completion_length=max_completion_length,
            temperature=0.0,
        )
        scores = score_fn(batch, rollout)
        rollouts.append(rollout)
        rewards.append(scores.combined)
        rights.extend(None if math.isnan(right) else right == 1.0 for right in scores.is_right.tolist())
    return Evaluation(
        completions=[text for rollout in rollouts for text in rollout.completions],
        is_right=rights,
        reward=torch.cat(rewards).nanmean().item(),
        mean_length=sum(int(rollout.completion_mask.sum()) for rollout in rollouts) / len(samples),
        clipped_ratio=sum(int(rollout.is_truncated.sum()) for rollout in rollouts) / len(samples),
        seconds=time.perf_counter() - start_time,
    )


def wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
    """95 % interval of a share; unlike the textbook p +- 1.96 s it stays in [0, 1] and has a width at 0 and 1.

    Paper: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= num_right <= num_samples or num_samples == 0:
        raise ValueError(f"num_right, num_samples: got {num_right}, {num_samples}, expected 0 <= right <= samples >= 1")
    share = num_right / num_samples
    shrink = 1 / (1 + Z_95**2 / num_samples)
    centre = shrink * (share + Z_95**2 / (2 * num_samples))
    spread = math.sqrt(share * (1 - share) / num_samples + Z_95**2 / (4 * num_samples**2))
    return max(0.0, centre - shrink * Z_95 * spread), min(1.0, centre + shrink * Z_95 * spread)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased, from n >= k samples: 1 - C(n - c, k) / C(n, k).

    Paper: "Evaluating Large Language Models Trained on Code" (2107.03374) eq. 1.

    >>> pass_at_k(num_samples=4, num_right=1, k=2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: got {k}, allowed with {num_samples} samples: 1 … {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
