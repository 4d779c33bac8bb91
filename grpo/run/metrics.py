"""The metrics of one step, which become one row of metrics.jsonl. docs/METRICS.md defines every column."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.batch import Batch
from grpo.data import SOURCE, Sample
from grpo.evaluation.preflight import outcome_shares
from grpo.rewards.scores import Scores


@dataclass
class TokenMeans:
    """Means over the unmasked tokens of all micro-batches. Sums and counts are kept, and divided at the end.

    A mean of micro-batch means would make the weight of a token depend on the other tokens of its micro-batch.
    All values stay on the device until `metrics()`, so `add` does not wait for the GPU.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, mask: Tensor, values: dict[str, Tensor], maxima: Sequence[str] = ()) -> None:
        """`values`: metric name -> (b, C); `mask`: (b, C) bool. A name "x/mean" in `maxima` also gives "x/max"."""
        for name, value in values.items():
            kept = torch.where(mask, value.detach().float(), 0.0)
            self.sums[name] = self.sums.get(name, 0) + kept.sum()
            self.counts[name] = self.counts.get(name, 0) + mask.sum()
            if name in maxima:
                peak = name.replace("/mean", "/max")
                self.maxima[peak] = torch.maximum(self.maxima.get(peak, kept.max()), kept.max())

    def metrics(self) -> dict[str, float]:
        means = {name: (total / self.counts[name].clamp(min=1)).item() for name, total in self.sums.items()}
        return means | {name: value.item() for name, value in self.maxima.items()}


@dataclass
class StepMetrics:
    """Collects the metrics of one step. Tensors stay on the device until `row`, so adding does not wait for the GPU."""

    step: int
    loss: Tensor | float = 0.0  # summed over the micro-batches of the step
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))  # before clipping, of the last optimizer step
    learning_rate: float = 0.0  # of the last optimizer step
    more: dict[str, float] = field(default_factory=dict)  # columns of one script, such as PPO's value loss
    means: TokenMeans = field(default_factory=TokenMeans)
    times: dict[str, float] = field(default_factory=dict)  # seconds
    start: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Store the seconds since the previous lap under this name."""
        self.times[name] = time.perf_counter() - self.start - sum(self.times.values())

    def add_tokens(self, mask: Tensor, **values: Tensor) -> None:
        """Add values, (b, C) each, to the means over the tokens of `mask`, (b, C)."""
        self.means.add(mask, values)

    def add_micro_batch(
        self, loss: Tensor, mask: Tensor, entropies: Tensor, clipped: tuple[Tensor, Tensor], logp_difference: Tensor
    ) -> None:
        """Add the metrics of one forward and backward pass.

        Args:
            loss: scalar, the micro-batch's part of the loss.
            mask, entropies: (b, C).
            clipped: (low, high), the tokens clipped at each side, (b, C) each.
            logp_difference: (b, C) log-probs of the sampler minus log-probs of the scorer. Only rounding, unless
                there is a bug.
        """
        self.loss = self.loss + loss.detach()
        low, high = clipped
        name = "sampling/logp_difference/mean"
        values = {"entropy": entropies, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        self.means.add(mask, values | {name: logp_difference.abs()}, maxima=[name])

    def is_finite(self) -> bool:
        """Whether all losses and gradient norms so far are finite. One NaN or inf makes the sum NaN or inf."""
        terms = [self.loss, self.grad_norm, *self.more.values()]
        return bool(torch.as_tensor(sum(terms)).isfinite())

    def checked_numbers(self) -> dict[str, float]:
        """The numbers that `is_finite` checks, by name."""
        return {"loss": float(self.loss), "gradient norm": float(self.grad_norm), **self.more}

    def row(self, batch: Batch, counts: dict[str, int]) -> dict[str, float]:
        """The row of metrics.jsonl. `counts`: totals of the run, including this step."""
        config, rollout, scores = batch.config, batch.rollout, batch.scores
        row: dict[str, float] = {
            "step": self.step,
            "loss": float(self.loss) / (config.num_iterations * config.num_minibatches),
            **self.more,
            **scores.metrics(),
            **metrics_by_dataset(batch.row_samples, scores),
        }
        if config.advantage_baseline != "critic":  # PPO does not compare completions of one prompt
            row["frac_reward_zero_std"] = batch.zero_variance_groups.float().mean().item()
        return row | {
            **outcome_shares(scores, rollout.is_truncated),
            **rollout.metrics(),
            **self.means.metrics(),
            "grad_norm": float(self.grad_norm),
            "learning_rate": self.learning_rate,
            **counts,
            "step_time": sum(self.times.values()),
            **self.times,
        }


def metrics_by_dataset(samples: Sequence[Sample], scores: Scores) -> dict[str, float]:
    """Mean reward and fraction of correct answers for each dataset of a mixture. Empty if there is no mixture."""
    names = [sample.get(SOURCE) for sample in samples]
    row = {}
    for name in dict.fromkeys(name for name in names if name is not None):
        own = torch.tensor([other == name for other in names])
        for metric, values in (("reward", scores.combined), ("right", scores.is_correct)):
            row[f"datasets/{name}/{metric}"] = values[own].nanmean().item()
    return row
