"""What a run writes down of its steps: the rows of metrics.jsonl and samples.jsonl, a batch that failed."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grpo.data import SOURCE, Sample
from grpo.errors import NotFiniteError
from grpo.files import append_jsonl
from grpo.rewards.scores import Scores
from grpo.rollout import Rollout


@dataclass
class TokenMeans:
    """Means over unmasked tokens, across micro-batches: sums and counts, divided once at the end.

    A mean of micro-batch means would weigh tokens by the company they happen to keep. Everything stays on the device
    until `metrics()`, so adding waits for nothing.
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


def metrics_by_dataset(samples: Sequence[Sample], scores: Scores) -> dict[str, float]:
    """Mean reward and share of right answers of each data set of a mixture; empty where there is only one."""
    names = [sample.get(SOURCE) for sample in samples]
    row = {}
    for name in dict.fromkeys(name for name in names if name is not None):
        own = torch.tensor([other == name for other in names])
        for metric, values in (("reward", scores.combined), ("right", scores.is_correct)):
            row[f"datasets/{name}/{metric}"] = values[own].nanmean().item()
    return row


def sample_rows(
    step: int, samples: Sequence[Sample], rollout: Rollout, scores: Scores, advantages: Tensor
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for one step; `samples` are repeated per completion, `advantages` (B, 1) or (B, C).

    Where tokens have advantages of their own, a completion's is their mean.
    """
    rewards = {name: values.tolist() for name, values in scores.by_name.items()}
    combined, is_truncated = scores.combined.tolist(), rollout.is_truncated.tolist()
    if advantages.shape[1] > 1:
        mask = rollout.completion_mask
        advantages = torch.where(mask, advantages, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    advantage = advantages.squeeze(1).tolist()
    return [
        {
            "step": step,
            "prompt": sample["prompt"],
            "completion": rollout.completions[row],
            "answer": sample.get("answer"),
            "reward": combined[row],
            "rewards": {name: values[row] for name, values in rewards.items()},
            "advantage": advantage[row],
            "is_truncated": is_truncated[row],
        }
        for row, sample in enumerate(samples)
    ]


def high_scoring(samples: Sequence[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """Of the lines of samples.jsonl those with a reward above the threshold, without what is of this run alone."""
    keys = ("step", "prompt", "completion", "answer", "reward", "rewards")
    return [{key: sample[key] for key in keys} for sample in samples if sample["reward"] > threshold]


def check_finite(
    loss: Tensor, grad_norm: Tensor, folder: Path, rows: Sequence[dict[str, Any]], rollout: Rollout, advantages: Tensor
) -> None:
    """A loss or gradient that is no number ends the run before it spoils the weights.

    The batch is left behind, to look at (.jsonl, as samples.jsonl) and to compute with (.safetensors).
    """
    if (loss + grad_norm).isfinite():
        return
    step = rows[0]["step"]
    path = folder / f"failed-{step:06d}.jsonl"
    path.unlink(missing_ok=True)
    append_jsonl(path, rows)
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor)}
    tensors = {name: value.contiguous().clone() for name, value in {**tensors, "advantages": advantages}.items()}
    with suppress(OSError, SafetensorError):  # a full disk must not hide what happened
        save_file(tensors, path.with_suffix(".safetensors"))
    raise NotFiniteError(
        f"step {step}: loss {loss.item():.3g}, gradient norm {grad_norm.item():.3g}; the batch lies in {path}"
    )
