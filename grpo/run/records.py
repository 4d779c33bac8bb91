"""Records of the training steps: the lines of samples.jsonl and high_scoring.jsonl, and a failed batch."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from grpo.data import Sample
from grpo.errors import NotFiniteError
from grpo.files import append_jsonl
from grpo.rewards.scores import Scores
from grpo.rollout import Rollout


def sample_rows(
    step: int, samples: Sequence[Sample], rollout: Rollout, scores: Scores, advantages: Tensor
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for one step; `samples`: one per completion. `advantages`: (B, 1) or (B, C).

    If every token has its own advantage, the mean over the completion is recorded.
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
    """The lines of samples.jsonl with a reward above the threshold, without the columns that only concern this run."""
    keys = ("step", "prompt", "completion", "answer", "reward", "rewards")
    return [{key: sample[key] for key in keys} for sample in samples if sample["reward"] > threshold]


def leave_failed_batch(
    folder: Path, rows: Sequence[dict[str, Any]], rollout: Rollout, advantages: Tensor, numbers: dict[str, float]
) -> NotFiniteError:
    """Save the batch of a step whose loss or gradient is NaN or inf to `folder`, and return the error to raise.

    failed-N.jsonl has the same columns as samples.jsonl, for reading. failed-N.safetensors has the tensors, for
    debugging. `numbers`: loss and gradient norms of the step, by name.
    """
    step = rows[0]["step"]
    path = folder / f"failed-{step:06d}.jsonl"
    path.unlink(missing_ok=True)
    append_jsonl(path, rows)
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor)}
    tensors = {name: value.contiguous().clone() for name, value in {**tensors, "advantages": advantages}.items()}
    with suppress(OSError, SafetensorError):  # a full disk must not hide the original error
        save_file(tensors, path.with_suffix(".safetensors"))
    shown = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    return NotFiniteError(f"step {step}: {shown}; the batch lies in {path}")
